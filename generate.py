"""Generates text with a checkpoint: `python generate.py configs/demo.yml --text_gen_type KIND`, or through deepy.py."""

from __future__ import annotations

import sys

from megatron.errors import run_command


def main() -> int:
    """Parse the command line and generate in the first process, or the first tensor group; returns the exit code."""
    from megatron.config.cli import parse_run
    from megatron.mpu.environment import ensure_process_environment, stop_with_launcher

    ensure_process_environment()
    stop_with_launcher()
    config, args = parse_run(sys.argv[1:], "generate.py")
    from megatron.config.places import places_named
    from megatron.mpu.processes import abandoned_on_error, join_one_copy, leave_world

    launch = config.launch
    with places_named(args.settings), abandoned_on_error():
        layout = join_one_copy(config.parallel.model_parallel_size, launch.distributed_backend, launch.ranks_per_gpu)
        if layout is not None:
            from megatron.inference.modes import run_generation

            run_generation(config, layout)
    if layout is not None:
        leave_world()
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
