"""Trains a language model: `python train.py configs/demo.yml [flags]`, or on every device through deepy.py."""

from __future__ import annotations

import sys

from megatron.errors import run_command
from megatron.signals import StopRequest


def main() -> int:
    """Parse the command line and train; returns the exit code."""
    stop = StopRequest(ends_at_once=True)
    stop.listen()  # before the imports, which take seconds
    from megatron.config.cli import parse_run
    from megatron.mpu.environment import ensure_process_environment, stop_with_launcher

    ensure_process_environment()
    stop_with_launcher()
    config, args = parse_run(sys.argv[1:], "train.py")
    from megatron.config.places import places_named
    from megatron.mpu.processes import abandoned_on_error
    from megatron.training.coord_check import check_coordinates
    from megatron.training.loop import shut_down, train

    with places_named(args.settings), stop.other_ranks_may_be_gone(), abandoned_on_error():
        if config.training.coord_check:
            check_coordinates(config)
        else:
            train(config, stop)
        shut_down()
    stop.finish()
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
