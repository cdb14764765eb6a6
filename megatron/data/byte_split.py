"""A text file divided by bytes, as benchmarks of compression divide theirs: enwik8 into 90, 5 and 5 million."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

from megatron.errors import UserError
from megatron.files import read_errors, replaced_file, write_errors

PARTS = ("train", "valid", "test")
_COPY_BYTES = 1 << 24
_CONTINUES, _PREFIX = 0xC0, 0x80
"""The two upper bits of a byte that goes on with a character of UTF-8 are 10."""


def split_by_bytes(source: str | Path, sizes: Sequence[int], folder: Path) -> dict[str, Path]:
    """Write the first bytes of a text file to train.txt, those that follow to valid.txt, and then to test.txt.

    A boundary within a character moves to the beginning of that character.

    Args:
        sizes: bytes of two or three parts.
        folder: where the parts are written.

    Raises: UserError where the file is shorter, or cannot be read or written.
    """
    check_sizes(sizes)
    with read_errors(f"{source}"), open(source, "rb") as file:
        length = os.fstat(file.fileno()).st_size
        if sum(sizes) > length:
            raise UserError(f"--split-bytes: {sum(sizes):,} bytes are asked for, {source} has {length:,}")
        bounds = [0]
        for size in sizes:
            bounds.append(_character_start(file, sum(sizes[: len(bounds) - 1]) + size, length))
        if empty := [name for name, first, end in zip(PARTS, bounds, bounds[1:], strict=False) if first == end]:
            raise UserError(f"--split-bytes: {source} has no whole character in the bytes of {empty[0]}; give it more")
        found = {}
        for name, first, end in zip(PARTS, bounds, bounds[1:], strict=False):
            found[name] = folder / f"{name}.txt"
            with write_errors(str(found[name])):
                folder.mkdir(parents=True, exist_ok=True)
                with replaced_file(found[name]) as part:
                    file.seek(first)
                    while first < end and (block := file.read(min(_COPY_BYTES, end - first))):
                        part.write(block)
                        first += len(block)
    return found


def check_sizes(sizes: Sequence[int]) -> None:
    """Raise a UserError for what cannot be the bytes of two or three parts."""
    if not 2 <= len(sizes) <= len(PARTS) or min(sizes) < 1:
        raise UserError(f"--split-bytes: {' '.join(map(str, sizes))}: give bytes of two or three parts, each above 0")


def _character_start(file: BinaryIO, place: int, length: int) -> int:
    """Where the character begins that has the byte at `place`."""
    while 0 < place < length:
        file.seek(place)
        if file.read(1)[0] & _CONTINUES != _PREFIX:
            break
        place -= 1
    return place
