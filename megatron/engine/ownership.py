"""Which process writes what into a checkpoint: every value once, and about as much on each.

Data ranks without ZeRO hold the same, and so do the two pipeline stages that share a tied weight: they divide it. What
tensor ranks hold alike are vectors, which the first of them writes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from megatron.mpu import Layout
from megatron.mpu.collectives import gather_objects

_SMALL = 1 << 14
"""A tensor of fewer values is not divided."""


class Ownership:
    """Ranges of parameters that this process writes. With a pipeline, making one is collective.

    Args:
        shapes: of the whole of each tensor that this process has a part of, the same on all ranks of its stage.
        layout: the grid.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], layout: Layout) -> None:
        self._layout = layout
        self._numbers = {name: number for number, name in enumerate(shapes)}
        sizes = {name: math.prod(shape) for name, shape in shapes.items()}
        self._tied_shares = _tied_shares(gather_objects(sizes, layout.pipeline), layout.pipeline.rank)

    def rows(self, name: str, rows: int, row_size: int, sharded: bool, replicated: bool) -> tuple[int, int]:
        """[first, last) of the rows of this process's share of a tensor that it may write.

        Args:
            name: of the tensor.
            rows, row_size: those of its share, and the values of each.
            sharded: tensor ranks have different shares of it.
            replicated: the data ranks have the same values; else each has some of its own, and writes them.
        """
        if not sharded and self._layout.tensor.rank:
            return 0, 0
        below, above = self._tied_shares.get(name, (0.0, 1.0))
        first, last = round(below * rows), round(above * rows)
        data = self._layout.data
        if not replicated or data.size == 1:
            return first, last
        if rows * row_size < _SMALL:
            return (first, last) if self._numbers[name] % data.size == data.rank else (0, 0)
        start, stop = data.share(last - first)
        return first + start, first + stop

    def writes_buffer(self, name: str) -> bool:
        """Does this process write a buffer, which all ranks of its stage have?"""
        return self._layout.data.rank == self._layout.tensor.rank == 0 and self._tied_shares.get(name, (0.0,))[0] == 0.0


def _tied_shares(sizes: list[dict[str, int]], stage: int) -> dict[str, tuple[float, float]]:
    """Which fraction of each tensor that several pipeline stages have is written by `stage`.

    The first and the last of them divide it, so that both write as much as can be.
    """
    shares = {}
    for name, size in sizes[stage].items():
        holders = [number for number, of_stage in enumerate(sizes) if name in of_stage]
        if len(holders) > 1:
            early, late = holders[0], holders[-1]
            lead = sum(sizes[late].values()) - sum(sizes[early].values())
            cut = min(1.0, max(0.0, (size + lead) / (2 * size))) if size else 1.0
            shares[name] = (0.0, cut) if stage == early else (cut, 1.0) if stage == late else (0.0, 0.0)
    return shares
