"""Evaluates a checkpoint on lm-eval tasks: `python eval.py configs/demo.yml --eval_tasks TASK`, or through deepy.py."""

from __future__ import annotations

import os
import sys

from megatron.errors import run_command


def main() -> int:
    """Parse the command line and evaluate in the first process; returns the exit code."""
    from megatron.config.cli import parse_run
    from megatron.launch import ensure_process_environment

    ensure_process_environment()
    config, _ = parse_run(sys.argv[1:], "eval.py")
    if os.environ["RANK"] == "0":
        from eval_tasks.run import run_evaluation

        run_evaluation(config)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
