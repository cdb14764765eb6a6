"""Names of an image set's classes: a text file with one a line, in the order of their numbers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megatron.errors import UserError
from megatron.files import read_text
from megatron.text import shortened

IMAGE_SUFFIX, CLASSES_SUFFIX = "_image_document", "_classes.txt"
_MOST_BYTES = 1 << 26


def classes_file(prefix: str | Path) -> Path:
    """Where the classes of the images under this prefix are named, if they are: X_classes.txt of X_image_document."""
    return Path(str(prefix).removesuffix(IMAGE_SUFFIX) + CLASSES_SUFFIX)


def are_class_names(names: Sequence[object]) -> bool:
    """Can these be the lines of such a file: text, no two alike, none of them blank or of several lines?"""
    lines = [name for name in names if isinstance(name, str) and name.strip() and len(name.splitlines()) == 1]
    is_text = all(name.encode("utf-8", "replace").decode() == name for name in lines)
    return 0 < len(names) == len(set(lines)) and is_text


def class_lines(path: str | Path, key: str = "") -> list[str]:
    """The lines of such a file, whatever they say. Raises UserError for one that cannot be read.

    key: the flag that named the file, for messages.
    """
    return read_text(path, key, "give one name a line", _MOST_BYTES).splitlines()


def read_classes(path: str | Path, key: str = "") -> list[str]:
    """The names in such a file. Raises UserError for one that cannot be read, and for names that are not told apart."""
    names = class_lines(path, key)
    if not are_class_names(names):
        where = f"{key}: {path}" if key else str(path)
        raise UserError(f"{where} must name each class once, one a line, without empty lines")
    return names


def class_names(prefix: str | Path) -> list[str] | None:
    """What the file beside an image pair calls the classes; None where there is none. Raises: see class_lines."""
    names = classes_file(prefix)
    return class_lines(names) if names.exists() else None


def check_same_classes(names: Sequence[str], where: object, expected: Sequence[str], source: object) -> None:
    """Raise UserError where equally many classes are numbered in two ways: `names`, and as `source` has them."""
    if len(names) != len(expected):
        return
    for number, (name, other) in enumerate(zip(names, expected, strict=True)):
        if name != other:
            raise UserError(
                f"{where}: class {number} is {shortened(name)}, and {shortened(other)} in {source}; prepare these "
                "images again, with --classes and a file of the names in that order"
            )
