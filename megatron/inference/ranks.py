"""Evaluation over several processes: each, or each group of tensor ranks, has the model and does part of the work."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch.distributed as dist

from megatron.mpu import Layout

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class DataRanks:
    """This process among those that share the work; `DataRanks()` is alone and needs no process group.

    Every method is called by all ranks, with the same arguments, and gives all of them the same result.
    """

    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None
    """The processes of the ranks; None means all."""
    reports: bool = True
    """Whether this process is the one that prints and writes files."""

    @classmethod
    def of_world(cls) -> DataRanks:
        """All processes of the process group, or one alone without a group."""
        if not dist.is_initialized():
            return cls()
        return cls(dist.get_rank(), dist.get_world_size(), reports=dist.get_rank() == 0)

    @classmethod
    def of_layout(cls, layout: Layout) -> DataRanks:
        """The data axis of a connected layout; tensor ranks do the same work together."""
        return cls(layout.data.rank, layout.data.size, layout.data.group, layout.rank == 0)

    def compute(
        self,
        items: Sequence[Item],
        length: Callable[[Item], int],
        function: Callable[[list[Item]], list[Result]],
    ) -> list[Result]:
        """Results of all items in order; `function` computes this rank's share of them.

        Items are dealt by length, like cards, so that all ranks have about the same to do.
        """
        order = sorted(range(len(items)), key=lambda i: -length(items[i]))
        mine = order[self.rank :: self.size]
        results = dict(zip(mine, function([items[i] for i in mine]), strict=True))
        for part in self.gather(results):
            results.update(part)
        return [results[i] for i in range(len(items))]

    def gather(self, value: Item) -> list[Item]:
        """The value of every rank, by rank."""
        if self.size == 1:
            return [value]
        values: list[Item] = [value] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def sums(self, values: Sequence[float]) -> list[float]:
        """Each value summed over the ranks."""
        return [sum(column) for column in zip(*self.gather(list(values)), strict=True)]


def agree(value: Item, layout: Layout) -> Item:
    """The first tensor rank's value, on all of them: they compute together what was typed, drawn or read there."""
    if layout.tensor.size == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, group=layout.tensor.group, group_src=0)
    return box[0]
