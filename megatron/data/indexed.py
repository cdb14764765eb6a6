"""Memory-mapped token files: the .bin/.idx pair of Megatron (magic MMIDIDX, version 1).

`.idx`, little-endian: magic (9 bytes), version (uint64), dtype code (uint8), number of sequences n (uint64),
number of document boundaries d (uint64), sizes in tokens (int32 [n]), byte offsets into .bin (int64 [n]),
boundaries (int64 [d]; sequence numbers, first 0, last n; GPT-NeoX's merging leaves the first only). `.bin`: the token
ids of all sequences, back to back. `.sha256`: see megatron.data.checksum.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import struct
import weakref
from array import array
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from megatron.data.checksum import NoChecksumsError, checksum_path, compare, file_checksum, write_checksums
from megatron.errors import UserError
from megatron.files import find_regular_output, part_file, settle, write_errors
from megatron.log import get_logger

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
DTYPE_CODES: dict[int, type[np.integer]] = {
    1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16,
}  # fmt: skip
UINT16_VOCABULARY_LIMIT = 65500

_HEADER = struct.Struct("<9sQBQQ")
_REBUILD = "write the pair again with prepare_data.py, or copy both files again"
_CHECK_ROWS = 1 << 20
_COPY_BYTES = 1 << 24


def best_dtype(vocab_size: int) -> type[np.integer]:
    """uint16 while the vocabulary stays under 65,500 ids (Megatron's limit), else int32."""
    return np.uint16 if vocab_size < UINT16_VOCABULARY_LIMIT else np.int32


class IndexedDataset:
    """Read-only view of `{prefix}.bin` and `{prefix}.idx`; item i is sequence i as a 1-D array of ids.

    `tokens` are the ids of all sequences. Arrays are views into the map. The map is never closed by hand: it lives as
    long as any view of it does.
    Raises UserError when a file is missing, damaged, or does not belong to the other one.
    """

    def __init__(self, prefix: str | os.PathLike[str]) -> None:
        self.prefix = os.fspath(prefix)
        self.idx_path, self.bin_path = Path(f"{self.prefix}.idx"), Path(f"{self.prefix}.bin")
        try:
            for path in (self.idx_path, self.bin_path):
                if not path.is_file():
                    raise UserError(
                        f"{path}: no such file; data paths are the common part of a .bin/.idx pair, without the "
                        "suffix, as prepare_data.py writes it"
                    )
            self._read_index()
            self._check_sequences()
            self._check_documents()
            self._check_against_bin()
            self._check_checksum()
            self.tokens = _map(self.bin_path, self.dtype)
        except OSError as error:
            raise UserError(f"{error.filename or self.prefix}: cannot be read ({error.strerror}); {_REBUILD}") from None

    def _read_index(self) -> None:
        raw = _map(self.idx_path, np.dtype(np.uint8))
        if len(raw) < _HEADER.size:
            raise UserError(f"{self.idx_path}: truncated ({len(raw)} bytes); {_REBUILD}")
        magic, version, code, num_sequences, num_boundaries = _HEADER.unpack(raw[: _HEADER.size].tobytes())
        if magic != MAGIC:
            raise UserError(f"{self.idx_path}: not a Megatron .idx file (wrong magic bytes); {_REBUILD}")
        if version != VERSION or code not in DTYPE_CODES:
            raise UserError(
                f"{self.idx_path}: version {version} with dtype code {code} cannot be read, only version {VERSION} "
                f"with integer tokens; {_REBUILD}"
            )
        expected = _HEADER.size + 12 * num_sequences + 8 * num_boundaries
        if len(raw) != expected:
            state = "truncated" if len(raw) < expected else "damaged"
            raise UserError(f"{self.idx_path}: {state} ({len(raw)} bytes instead of {expected}); {_REBUILD}")
        ends = np.cumsum([_HEADER.size, 4 * num_sequences, 8 * num_sequences, 8 * num_boundaries])
        self.dtype = np.dtype(DTYPE_CODES[code])
        self.sizes: npt.NDArray[np.int32] = raw[ends[0] : ends[1]].view(np.int32)
        self._pointers: npt.NDArray[np.int64] = raw[ends[1] : ends[2]].view(np.int64)
        self.document_indices: npt.NDArray[np.int64] = raw[ends[2] : ends[3]].view(np.int64)

    def _check_sequences(self) -> None:
        """Each sequence must begin where the one before it ends."""
        end = 0
        for first in range(0, len(self.sizes), _CHECK_ROWS):
            sizes = self.sizes[first : first + _CHECK_ROWS]
            ends = end + np.cumsum(sizes, dtype=np.int64) * self.dtype.itemsize
            starts = np.concatenate([[end], ends[:-1]])
            wrong = np.flatnonzero((sizes < 0) | (self._pointers[first : first + _CHECK_ROWS] != starts))
            if len(wrong):
                raise UserError(
                    f"{self.idx_path}: damaged at sequence {first + wrong[0]} of {len(self)}, whose size or offset "
                    f"does not follow from those before; {_REBUILD}"
                )
            end = int(ends[-1])

    def _check_documents(self) -> None:
        """Boundaries must go from 0 to the last sequence; without any, each sequence is a document."""
        bounds = self.document_indices
        if len(bounds) == 1 and bounds[0] == 0:
            self.document_indices = np.arange(len(self) + 1)
        elif not len(bounds) or bounds[0] != 0 or bounds[-1] != len(self) or (bounds[1:] < bounds[:-1]).any():
            raise UserError(
                f"{self.idx_path}: damaged, its document boundaries do not lead from 0 to {len(self)}; {_REBUILD}"
            )

    def _check_against_bin(self) -> None:
        expected, actual = self.num_tokens * self.dtype.itemsize, self.bin_path.stat().st_size
        if actual != expected:
            raise UserError(
                f"{self.bin_path}: {actual} bytes, but {self.idx_path.name} describes {expected}; the two files do "
                f"not belong together or one is damaged: {_REBUILD}"
            )

    def _check_checksum(self) -> None:
        try:
            compare(self.prefix, ".idx", lambda: file_checksum(self.idx_path))
        except NoChecksumsError as error:
            get_logger().warning("%s; the pair is used unchecked", error)

    @property
    def num_tokens(self) -> int:
        """Tokens of all sequences together."""
        return int(self.sizes.sum(dtype=np.int64))

    def __len__(self) -> int:
        return len(self.sizes)

    def __getitem__(self, index: int) -> npt.NDArray[np.integer]:
        return self.get(index)

    def get(self, index: int, offset: int = 0, length: int | None = None) -> npt.NDArray[np.integer]:
        """`length` tokens of sequence `index` from token `offset` on (default: all the rest), cut at its end.

        Raises IndexError when there is no such sequence or the offset lies outside it.
        """
        size = int(self.sizes[index])
        if not 0 <= offset <= size:
            raise IndexError(f"offset {offset} is outside sequence {index} of {size} tokens")
        stop = size if length is None else min(size, offset + length)
        start = int(self._pointers[index]) // self.dtype.itemsize
        return self.tokens[start + offset : start + stop]

    def __reduce__(self) -> tuple[type[IndexedDataset], tuple[str]]:
        # A loader process that is not forked maps the files itself instead of receiving a copy of the corpus.
        return IndexedDataset, (self.prefix,)


def output_files(prefix: str) -> list[Path]:
    """The files that make up a pair and its checksums."""
    return [*(Path(f"{prefix}{suffix}") for suffix in (".bin", ".idx")), checksum_path(prefix)]


class IndexedDatasetBuilder:
    """Writes a .bin/.idx pair and its .sha256. Nothing appears under its final name before finalize().

    A context manager: leaving it by an exception, or dropping the builder, removes what was written. Links are
    followed. Raises UserError when the place cannot be written, or has something else than files.
    """

    def __init__(self, prefix: str | os.PathLike[str], dtype: npt.DTypeLike) -> None:
        self.prefix = os.fspath(prefix)
        self.dtype = np.dtype(dtype)
        self._code = next((code for code, known in DTYPE_CODES.items() if known == self.dtype), None)
        if self._code is None:
            raise ValueError(f"dtype {self.dtype} cannot be stored in a .bin file; use one of the integer types")
        self._sizes, self._boundaries = array("i"), array("q", [0])
        self._bin, self._idx, self._sums = (find_regular_output(path, "output") for path in output_files(self.prefix))
        self._digest = hashlib.sha256()
        with self._explained():
            self._file, self._part = part_file(self._bin)
        self._abort = weakref.finalize(self, _discard, self._file, self._part)

    @property
    def num_documents(self) -> int:
        """Documents added so far."""
        return len(self._boundaries) - 1

    def add_document(self, ids: Sequence[int] | npt.NDArray[np.integer]) -> None:
        """Append one document of one sequence. Raises UserError when an id does not fit the dtype."""
        self.add_sequences([ids])

    def add_sequences(self, sequences: Sequence[Sequence[int] | npt.NDArray[np.integer]]) -> None:
        """Append one document of these sequences. Raises UserError when an id does not fit the dtype."""
        for ids in sequences:
            self._add_sequence(ids)
        self._boundaries.append(len(self._sizes))

    def _add_sequence(self, ids: Sequence[int] | npt.NDArray[np.integer]) -> None:
        tokens = np.asarray(ids, dtype=self.dtype if len(ids) == 0 else None)
        limits = np.iinfo(self.dtype)
        if tokens.size and (tokens.min() < limits.min or tokens.max() > limits.max):
            raise UserError(
                f"{self.prefix}.bin: token ids {tokens.min()} to {tokens.max()} do not fit {self.dtype}; "
                "build it with the dtype of the tokenizer's vocabulary"
            )
        with self._explained():
            self._write(tokens.astype(self.dtype, copy=False).tobytes())
        self._sizes.append(tokens.size)

    def add_index(self, prefix: str | os.PathLike[str]) -> None:
        """Append all documents of another pair, boundaries kept, and compare its checksums.

        Raises UserError when the dtypes differ, the pair is damaged, or it is the one that is being written.
        """
        other = IndexedDataset(prefix)
        if other.dtype != self.dtype:
            raise UserError(f"{other.bin_path}: holds {other.dtype}, cannot be merged into {self.dtype} files")
        for path in output_files(self.prefix):
            find_regular_output(path, "output", [other.bin_path, other.idx_path])
        offset = len(self._sizes)
        self._copy(other)
        self._sizes.frombytes(other.sizes.tobytes())
        self._boundaries.frombytes((other.document_indices[1:] + offset).tobytes())

    def _copy(self, other: IndexedDataset) -> None:
        digest = hashlib.sha256()
        with self._explained(), other.bin_path.open("rb") as source:
            while block := source.read(_COPY_BYTES):
                digest.update(block)
                self._write(block)
        with contextlib.suppress(NoChecksumsError):  # opening it has said so
            compare(other.prefix, ".bin", digest.hexdigest)

    def _write(self, content: bytes) -> None:
        self._digest.update(content)
        self._file.write(content)

    def finalize(self) -> None:
        """Write the index and move the files to their final names."""
        with self._explained(), contextlib.ExitStack() as stack:
            stack.callback(self._abort)
            file, part = part_file(self._idx)
            stack.callback(_discard, file, part)
            index = self._index_bytes()
            file.write(index)
            settle(file, self._idx)
            settle(self._file, self._bin)
            # Gone first: it must never stand beside another pair than its own.
            self._sums.unlink(missing_ok=True)
            os.replace(self._part, self._bin)
            os.replace(part, self._idx)
            found = {".bin": self._digest.hexdigest(), ".idx": hashlib.sha256(index).hexdigest()}
            write_checksums(self._sums, self.prefix, found)

    def _explained(self) -> contextlib.AbstractContextManager[None]:
        return write_errors(f"{self.prefix}.bin", "the files there are as they were; free space and try again")

    def _index_bytes(self) -> bytes:
        sizes = np.frombuffer(self._sizes, dtype=np.int32) if self._sizes else np.empty(0, np.int32)
        pointers = np.zeros(len(sizes), dtype=np.int64)
        np.cumsum(sizes[:-1], dtype=np.int64, out=pointers[1:])
        pointers *= self.dtype.itemsize
        header = _HEADER.pack(MAGIC, VERSION, self._code, len(sizes), len(self._boundaries))
        return header + sizes.tobytes() + pointers.tobytes() + self._boundaries.tobytes()

    def __enter__(self) -> IndexedDatasetBuilder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._abort()


def _map(path: Path, dtype: np.dtype[np.integer]) -> npt.NDArray[np.integer]:
    # An empty file cannot be mapped.
    if path.stat().st_size < dtype.itemsize:
        return np.empty(0, dtype)
    # The plain-array view spares the bookkeeping of np.memmap at every slice; it keeps the map alive.
    return np.memmap(path, dtype=dtype, mode="r", shape=path.stat().st_size // dtype.itemsize).view(np.ndarray)


def _discard(file: BinaryIO, path: Path) -> None:
    with contextlib.suppress(OSError):
        file.close()
    path.unlink(missing_ok=True)
