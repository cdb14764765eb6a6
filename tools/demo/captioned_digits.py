"""scikit-learn's handwritten digits with captions, for `prepare_data.py --npz`.

`python -m tools.demo.captioned_digits captioned_digits.npz` writes 1,797 images of 8 x 8 pixels, what each shows, and
eight captions of each; with `--all` the two more that are otherwise kept for tests.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np

from megatron.errors import run_command
from tools.vision.data import digits

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
TEMPLATES = (
    "the digit {}", "a handwritten {}", "a picture of the number {}", "someone wrote {}", "this is {}",
    "an image of a {}", "{} written by hand", "the number {} in grey",
)  # fmt: skip
UNSEEN_TEMPLATES = ("a {} on paper", "here you can see {}")
"""Nothing is trained on them: texts of another form."""


def write_digits(path: Path, templates: tuple[str, ...] = TEMPLATES) -> None:
    """Write the arrays images, labels, text [n, templates] and classes. Raises UserError without scikit-learn."""
    images, labels = digits()
    captions = [[template.format(WORDS[label]) for template in templates] for label in labels]
    np.savez(path, images=images, labels=labels, text=np.array(captions), classes=np.array(WORDS))


def main() -> None:
    """Write the file that the command line names."""
    parser = argparse.ArgumentParser(description="scikit-learn's handwritten digits with captions")
    parser.add_argument("output", type=Path, help="file to write, for example captioned_digits.npz")
    parser.add_argument("--all", action="store_true", help="ten captions of each image instead of eight")
    args = parser.parse_args()
    write_digits(args.output, (*TEMPLATES, *UNSEEN_TEMPLATES) if args.all else TEMPLATES)


if __name__ == "__main__":
    sys.exit(run_command(main))
