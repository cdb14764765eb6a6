"""Checksums of a .bin/.idx pair: `{prefix}.sha256` beside it, in the format of sha256sum, so that that checks it too.

Preprocessing writes them. Data of other tools has none and needs none.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable
from pathlib import Path

from megatron.errors import UserError
from megatron.files import replaced_file

_LINE = re.compile(rb"([0-9a-fA-F]{64}) [ *](.*)(\.bin|\.idx)")
_MAX_BYTES = 1 << 16


class NoChecksumsError(UserError):
    """What is there instead of checksums cannot be read as such."""


def checksum_path(prefix: str) -> Path:
    """Where the checksums of the pair `prefix` are."""
    return Path(f"{prefix}.sha256")


def read_checksums(prefix: str) -> dict[str, str]:
    """The sha256 of `.bin` and of `.idx`, in hexadecimal, as far as they are recorded; empty without the file.

    Names in the file do not count, only their suffixes: a pair may be renamed. Raises NoChecksumsError.
    """
    path = checksum_path(prefix)
    if not path.exists():
        return {}
    lines = [_LINE.fullmatch(line) for line in _content(path).splitlines()]
    found = {line[3].decode(): line[1].decode().lower() for line in lines if line}
    if not found or None in lines:
        raise NoChecksumsError(f"{path}: does not hold checksums as sha256sum writes them; copy it again or delete it")
    return found


def _content(path: Path) -> bytes:
    try:
        if not path.is_file():
            raise NoChecksumsError(f"{path}: is not a file; delete it")
        with path.open("rb") as file:
            return file.read(_MAX_BYTES)
    except OSError as error:
        raise NoChecksumsError(f"{path}: cannot be read ({error.strerror}); copy it again or delete it") from None


def write_checksums(path: Path, prefix: str, checksums: dict[str, str]) -> None:
    """Record the sha256 of `.bin` and `.idx` of the pair `prefix` in `path`."""
    name = Path(prefix).name
    with replaced_file(path) as file:
        file.writelines(os.fsencode(f"{digest}  {name}{suffix}\n") for suffix, digest in checksums.items())


def file_checksum(path: Path) -> str:
    """The sha256 of a file. Raises UserError when it cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); copy it again") from None


def compare(prefix: str, suffix: str, computed: Callable[[], str]) -> bool:
    """Was a sha256 of the pair's `.bin` or `.idx` recorded, and so compared with the computed one?

    Raises UserError when they differ, and NoChecksumsError.
    """
    expected = read_checksums(prefix).get(suffix)
    if expected is None:
        return False
    if expected != computed():
        raise UserError(
            f"{prefix}{suffix}: damaged, its sha256 is not the one in {checksum_path(prefix).name}; copy the files or "
            "prepare the data again; if another tool has written the pair since, delete the .sha256 file"
        )
    return True
