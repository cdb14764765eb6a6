"""Runs a script for DeepSpeed's launcher: `python megatron/launch/worker.py train.py configs/demo.yml [flags]`.

deepy.py starts the launcher deaf to signals, for it would kill the processes that are saving. They hear them again.
"""

from __future__ import annotations

import runpy
import signal
import sys
from pathlib import Path

if __name__ == "__main__":
    script = sys.argv[1]
    sys.argv, sys.path[0] = sys.argv[1:], str(Path(script).resolve().parent)  # as `python script` has them
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    runpy.run_path(script, run_name="__main__")
