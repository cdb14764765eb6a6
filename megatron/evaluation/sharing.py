"""Work that processes share: each has the model and computes a part of the items."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from megatron.mpu import Axis
from megatron.mpu.collectives import gather_objects

Item = TypeVar("Item")
Result = TypeVar("Result")


def shared(
    items: Sequence[Item], length: Callable[[Item], int], compute: Callable[[list[Item]], list[Result]], axis: Axis
) -> list[Result]:
    """The results of all items, in their order, on every rank of `axis`; `compute` is called with this rank's part.

    Items are dealt by length, like cards, so that all ranks have about the same to do. Collective.
    """
    order = sorted(range(len(items)), key=lambda i: -length(items[i]))
    mine = order[axis.rank :: axis.size]
    results: dict[int, Result] = {}
    for part in gather_objects(dict(zip(mine, compute([items[i] for i in mine]), strict=True)), axis):
        results.update(part)
    return [results[i] for i in range(len(items))]
