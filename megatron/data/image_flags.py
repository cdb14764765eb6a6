"""The flags of prepare_data.py that are about images, and what they ask for. Pillow is imported when they are used."""

from __future__ import annotations

import argparse
import os
from dataclasses import replace
from pathlib import Path

from megatron.config.sections.tokenizer import TokenizerConfig
from megatron.data.classes import read_classes
from megatron.data.pillow import pillow_needed
from megatron.errors import UserError
from megatron.log import get_logger
from megatron.text import shortened

_MOST_ENDINGS = 8


def add_image_flags(parser: argparse.ArgumentParser) -> None:
    """--images, --shards or --npz, and what goes with them."""
    group = parser.add_argument_group("images", "instead of text; labels and captions go with them")
    group.add_argument(
        "--images", metavar="FOLDER", help="FOLDER/CLASS/image.jpg, a .txt beside it; or a captions.jsonl"
    )
    group.add_argument("--shards", nargs="+", metavar="TAR", help="webdataset tars: key.jpg, .cls, .txt or .json")
    group.add_argument("--npz", metavar="FILE", help="arrays images, labels, text, prompt, classes")
    group.add_argument("--classes", metavar="FILE", help="names of the classes in order, one a line")
    group.add_argument("--broken", choices=["fail", "skip"], default="fail", help="what an unusable image does")
    group.add_argument("--order-seed", type=int, default=1234, metavar="N", help="of the images' random order")


def prepare_from_flags(args: argparse.Namespace, tokenizer: TokenizerConfig) -> bool:
    """Prepare the images that the flags name; false where they name none. Raises UserError."""
    sources = [flag for flag in ("images", "shards", "npz", "input") if getattr(args, flag)]
    if not sources or sources == ["input"]:
        return False
    if len(sources) > 1:
        raise UserError(f"--{sources[1]}: --{sources[0]} is given too; keep one of them")
    name = args.name or args.dataset
    if not name or Path(name).name != name:
        raise UserError("the data set needs a name without slashes: prepare_data.py NAME --images FOLDER")
    if not 0 <= args.order_seed < 2**32:
        raise UserError(f"--order-seed: {args.order_seed} is not from 0 to 2^32 - 1")
    _prepare(args, Path(args.data_dir) / name / name, tokenizer)
    return True


def _prepare(args: argparse.Namespace, prefix: Path, tokenizer: TokenizerConfig) -> None:
    with pillow_needed():
        from megatron.data.image_sources import list_arrays, list_folder, list_shards
        from megatron.data.prepare_images import Faults, prepare_images
    faults, classes = Faults(args.broken == "skip"), read_classes(args.classes, "--classes") if args.classes else None
    if args.images:
        listing = list_folder(args.images, classes, faults)
    elif args.shards:
        listing = list_shards(args.shards, faults)
    else:
        listing = list_arrays(args.npz)
    if listing.passed_over:
        endings = sorted(listing.passed_over.items(), key=lambda found: (-found[1], found[0]))
        named = ", ".join(f"{count:,} {shortened(ending, 20)}" for ending, count in endings[:_MOST_ENDINGS])
        more = f" and {len(endings) - _MOST_ENDINGS} more endings" if len(endings) > _MOST_ENDINGS else ""
        total = sum(listing.passed_over.values())
        get_logger().warning(f"passed over {total:,} files that are no images by their endings: {named}{more}")
    listing = listing if classes is None else replace(listing, classes=classes)
    workers = len(os.sched_getaffinity(0)) if args.num_workers is None else args.num_workers
    prepare_images(listing, prefix, tokenizer, faults, args.order_seed, workers)
