"""Weights that the ranks of an axis all need: each reads a part from the disk, and gets the others from its fellows."""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor

from megatron.checkpoint.tensors import Tensors, TensorView
from megatron.mpu.layout import Axis

_SMALL = 1 << 14
"""A tensor of fewer values is read by every rank."""


class ReadTogether(TensorView):
    """The weights of `source`. Asking for one is collective over `axis`, whose ranks all ask for the same.

    Args:
        source: where they are read from.
        axis: whose ranks each read some rows.
        device: what the ranks communicate through.
    """

    def __init__(self, source: Tensors, axis: Axis, device: torch.device) -> None:
        super().__init__(source)
        self._axis, self._device = axis, device

    def tensor(self, kind: str, name: str) -> Tensor:
        """A whole tensor, on the device or on the CPU."""
        return self.part(kind, name)

    def part(self, kind: str, name: str, *ranges: slice) -> Tensor:
        """A range of the first dimensions of a tensor, on the device or on the CPU."""
        shape = [len(range(size)[part]) for size, part in zip(self.shape(kind, name), ranges, strict=False)]
        shape += self.shape(kind, name)[len(ranges) :]
        if self._axis.group is None or math.prod(shape) < _SMALL:
            return self.source.part(kind, name, *ranges)
        first = range(self.shape(kind, name)[0])[ranges[0] if ranges else slice(None)].start
        start, stop = self._axis.share(shape[0])
        mine = self.source.part(kind, name, slice(first + start, first + stop), *ranges[1:])
        whole = torch.empty(shape, dtype=mine.dtype, device=self._device)
        whole[start:stop] = mine
        for rank in range(self._axis.size):
            rows = slice(*Axis(self._axis.size, rank).share(shape[0]))
            if rows.stop > rows.start:
                dist.broadcast(whole[rows], group=self._axis.group, group_src=rank)
        return whole
