"""Documents of text files: .txt, .jsonl, .jsonl.gz, .jsonl.zst, a .tar of the last, and OpenWebText's .tar.

The latter holds archives (.xz) of text files, each a document; as in the library `datasets`, three line ends and more
become two, and white space around a document goes.
"""

from __future__ import annotations

import gzip
import io
import json
import lzma
import re
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal, cast

import zstandard

from megatron.errors import UserError

SUFFIXES = (".txt", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".jsonl.zst.tar", ".tar")
TxtDocuments = Literal["file", "lines"]

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_MANY_LINE_ENDS = re.compile("\n\n\n+")


@dataclass(frozen=True)
class RawDocument:
    """Undecoded bytes of one document; line is its number in the file, 0 for a whole .txt file."""

    path: str
    line: int
    content: bytes

    @property
    def num_bytes(self) -> int:
        """Length of the content."""
        return len(self.content)

    @property
    def is_json(self) -> bool:
        """Whether the content is a JSON object with the text under its keys."""
        return not self.path.endswith(".txt")


def read_documents(paths: Sequence[str], txt_documents: TxtDocuments = "file") -> Iterator[RawDocument]:
    """The documents of all files in order; blank lines of .jsonl and of .txt by lines are left out.

    txt_documents: a .txt file is one document ("file") or one a line ("lines"). Raises UserError for a file that
    is missing, of another kind or damaged.
    """
    check_inputs(paths)
    for path in paths:
        with _damage_reported(path), open(path, "rb") as raw:
            for name, file in _streams(path, raw):
                if name.endswith(".txt") and name != path:
                    yield RawDocument(name, 0, _tidied(file.read()))
                elif path.endswith(".txt") and txt_documents == "file":
                    yield RawDocument(path, 0, file.read().removeprefix(_BYTE_ORDER_MARK))
                else:
                    yield from _lines(name, file)


def _lines(path: str, file: BinaryIO) -> Iterator[RawDocument]:
    for number, line in enumerate(file, start=1):
        content = (line.removeprefix(_BYTE_ORDER_MARK) if number == 1 else line).rstrip(b"\r\n")
        if content.strip():
            yield RawDocument(path, number, content)


def texts(document: RawDocument, keys: Sequence[str]) -> list[str]:
    """The document's text under each key; the same text for all of them if it is not JSON.

    Raises UserError naming file and line for bytes that are not UTF-8, broken JSON, a missing key or a value that
    is not text.
    """
    try:
        content = document.content.decode("utf-8")
    except UnicodeDecodeError as error:
        place = f"line {document.line}" if document.line else f"byte {error.start}"
        raise UserError(f"{document.path}: {place} is not UTF-8 text; convert the file to UTF-8") from None
    if not document.is_json:
        return [content] * len(keys)
    where = f"{document.path}: line {document.line}"
    try:
        fields = json.loads(content)
    except (ValueError, RecursionError) as error:  # ValueError: a number of too many digits, too
        raise UserError(f"{where} is not valid JSON ({error}); each line must be one JSON object") from None
    if not isinstance(fields, dict):
        raise UserError(f'{where} is not a JSON object but {type(fields).__name__}; write {{"text": ...}}')
    return [_text(fields, key, where) for key in keys]


def _text(fields: dict[str, object], key: str, where: str) -> str:
    if key not in fields:
        raise UserError(f"{where} has no key '{key}', only {', '.join(fields) or 'none'}; choose with --jsonl-keys")
    value = fields[key]
    if not isinstance(value, str):
        raise UserError(f"{where}: '{key}' is not text but {type(value).__name__}; choose with --jsonl-keys")
    return value


def check_inputs(paths: Sequence[str]) -> None:
    """Raise UserError unless every path is a file of a known kind."""
    if not paths:
        raise UserError("--input: no files given; pass one or more text files")
    for path in paths:
        if not path.endswith(SUFFIXES):
            raise UserError(f"--input: {path} is of an unknown kind; known are {', '.join(SUFFIXES)}")
        if not Path(path).is_file():
            raise UserError(f"--input: no such file: {path}")


@contextmanager
def _damage_reported(path: str) -> Iterator[None]:
    """Turns what damaged files raise while they are read into a UserError."""
    try:
        yield
    except (EOFError, OSError, tarfile.TarError, zlib.error, lzma.LZMAError, zstandard.ZstdError) as error:
        raise UserError(f"{path}: cannot be read ({error}); it may be damaged or incomplete") from error


def _streams(path: str, raw: BinaryIO) -> Iterator[tuple[str, BinaryIO]]:
    """Name and uncompressed bytes of the file, or of each .jsonl.zst in a tar, read in place: nothing is unpacked."""
    if not path.endswith(".tar"):
        yield path, _uncompressed(path, raw)
        return
    with tarfile.open(fileobj=raw, mode="r|") as archive:
        for member in archive:
            if not member.isfile() or not member.name.endswith((".jsonl.zst", ".xz")):
                continue
            packed = cast(BinaryIO, archive.extractfile(member))
            if member.name.endswith(".xz"):
                yield from _texts_of(f"{path}/{member.name}", packed)
            else:
                yield f"{path}/{member.name}", _uncompressed(member.name, packed)


def _texts_of(path: str, packed: BinaryIO) -> Iterator[tuple[str, BinaryIO]]:
    """The .txt files of a .tar.xz, in its order. Raises EOFError for one that was cut off."""
    with lzma.open(packed) as unpacked:
        with tarfile.open(fileobj=unpacked, mode="r|") as archive:
            for member in archive:
                if member.isfile() and member.name.endswith(".txt"):
                    yield f"{path}/{member.name}", cast(BinaryIO, archive.extractfile(member))
        while unpacked.read(1 << 20):  # behind the last file: the end of the .xz is there, or it was cut off
            pass


def _tidied(content: bytes) -> bytes:
    """A document of OpenWebText; bytes that are not UTF-8 stay, to be named where they are decoded."""
    try:
        return _MANY_LINE_ENDS.sub("\n\n", content.decode("utf-8")).strip().encode("utf-8")
    except UnicodeDecodeError:
        return content


def _uncompressed(name: str, raw: BinaryIO) -> BinaryIO:
    if name.endswith(".gz"):
        return cast(BinaryIO, gzip.GzipFile(fileobj=raw))
    if name.endswith(".zst"):
        reader = zstandard.ZstdDecompressor(max_window_size=1 << 31).stream_reader(raw, read_across_frames=True)
        return cast(BinaryIO, io.BufferedReader(cast(io.RawIOBase, reader), 1 << 20))
    return raw
