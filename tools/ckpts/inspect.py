"""The name that describe.py had: it does the same."""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    if not __package__:  # run by its path
        sys.path[0] = str(Path(__file__).resolve().parents[2])  # instead of this folder: this is not Python's inspect
    from megatron.errors import run_command
    from tools.ckpts.describe import main

    sys.exit(run_command(main))
