"""Copies of pieces in the host's memory, which a writer reads while training goes on."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor

from megatron.checkpoint.pieces import Piece


class HostBuffers:
    """Memory for one copy of what this process saves, used again by every save; page-locked where a GPU copies to it.

    Not more than one copy is in use at a time.
    """

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, str], Tensor] = {}

    @torch.no_grad()
    def copies(self, pieces: Iterable[Piece]) -> list[Piece]:
        """The pieces with their values of now. Returns once these are copied."""
        found = [replace(piece, tensor=self._copy(piece)) for piece in pieces]
        kept = {(piece.kind, piece.key) for piece in found}
        self._buffers = {key: buffer for key, buffer in self._buffers.items() if key in kept}
        if any(buffer.is_pinned() for buffer in self._buffers.values()):
            torch.cuda.current_stream().synchronize()
        return found

    def _copy(self, piece: Piece) -> Tensor:
        source, key = piece.tensor.detach(), (piece.kind, piece.key)
        buffer = self._buffers.get(key)
        if buffer is None or buffer.shape != source.shape or buffer.dtype != source.dtype:
            buffer = torch.empty(source.shape, dtype=source.dtype, pin_memory=source.is_cuda)
            self._buffers[key] = buffer
        return buffer.copy_(source, non_blocking=True)
