"""Weights that the ranks of an axis all need: each reads a part from the disk, and gets the others from its fellows."""

from __future__ import annotations

import math
from itertools import count

import torch
import torch.distributed as dist
from torch import Tensor

from megatron.checkpoint.tensors import Tensors, TensorView
from megatron.mpu.layout import Axis

_VALUES_A_PART, _MOST_PARTS = 1 << 16, 64
"""Values that are worth being read by another rank, and the parts that a tensor is read in at most."""


class ReadTogether(TensorView):
    """The weights of `source`, fp32. Asking for one is collective over `axis`, whose ranks all ask for the same.

    Args:
        source: where they are read from.
        axis: whose ranks each read some rows.
        device: what the ranks communicate through.
    """

    def __init__(self, source: Tensors, axis: Axis, device: torch.device) -> None:
        super().__init__(source)
        self._axis, self._device, self._turns = axis, device, count()

    def tensor(self, kind: str, name: str) -> Tensor:
        """A whole tensor, on the device or on the CPU."""
        return self.part(kind, name)

    def part(self, kind: str, name: str, *ranges: slice) -> Tensor:
        """A range of the first dimensions of a tensor, on the device or on the CPU."""
        shape = [len(range(size)[part]) for size, part in zip(self.shape(kind, name), ranges, strict=False)]
        shape += self.shape(kind, name)[len(ranges) :]
        parts = min(self._axis.size, _MOST_PARTS, math.prod(shape) // _VALUES_A_PART)
        if self._axis.group is None or parts == 0:
            return self.source.part(kind, name, *ranges)
        first = range(self.shape(kind, name)[0])[ranges[0] if ranges else slice(None)].start
        whole = torch.empty(shape, dtype=torch.float32, device=self._device)
        for part in range(parts):
            rows, reader = slice(*Axis(parts, part).share(shape[0])), next(self._turns) % self._axis.size
            if reader == self._axis.rank:
                there = slice(first + rows.start, first + rows.stop)
                whole[rows] = self.source.part(kind, name, there, *ranges[1:])
            if rows.stop > rows.start:
                dist.broadcast(whole[rows], group=self._axis.group, group_src=reader)
        return whole
