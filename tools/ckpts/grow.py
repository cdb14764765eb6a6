"""Add parameter tokens to a checkpoint without changing what its model computes; see docs/growth.md.

IN is a run's folder, one of its global_step folders, or an official pytorch_model.bin or training folder (with
--config). OUT is a new run's folder, from which training goes on with `load` and a YAML file with the new counts.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("input", metavar="IN", help="checkpoint to read")
    parser.add_argument("output", metavar="OUT", help="folder to write; new or empty")
    for kind, what in (("qkv", "each query, key and value"), ("proj", "proj"), ("ffn", "the feed-forward")):
        parser.add_argument(f"--{kind}", type=int, help=f"tokens of {what} afterwards; default as many as before")
    parser.add_argument("--layers", help="blocks that grow, for example 0,3-5; default all TokenFormer blocks")
    of_two = "which network of a model with an image tower and a text tower; default both"
    parser.add_argument("--tower", choices=("image", "text", "both"), help=of_two)
    parser.add_argument("--new-keys", choices=("zero", "rotated", "random", "official"), help="what new keys start as")
    norms = "whether new tokens share the row norm of the old ones (default), or have their own: then random keys"
    parser.add_argument("--row-norm", choices=("joint", "segment"), default="joint", help=norms)
    what = "what Adam's second moments of new tokens start as: zero, or the mean of the old ones'"
    parser.add_argument("--new-moments", choices=("zero", "mean"), default="zero", help=what)
    parser.add_argument("--seed", type=int, help="of what is drawn; default that of the run")
    parser.add_argument("--config", nargs="+", metavar="YAML", help="YAML files of the model, for an official one")
    return parser.parse_args(arguments)


def parse_layers(text: str) -> tuple[int, ...]:
    """`0,3-5` as (0, 3, 4, 5)."""
    from megatron.errors import UserError

    layers: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise UserError(f"--layers: {text} is no list of blocks; write it as 0,3-5")
        blocks = range(int(first), int(last if dash else first) + 1)
        if not blocks:
            raise UserError(f"--layers: {part.strip()} runs backwards; write the lower block first, as in 0,3-5")
        layers.extend(blocks)
    return tuple(layers)


def main(arguments: list[str] | None = None) -> None:
    """Parse and grow."""
    args = parse_args(arguments)

    from megatron.config import load_config
    from megatron.errors import UserError
    from megatron.growth import TokenCounts
    from megatron.growth.convert import grow_checkpoint
    from megatron.training.checkpointing import environment

    if args.qkv is None and args.proj is None and args.ffn is None:
        raise UserError("--qkv, --proj, --ffn: give the tokens afterwards of at least one of them")
    layers = None if args.layers is None else parse_layers(args.layers)
    grown = grow_checkpoint(
        args.input,
        args.output,
        TokenCounts(args.qkv, args.proj, args.ffn, layers, args.new_keys, args.row_norm, args.tower),
        seed=args.seed,
        new_moments=args.new_moments,
        config=load_config(args.config) if args.config else None,
        environment=environment(),
    )
    print(f"{grown.entry['added']}: {grown.entry['parameters']:,} parameters")
    print(f"logits differ by {grown.difference.largest:.2e} (largest logit {grown.difference.scale:.2e})")
    print(f"wrote {args.output}")


if __name__ == "__main__":
    if not __package__:  # run by its path: then this folder is on the import path, not the one that holds megatron
        sys.path[0] = str(Path(__file__).resolve().parents[2])  # instead: inspect.py here is not Python's inspect
    from megatron.errors import run_command

    sys.exit(run_command(main))
