"""Evaluates a checkpoint: `python eval.py configs/demo.yml --eval_tasks TASK`, or on every device through deepy.py."""

from __future__ import annotations

import os
import sys

from megatron.errors import run_command


def main() -> int:
    """Parse the command line and evaluate, each process its share; returns the exit code."""
    from megatron.config.cli import parse_run
    from megatron.mpu.environment import ensure_process_environment, stop_with_launcher

    ensure_process_environment()
    stop_with_launcher()
    if os.environ["RANK"] != "0":
        os.environ.setdefault("TQDM_DISABLE", "1")  # one rank's progress bars are enough
    config, args = parse_run(sys.argv[1:], "eval.py")
    from eval_tasks.run import run_evaluation
    from megatron.config.places import places_named
    from megatron.mpu.processes import abandoned_on_error, join, leave_world

    launch = config.launch
    with places_named(args.settings), abandoned_on_error():
        layout = join(config.parallel.model_parallel_size, launch.distributed_backend, launch.ranks_per_gpu)
        run_evaluation(config, layout)
    leave_world()
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
