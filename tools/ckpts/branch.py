"""Make a run that anneals from a checkpoint of another one, which stays as it is; see docs/training.md.

IN, the trunk, is a run's folder or one of its global_step folders. OUT is the new run's folder, trained by
`python deepy.py train.py OUT/config.yml`: its learning rate decays from there at once, over --decay-iters iterations.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    styles = ("exponential", "linear", "cosine", "minus_sqrt")
    parser.add_argument("input", metavar="IN", help="the trunk")
    parser.add_argument("output", metavar="OUT", help="folder to write; new or empty")
    parser.add_argument("--iteration", type=int, help="which of the trunk's checkpoints; default the latest")
    parser.add_argument("--decay-iters", type=int, required=True, help="iterations of the decay, and of the new run")
    parser.add_argument("--decay-style", choices=styles, help="its shape; default lr_wsd_decay_style of the trunk")
    parser.add_argument("--min-lr", type=float, help="learning rate at its end; default min_lr of the trunk")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Parse and branch."""
    args = parse_args(arguments)

    from megatron.training.branch import CONFIG_FILE, Decay, branch_run
    from megatron.training.checkpointing import environment

    decay = Decay(args.decay_iters, args.decay_style, args.min_lr)
    config = branch_run(args.input, args.output, decay, iteration=args.iteration, environment=environment())
    options, last = config.optimization, config.last_iteration
    print(
        f"iterations {last - decay.iters + 1} to {last}: {options.lr_wsd_decay_style} decay from "
        f"{options.optimizer.params.lr:g} to {options.min_lr:g}"
    )
    print(f"wrote {args.output}; train it with python deepy.py train.py {Path(args.output) / CONFIG_FILE}")


if __name__ == "__main__":
    if not __package__:  # run by its path: then this folder is on the import path, not the one that holds megatron
        sys.path[0] = str(Path(__file__).resolve().parents[2])  # instead: inspect.py here is not Python's inspect
    from megatron.errors import run_command

    sys.exit(run_command(main))
