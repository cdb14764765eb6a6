"""Evaluates a checkpoint: `python eval.py configs/demo.yml --eval_tasks TASK`, or on every device through deepy.py."""

from __future__ import annotations

import os
import sys

from megatron.errors import run_command


def main() -> int:
    """Parse the command line and evaluate, each process its share; returns the exit code."""
    from megatron.config.cli import parse_run
    from megatron.launch import ensure_process_environment

    ensure_process_environment()
    if os.environ["RANK"] != "0":
        os.environ.setdefault("TQDM_DISABLE", "1")  # one rank's progress bars are enough
    config, _ = parse_run(sys.argv[1:], "eval.py")
    from megatron.config.schema import ParallelConfig, PrecisionConfig

    if os.environ["WORLD_SIZE"] != "1":
        from megatron.training.engine import initialize_distributed

        # The layout and the loss scaling of training: here every process has the whole model, and fp16 its own rule.
        plain = {"parallel": ParallelConfig(), "precision": PrecisionConfig()}
        initialize_distributed(config.model_copy(update=plain))
    from eval_tasks.run import run_evaluation
    from megatron.inference.ranks import DataRanks

    run_evaluation(config, DataRanks.of_world())
    if os.environ["WORLD_SIZE"] != "1":
        from megatron.training.loop import shut_down

        shut_down()
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
