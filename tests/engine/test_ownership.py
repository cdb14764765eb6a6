"""Who writes what into a checkpoint."""

from __future__ import annotations

import math

import pytest

from megatron.engine.ownership import Ownership
from megatron.mpu import Layout


@pytest.mark.parametrize("data", [1, 2, 3, 7, 64])
def test_data_ranks_divide_what_they_hold_alike_into_few_parts(data: int) -> None:
    shapes = {"a": (50, 8), "norm": (8,), "b": (8, 30), "c": (1, 5), "none": (0, 4), "d": (400, 8)}
    owned: dict[str, list[tuple[int, int]]] = {name: [] for name in shapes}
    written = []
    for rank in range(data):
        ownership = Ownership(shapes, Layout.for_world(rank, data))
        mine = 0
        for name, (rows, *rest) in shapes.items():
            start, stop = ownership.rows(name, rows, math.prod(rest), sharded=False, replicated=True)
            if stop > start:
                owned[name].append((start, stop))
                mine += (stop - start) * math.prod(rest)
        written.append(mine)
    for name, (rows, *_) in shapes.items():
        ends = [0, *(stop for _, stop in owned[name])]
        assert [start for start, _ in owned[name]] == ends[:-1] and ends[-1] == rows, name
    assert sum(map(len, owned.values())) <= len(shapes) + data
    total = sum(map(math.prod, shapes.values()))
    assert max(written) <= total / data + 30, "a row more at each end"
