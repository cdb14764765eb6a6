"""Starts a script on every device with DeepSpeed: `python deepy.py train.py configs/demo.yml [flags]`."""

from __future__ import annotations

import sys

from megatron.errors import run_command
from megatron.launch import launch

if __name__ == "__main__":
    sys.exit(run_command(lambda: launch(sys.argv[1:])))
