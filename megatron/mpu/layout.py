"""The process grid: three axes (data, pipeline, tensor), built once and passed in.

Ranks are ordered as in Megatron-LM: the tensor axis is innermost, then data, then pipeline. Sequence parallelism has
no axis of its own: it shards activations over the tensor axis.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class Layout:
    """This process's place in the grid. `Layout()` is a single process and needs no process group.

    Attributes:
        rank: this process, 0 <= rank < world_size.
        data_size, pipeline_size, tensor_size: length of each axis.
        sequence_parallel: between the projections, activations are sharded by tokens over the tensor axis.
        tensor_group, data_group, pipeline_group: the processes that differ from this one on one axis only.
        replica_group: those that hold one copy of the model (pipeline x tensor). All are None until `connect`, and for
            an axis of one.
    """

    rank: int = 0
    data_size: int = 1
    pipeline_size: int = 1
    tensor_size: int = 1
    sequence_parallel: bool = False
    tensor_group: ProcessGroup | None = field(default=None, compare=False, repr=False)
    data_group: ProcessGroup | None = field(default=None, compare=False, repr=False)
    pipeline_group: ProcessGroup | None = field(default=None, compare=False, repr=False)
    replica_group: ProcessGroup | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world_size:
            raise ValueError(f"rank {self.rank} is outside a grid of {self.world_size} processes")

    @classmethod
    def for_world(
        cls,
        rank: int,
        world_size: int,
        pipeline_size: int = 1,
        tensor_size: int = 1,
        sequence_parallel: bool = False,
    ) -> Layout:
        """The grid of `world_size` processes; ValueError when the model axes do not divide it."""
        model_size = pipeline_size * tensor_size
        if world_size % model_size:
            count = "1 process" if world_size == 1 else f"{world_size} processes"
            raise ValueError(
                f"{count} cannot hold pipe_parallel_size {pipeline_size} x "
                f"model_parallel_size {tensor_size}; start a multiple of {model_size}"
            )
        return cls(rank, world_size // model_size, pipeline_size, tensor_size, sequence_parallel and tensor_size > 1)

    def connect(self, timeout: timedelta | None = None) -> Layout:
        """This layout with its process groups, which are those of an earlier call where there was one. Collective.

        Args:
            timeout: how long a collective waits for a rank; default that of the backend.
        """
        grid = replace(
            self,
            tensor_group=self._group("tensor", lambda place: (place.pipeline_rank, place.data_rank), timeout),
            data_group=self._group("data", lambda place: (place.pipeline_rank, place.tensor_rank), timeout),
            pipeline_group=self._group("pipeline", lambda place: (place.data_rank, place.tensor_rank), timeout),
        )
        if 1 in (self.pipeline_size, self.tensor_size):
            return replace(grid, replica_group=grid.tensor_group or grid.pipeline_group)
        return replace(grid, replica_group=self._group("replica", lambda place: place.data_rank, timeout))

    def _group(self, role: str, key: Callable[[Layout], object], timeout: timedelta | None) -> ProcessGroup | None:
        """The group of the ranks whose key is this rank's. All groups are made on all ranks, as torch demands."""
        import torch.distributed as dist

        from megatron.mpu.groups import process_group

        members: dict[object, list[int]] = {}
        for rank in range(self.world_size):
            members.setdefault(key(replace(self, rank=rank)), []).append(rank)
        if len(members) == self.world_size:
            return None
        if len(members) == 1:
            return dist.group.WORLD
        groups = {place: process_group(role, ranks, timeout) for place, ranks in members.items()}
        return groups[key(self)]

    @property
    def world_size(self) -> int:
        """Number of processes."""
        return self.data_size * self.pipeline_size * self.tensor_size

    @property
    def tensor_rank(self) -> int:
        """Place on the tensor axis."""
        return self.rank % self.tensor_size

    @property
    def data_rank(self) -> int:
        """Place on the data axis."""
        return self.rank // self.tensor_size % self.data_size

    @property
    def pipeline_rank(self) -> int:
        """Place on the pipeline axis: the stage."""
        return self.rank // (self.tensor_size * self.data_size)

    @property
    def is_last_stage(self) -> bool:
        """Does this process hold the end of the model?"""
        return self.pipeline_rank == self.pipeline_size - 1

    def share(self, size: int) -> tuple[int, int]:
        """[start, stop) of `size` items that belong to this tensor rank; shares differ by one item at most."""
        return size * self.tensor_rank // self.tensor_size, size * (self.tensor_rank + 1) // self.tensor_size


SINGLE = Layout()
"""The layout of one process."""
