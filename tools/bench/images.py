"""How many images one core decodes and augments in a second, and how many cores eight GPUs would keep busy.

    python -m tools.bench.images [--images 64] [--width 500 --height 375 --size 224] [--rounds 5] [--json FILE]
                                 [--wanted 10000]

The images are JPEGs of noise of several scales with as many bytes as ImageNet's have, 110 kB. What counts is the
processor time of this process, which other work on the machine disturbs less than the clock. --wanted is how many
images a second all GPUs together take.
"""

from __future__ import annotations

import io
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from megatron.config.sections.images import ImagesConfig
from megatron.config.sections.tokenizer import TokenizerConfig
from megatron.data.datasets import Part
from megatron.data.decode import decode
from megatron.data.image_sources import list_folder
from megatron.data.images import AugmentedImages, ImageDataset, ImageShape, LabelledImages
from megatron.data.indexed import IndexedDataset
from megatron.data.prepare_images import Faults, prepare_images
from megatron.errors import UserError, run_command
from megatron.text import align
from tools.bench.measure import Timed, as_document, compare, parser, processor_clocked, take_turns, write_json

_RECIPES: dict[str, dict[str, Any]] = {
    "training: crop, flip": {},
    "RandAugment, erasing too": {"auto_augment": "rand-m9-mstd0.5-inc1", "reprob": 0.25},
    "mixup, cutmix too": {"auto_augment": "rand-m9-mstd0.5-inc1", "reprob": 0.25, "mixup": 0.8, "cutmix": 1.0},
}


def photograph(number: int, width: int, height: int) -> bytes:
    """A JPEG of noise whose amplitude falls with its frequency, as that of photographs does."""
    random, total = np.random.default_rng(number), np.zeros((height, width, 3), np.float32)
    for scale in (64, 32, 16, 8, 4, 2, 1):
        rows, columns = -(-height // scale), -(-width // scale)
        coarse = Image.fromarray(random.integers(0, 256, (rows, columns, 3), np.uint8))
        total += np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), np.float32) * scale**0.25
    total = (total - total.min()) / (total.max() - total.min()) * 255
    file = io.BytesIO()
    Image.fromarray(total.astype(np.uint8)).save(file, "JPEG", quality=95)
    return file.getvalue()


def prepared(folder: Path, count: int, width: int, height: int) -> IndexedDataset:
    """A pair of such images."""
    place = folder / "raw" / "one"
    place.mkdir(parents=True)
    for number in range(count):
        (place / f"{number}.jpg").write_bytes(photograph(number, width, height))
    faults = Faults(skip=False)
    listing = list_folder(str(folder / "raw"), None, faults)
    return IndexedDataset(prepare_images(listing, folder / "set", TokenizerConfig(), faults).prefixes["image"])


def contestants(indexed: IndexedDataset, size: int) -> dict[str, Timed]:
    """What is measured, each over all images."""
    shape, count = ImageShape(3, size, 1), len(indexed)
    parts = [LabelledImages(Part(indexed, (0, count)), shape.num_classes)]
    sets: dict[str, Any] = {"evaluation: resize, crop": ImageDataset(parts, shape, ImagesConfig())}
    for name, keys in _RECIPES.items():
        sets[name] = AugmentedImages(parts, shape, ImagesConfig(**keys), 1, count)
    work: dict[str, Callable[[int], object]] = {"decoding": lambda number: decode(indexed[number].tobytes())}
    work |= {name: dataset.__getitem__ for name, dataset in sets.items()}
    return {name: processor_clocked(partial(_all_of, each, count)) for name, each in work.items()}


def _all_of(work: Callable[[int], object], count: int) -> None:
    for number in range(count):
        work(number)


def main() -> int:
    """Measure and print."""
    flags = parser(__doc__, rounds=5)
    for name, default in (("images", 64), ("width", 500), ("height", 375), ("size", 224), ("wanted", 10_000)):
        flags.add_argument(f"--{name}", type=int, default=default, metavar="N", help=f"default {default}")
    args = flags.parse_args()
    if min(args.images, args.width, args.height, args.size, args.wanted) < 1 or args.images % 2:
        raise UserError("--images: give an even number, and sizes of at least 1")
    with tempfile.TemporaryDirectory() as folder:
        indexed = prepared(Path(folder), args.images, args.width, args.height)
        results = compare(take_turns(contestants(indexed, args.size), args.rounds), "decoding")
    rows = [("", "images a second of one core", f"cores for {args.wanted:,} a second", "spread")]
    for name, result in results.items():
        rate = args.images / result.minimum
        result.facts = {"images_per_second": rate}
        rows.append((name, f"{rate:.0f}", f"{args.wanted / rate:.0f}", f"{result.spread:.0%}"))
    mean = indexed.num_tokens / args.images / 1000
    print(f"{args.width} x {args.height} JPEGs of {mean:.0f} kB on the average, to {args.size} x {args.size} pixels")
    print("\n".join(align(rows, [0])))
    write_json(args.json, as_document("images", {"measured": results}, vars(args), torch.device("cpu")))
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
