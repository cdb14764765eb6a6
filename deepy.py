"""Starts a script on every device with DeepSpeed: `python deepy.py train.py configs/demo.yml [flags]`.

`python deepy.py doctor configs/demo.yml` checks the nodes before.
"""

from __future__ import annotations

import sys

from megatron.errors import run_command


def main() -> int:
    """Launch what the command line says; returns the exit code."""
    if sys.argv[1:2] == ["doctor"]:
        from megatron.doctor.command import doctor  # has to start where packages are missing

        return doctor(sys.argv[2:])
    from megatron.launch import launch

    return launch(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(run_command(main))
