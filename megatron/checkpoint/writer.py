"""Writes files of tensors: one pass over each part looks at its values, hashes its bytes and writes them.

Files of tensors are in the safetensors format: the length of a JSON header (uint64, little-endian), the header, padded
with blanks to a multiple of 8 bytes, and the tensors' bytes in the header's order.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import count, groupby
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from megatron.checkpoint.form import SAFETENSORS_DTYPES, dtype_name, value_fault
from megatron.checkpoint.pieces import Piece, coverage_fault
from megatron.checkpoint.state import TENSOR_KINDS
from megatron.errors import UserError

SHARD_BYTES = 2 * 1024**3
FLUSH_BYTES = 32 * 1024**2
_SMALL_BYTES = 64 * 1024


class BadValues(UserError):
    """A tensor to be saved has values that no run can go on from. The message names it and says what they are."""


class HashedFile:
    """A new file whose size and SHA-256 are known when it is closed; closing gets it onto the disk.

    A thread hashes what is being written meanwhile, and looks at its values: neither needs the interpreter. For a few
    bytes that takes less time than waking the thread. The disk is told to begin every FLUSH_BYTES: else it would wait
    for the end of the file, and training's own files would be pushed out of memory by one that nobody reads soon.
    """

    def __init__(self, path: Path) -> None:
        self._file: BinaryIO = path.open("xb", buffering=0)
        self._hash, self._size, self._flushed = hashlib.sha256(), 0, 0
        self._thread = ThreadPoolExecutor(1, "sha256")
        self._looked: Future[None] | None = None

    def write(self, content: bytes | memoryview, check: Callable[[], None] | None = None) -> None:
        """Append some bytes, which are to stay as they are until the next call or `close`.

        Args:
            check: looks at the bytes; what it raises is raised by this call, the next or `close`.
        """
        self._wait()
        if len(content) <= _SMALL_BYTES:
            self._look(content, check)
        else:
            self._looked = self._thread.submit(self._look, content, check)
        left = memoryview(content)
        while left:
            left = left[self._file.write(left) :]
        self._size += len(content)
        self._begin_flush()

    def _look(self, content: bytes | memoryview, check: Callable[[], None] | None) -> None:
        if check is not None:
            check()
        self._hash.update(content)

    def _wait(self) -> None:
        if self._looked is not None:
            self._looked.result()

    def _begin_flush(self) -> None:
        length = self._size - self._flushed
        if length >= FLUSH_BYTES and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._file.fileno(), self._flushed, length, os.POSIX_FADV_DONTNEED)
            self._flushed = self._size

    def close(self) -> dict[str, Any]:
        """What the manifest says about the file."""
        with self._file, self._thread:
            self._wait()
            os.fsync(self._file.fileno())
        return {"bytes": self._size, "sha256": self._hash.hexdigest()}


def write_text(path: Path, text: str) -> dict[str, Any]:
    """Write a small file; returns its entry in the manifest."""
    file = HashedFile(path)
    file.write(text.encode("utf-8"))
    return file.close()


@dataclass
class Part:
    """What one process has written of a checkpoint."""

    index: dict[str, dict[str, list[Any]]]
    """kind -> tensor -> [[[file, offset, size] of each of its parts], dtype, shape of the whole]."""
    files: dict[str, Any]
    """file -> {"bytes", "sha256"}."""


def write_pieces(folder: Path, pieces: Iterable[Piece], rank: int | None = None) -> Part:
    """Write pieces in files of about SHARD_BYTES, each of one kind.

    Args:
        rank: of this process, where several write; default this one writes all.

    Raises: BadValues, OSError.
    """
    part = Part({}, {})
    numbers = defaultdict[str, Iterator[int]](count)
    prefix = "" if rank is None else f"{rank:05d}-"
    for kind, of_kind in groupby(pieces, key=lambda piece: piece.kind):
        for shard in _shards(of_kind):
            file = f"{kind}-{prefix}{next(numbers[kind]):05d}.safetensors"
            part.files[file] = write_safetensors(folder / file, {p.key: p.tensor for p in shard}, kind)
            index = part.index.setdefault(kind, {})
            for piece in shard:
                entry = index.setdefault(piece.name, [[], dtype_name(piece.tensor), list(piece.shape)])
                entry[0].append([file, list(piece.offset), list(piece.tensor.shape)])
    return part


def merged(parts: Iterable[Part]) -> Part:
    """The parts of all processes as one. In its index, a tensor that is whole is just [file, dtype, shape].

    Raises: BadValues where the parts of a tensor are not all of it.
    """
    whole = Part({kind: {} for kind in TENSOR_KINDS}, {})
    for part in parts:
        whole.files |= part.files
        for kind, index in part.index.items():
            mine = whole.index.setdefault(kind, {})
            for name, (places, dtype, shape) in index.items():
                mine.setdefault(name, [[], dtype, shape])[0].extend(places)
    for kind, index in whole.index.items():
        for name, entry in index.items():
            places, _, shape = entry
            if fault := coverage_fault(shape, [(tuple(offset), tuple(size)) for _, offset, size in places]):
                raise BadValues(f"{name} ({kind}) {fault}")
            if len(places) == 1:
                entry[0] = places[0][0]
    return whole


def _shards(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    shard: list[Piece] = []
    size = 0
    for piece in pieces:
        shard.append(piece)
        size += piece.tensor.numel() * piece.tensor.element_size()
        if size >= SHARD_BYTES:
            yield shard
            shard, size = [], 0
    if shard:
        yield shard


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], kind: str = "") -> dict[str, Any]:
    """Write tensors as safetensors.torch.save_file does, to the byte; returns the file's entry in the manifest.

    Each is brought to the host when its turn comes. Raises: BadValues for what no tensor of this kind may hold.
    """
    # Wide elements first: each tensor then starts at a multiple of its element size.
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))
    header, start = {}, 0
    for name, tensor in ordered:
        end = start + tensor.numel() * tensor.element_size()
        dtype = SAFETENSORS_DTYPES[dtype_name(tensor)]
        header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    file = HashedFile(path)
    file.write(len(text).to_bytes(8, "little"))
    file.write(text)
    for name, tensor in ordered:
        tensor = tensor.detach().cpu().contiguous()
        if tensor.numel():
            file.write(tensor.reshape(-1).view(torch.uint8).numpy().data, partial(_refuse_bad, kind, name, tensor))
    return file.close()


def _refuse_bad(kind: str, name: str, tensor: Tensor) -> None:
    if fault := value_fault(kind, name, tensor):
        raise BadValues(f"{name} ({kind}) {fault}")
