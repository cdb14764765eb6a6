"""Memory-mapped token files: the .bin/.idx pair of Megatron (magic MMIDIDX, version 1).

`.idx`, little-endian: magic (9 bytes), version (uint64), dtype code (uint8), number of sequences n (uint64),
number of document boundaries d (uint64), sizes in tokens (int32 [n]), byte offsets into .bin (int64 [n]),
boundaries (int64 [d]; sequence numbers, first 0, last n). `.bin`: the token ids of all sequences, back to back.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import struct
import weakref
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from megatron.errors import UserError

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
DTYPE_CODES: dict[int, type[np.integer]] = {
    1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16,
}  # fmt: skip
UINT16_VOCABULARY_LIMIT = 65500

_HEADER = struct.Struct("<9sQBQQ")
_REBUILD = "write the pair again with prepare_data.py, or copy both files again"


def best_dtype(vocab_size: int) -> type[np.integer]:
    """uint16 while the vocabulary stays under 65,500 ids (Megatron's limit), else int32."""
    return np.uint16 if vocab_size < UINT16_VOCABULARY_LIMIT else np.int32


class IndexedDataset:
    """Read-only view of `{prefix}.bin` and `{prefix}.idx`; item i is sequence i as a 1-D array of ids.

    Arrays are views into the map. The map is never closed by hand: it lives as long as any view of it does.
    Raises UserError when a file is missing, damaged, or does not belong to the other one.
    """

    def __init__(self, prefix: str | os.PathLike[str]) -> None:
        self.prefix = os.fspath(prefix)
        self.idx_path, self.bin_path = Path(f"{self.prefix}.idx"), Path(f"{self.prefix}.bin")
        for path in (self.idx_path, self.bin_path):
            if not path.is_file():
                raise UserError(
                    f"{path}: no such file; data paths are the common part of a .bin/.idx pair, without the "
                    "suffix, as prepare_data.py writes it"
                )
        self._read_index()
        self._check_against_bin()
        self._tokens = _map(self.bin_path, self.dtype)

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

    def _check_against_bin(self) -> None:
        expected, actual = self.num_tokens * self.dtype.itemsize, self.bin_path.stat().st_size
        last_end = int(self._pointers[-1]) + int(self.sizes[-1]) * self.dtype.itemsize if len(self) else 0
        if actual != expected or last_end != expected:
            raise UserError(
                f"{self.bin_path}: {actual} bytes, but {self.idx_path.name} describes {expected}; the two files do "
                f"not belong together or one is damaged: {_REBUILD}"
            )

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
        return self._tokens[start + offset : start + stop]

    def __reduce__(self) -> tuple[type[IndexedDataset], tuple[str]]:
        # A loader process that is not forked maps the files itself instead of receiving a copy of the corpus.
        return IndexedDataset, (self.prefix,)


class IndexedDatasetBuilder:
    """Writes a .bin/.idx pair. Nothing appears under its final name before finalize().

    A context manager: leaving it by an exception, or dropping the builder, removes what was written. Raises
    UserError when the place cannot be written.
    """

    def __init__(self, prefix: str | os.PathLike[str], dtype: npt.DTypeLike) -> None:
        self.prefix = os.fspath(prefix)
        self.dtype = np.dtype(dtype)
        self._code = next((code for code, known in DTYPE_CODES.items() if known == self.dtype), None)
        if self._code is None:
            raise ValueError(f"dtype {self.dtype} cannot be stored in a .bin file; use one of the integer types")
        self._sizes, self._boundaries = array("i"), array("q", [0])
        self._part = Path(f"{self.prefix}.bin.part{os.getpid()}")
        try:
            self._part.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._part.open("wb")
        except OSError as error:
            raise UserError(f"{self.prefix}.bin: cannot be written ({error.strerror}); choose another place") from None
        self._abort = weakref.finalize(self, _discard, self._file, self._part)

    @property
    def num_documents(self) -> int:
        """Documents added so far."""
        return len(self._boundaries) - 1

    def add_document(self, ids: Sequence[int] | npt.NDArray[np.integer]) -> None:
        """Append one document of one sequence. Raises UserError when an id does not fit the dtype."""
        tokens = np.asarray(ids, dtype=self.dtype if len(ids) == 0 else None)
        limits = np.iinfo(self.dtype)
        if tokens.size and (tokens.min() < limits.min or tokens.max() > limits.max):
            raise UserError(
                f"{self.prefix}.bin: token ids {tokens.min()} to {tokens.max()} do not fit {self.dtype}; "
                "build it with the dtype of the tokenizer's vocabulary"
            )
        with self._explained():
            self._file.write(tokens.astype(self.dtype, copy=False).tobytes())
        self._sizes.append(tokens.size)
        self._boundaries.append(len(self._sizes))

    def add_index(self, prefix: str | os.PathLike[str]) -> None:
        """Append all documents of another pair, boundaries kept. Raises UserError when the dtypes differ."""
        other = IndexedDataset(prefix)
        if other.dtype != self.dtype:
            raise UserError(f"{other.bin_path}: holds {other.dtype}, cannot be merged into {self.dtype} files")
        offset = len(self._sizes)
        with self._explained(), other.bin_path.open("rb") as source:
            shutil.copyfileobj(source, self._file, 1 << 24)
        self._sizes.frombytes(other.sizes.tobytes())
        self._boundaries.frombytes((other.document_indices[1:] + offset).tobytes())

    def finalize(self) -> None:
        """Write the index and move both files to their final names."""
        idx_part = self._part.with_name(self._part.name.replace(".bin.part", ".idx.part"))
        try:
            with self._explained():
                with idx_part.open("wb") as file:
                    file.write(self._index_bytes())
                    _flush_to_disk(file)
                _flush_to_disk(self._file)
                self._file.close()
                os.replace(self._part, f"{self.prefix}.bin")
                os.replace(idx_part, f"{self.prefix}.idx")
        finally:
            idx_part.unlink(missing_ok=True)
            self._abort()

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(
                f"{self.prefix}.bin: cannot be written ({error.strerror}); nothing was left there, free space and "
                "try again"
            ) from error

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


def _flush_to_disk(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _discard(file: BinaryIO, path: Path) -> None:
    with contextlib.suppress(OSError):
        file.close()
    path.unlink(missing_ok=True)
