"""Writes the files of a checkpoint: one pass over each tensor looks at its values, hashes its bytes and writes them.

Files of tensors are in the safetensors format: the length of a JSON header (uint64, little-endian), the header, padded
with blanks to a multiple of 8 bytes, and the tensors' bytes in the header's order.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from itertools import count, groupby
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from megatron.checkpoint.form import SAFETENSORS_DTYPES, dtype_name, value_fault
from megatron.checkpoint.state import TENSOR_KINDS, Piece
from megatron.errors import UserError

SHARD_BYTES = 2 * 1024**3


class BadValues(UserError):
    """A tensor to be saved has values that no run can go on from. The message names it and says what they are."""


class HashedFile:
    """A new file whose size and SHA-256 are known when it is closed; closing gets it onto the disk."""

    def __init__(self, path: Path) -> None:
        self._file: BinaryIO = path.open("xb")
        self._hash, self._size = hashlib.sha256(), 0

    def write(self, content: bytes | memoryview) -> None:
        """Append some bytes."""
        self._hash.update(content)
        self._file.write(content)
        self._size += len(content)

    def close(self) -> dict[str, Any]:
        """What the manifest says about the file."""
        with self._file:
            self._file.flush()
            os.fsync(self._file.fileno())
        return {"bytes": self._size, "sha256": self._hash.hexdigest()}


def write_text(path: Path, text: str) -> dict[str, Any]:
    """Write a small file; returns its entry in the manifest."""
    file = HashedFile(path)
    file.write(text.encode("utf-8"))
    return file.close()


def write_tensors(folder: Path, pieces: Iterable[Piece]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Write tensors in files of about SHARD_BYTES, each of one kind.

    Returns: the manifest's index {kind: {name: [file, dtype, shape]}} and its entries of the files. Raises BadValues.
    """
    index: dict[str, dict[str, Any]] = {kind: {} for kind in TENSOR_KINDS}
    files: dict[str, Any] = {}
    numbers = defaultdict[str, Iterator[int]](count)
    for kind, tensors in groupby(_put_together(pieces), key=lambda found: found[0]):
        for shard in _shards(tensors):
            file = f"{kind}-{next(numbers[kind]):05d}.safetensors"
            files[file] = write_safetensors(folder / file, shard)
            entries = {name: [file, dtype_name(tensor), list(tensor.shape)] for name, tensor in shard.items()}
            index.setdefault(kind, {}).update(entries)
    return index, files


def _put_together(pieces: Iterable[Piece]) -> Iterator[tuple[str, str, Tensor]]:
    """(kind, name, whole tensor) of each once all of its pieces have come. Raises BadValues where some do not."""
    begun: dict[tuple[str, str], tuple[Tensor, int]] = {}
    for piece in pieces:
        key = piece.kind, piece.name
        if piece.is_whole:
            yield *key, piece.tensor
            continue
        if key not in begun:
            begun[key] = torch.empty(piece.shape, dtype=piece.tensor.dtype), 0
        whole, filled = begun.pop(key)
        whole[piece.ranges] = piece.tensor.detach()
        filled += piece.tensor.numel()
        if filled < whole.numel():
            begun[key] = whole, filled
        else:
            yield *key, whole
    for (kind, name), (whole, filled) in begun.items():
        raise BadValues(f"{name} ({kind}) has {filled:,} of its {whole.numel():,} values only")


def _shards(tensors: Iterable[tuple[str, str, Tensor]]) -> Iterator[dict[str, Tensor]]:
    shard: dict[str, Tensor] = {}
    size = 0
    for kind, name, tensor in tensors:
        if fault := value_fault(kind, name, tensor):
            raise BadValues(f"{name} ({kind}) {fault}")
        shard[name] = tensor.detach().cpu().contiguous()
        size += tensor.numel() * tensor.element_size()
        if size >= SHARD_BYTES:
            yield shard
            shard, size = {}, 0
    if shard:
        yield shard


def write_safetensors(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Write CPU tensors as safetensors.torch.save_file does, to the byte; returns the file's entry in the manifest."""
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
    for _, tensor in ordered:
        if tensor.numel():
            file.write(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return file.close()
