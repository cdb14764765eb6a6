"""Which process writes what into a checkpoint: every value once, and about as much on each.

Data ranks without ZeRO hold the same, and so do the two pipeline stages that share a tied weight: they divide it. Data
ranks divide all tensors laid end to end, so that there are not many more parts than tensors, however many ranks there
are. What tensor ranks hold alike are vectors, which the first of them writes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from megatron.mpu import Layout
from megatron.mpu.collectives import gather_objects
from megatron.mpu.layout import Axis


class Ownership:
    """Ranges of parameters that this process writes. With a pipeline, making one is collective.

    Args:
        shapes: of the whole of each tensor that this process has a part of, the same on all ranks of its stage.
        layout: the grid.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], layout: Layout) -> None:
        self._layout = layout
        sizes = {name: math.prod(shape) for name, shape in shapes.items()}
        self._tied_shares = _tied_shares(gather_objects(sizes, layout.pipeline), layout.pipeline.rank)
        self._data_shares = _shares_of_a_line(
            {name: size * self._tied_share(name) for name, size in sizes.items()}, layout.data
        )

    def _tied_share(self, name: str) -> float:
        below, above = self._tied_shares.get(name, (0.0, 1.0))
        return above - below

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
        if not replicated:
            return first, last
        start, stop = (first + round(share * (last - first)) for share in self._data_shares[name])
        return start, stop

    def writes_buffer(self, name: str) -> bool:
        """Does this process write a buffer, which all ranks of its stage have?"""
        return self._layout.data.rank == self._layout.tensor.rank == 0 and self._tied_shares.get(name, (0.0,))[0] == 0.0


def _shares_of_a_line(sizes: Mapping[str, float], axis: Axis) -> dict[str, tuple[float, float]]:
    """Which fraction of each tensor is in this rank's part of them all, laid end to end and cut into equal parts."""
    length = sum(sizes.values())
    start, stop = length * axis.rank / axis.size, length * (axis.rank + 1) / axis.size
    shares, place = {}, 0.0
    for name, size in sizes.items():
        # The ends of neighbours' parts are the same number on both, and so are the rows that they are rounded to.
        low, high = (min(1.0, max(0.0, (end - place) / size)) if size else 0.0 for end in (start, stop))
        shares[name] = (low, high)
        place += size
    if axis.is_last:
        shares = {name: (low, 1.0) for name, (low, _) in shares.items()}
    return shares


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
