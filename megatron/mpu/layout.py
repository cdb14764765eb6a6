"""The process grid: three axes (data, pipeline, tensor), built once and passed in.

Ranks are ordered as in Megatron-LM: the tensor axis is innermost, then data, then pipeline. Sequence parallelism has
no axis of its own: it shards activations over the tensor axis.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from datetime import timedelta
from math import prod
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class Axis:
    """Processes that share something, and this one's place among them. `Axis()` is this process alone."""

    size: int = 1
    """Number of processes."""
    rank: int = 0
    """The place of this process, 0 <= rank < size."""
    group: ProcessGroup | None = field(default=None, compare=False, repr=False)
    """What they communicate through; None until `Layout.connect`, and for an axis of one."""

    @property
    def is_last(self) -> bool:
        """Is this process the last one of the axis?"""
        return self.rank == self.size - 1

    def share(self, size: int) -> tuple[int, int]:
        """[start, stop) of `size` items that belong to this rank; shares differ by one item at most."""
        return size * self.rank // self.size, size * (self.rank + 1) // self.size


ALONE = Axis()
"""The axis of one process, on which collectives give back what they are given."""

_AXES = ("tensor", "data", "pipeline")  # innermost first
_MODEL_AXES = ("tensor", "pipeline")  # along which one copy of the model is divided


@dataclass(frozen=True)
class Layout:
    """This process's place in the grid. `Layout()` is a single process and needs no process group."""

    rank: int = 0
    """The place of this process, 0 <= rank < world_size."""
    tensor: Axis = ALONE
    """The processes that differ from this one on the tensor axis only."""
    data: Axis = ALONE
    """The same of the data axis."""
    pipeline: Axis = ALONE
    """The same of the pipeline axis."""
    replica: Axis = ALONE
    """The processes that hold one copy of the model, on the tensor and the pipeline axis."""
    sequence_parallel: bool = False
    """Between the projections, activations are sharded by tokens over the tensor axis."""
    timeout: timedelta | None = field(default=None, compare=False, repr=False)
    """How long a collective waits for a rank; None: as long as the backend has it."""

    @classmethod
    def for_world(
        cls,
        rank: int,
        world_size: int,
        pipeline_size: int = 1,
        tensor_size: int = 1,
        sequence_parallel: bool = False,
    ) -> Layout:
        """The grid of `world_size` processes; ValueError where the model axes do not divide it."""
        model_size = pipeline_size * tensor_size
        if world_size % model_size:
            count = "1 process" if world_size == 1 else f"{world_size} processes"
            raise ValueError(
                f"{count} cannot hold pipe_parallel_size {pipeline_size} x "
                f"model_parallel_size {tensor_size}; start a multiple of {model_size}"
            )
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} is outside a grid of {world_size} processes")
        sizes = {"tensor": tensor_size, "data": world_size // model_size, "pipeline": pipeline_size}
        axes = {name: Axis(sizes[name], place) for name, place in _places(rank, sizes).items()}
        replica = Axis(model_size, axes["tensor"].rank + tensor_size * axes["pipeline"].rank)
        is_sequence_parallel = sequence_parallel and tensor_size > 1
        return cls(
            rank, axes["tensor"], axes["data"], axes["pipeline"], replica, sequence_parallel=is_sequence_parallel
        )

    def connect(self, timeout: timedelta | None = None) -> Layout:
        """This layout with its process groups, which are those of an earlier call where there was one. Collective.

        Args:
            timeout: how long a collective waits for a rank; default that of the backend.
        """
        tensor, data, pipeline = (self._connected(name, [name], timeout) for name in _AXES)
        longer = [axis for axis in (tensor, pipeline) if axis.size > 1]
        group = longer[0].group if len(longer) == 1 else self._connected("replica", _MODEL_AXES, timeout).group
        replica = replace(self.replica, group=group)
        return replace(self, tensor=tensor, data=data, pipeline=pipeline, replica=replica, timeout=timeout)

    def _connected(self, role: str, along: Iterable[str], timeout: timedelta | None) -> Axis:
        """The axis `role` with the group of the processes that differ on the axes `along` only.

        All groups are made on all ranks, as torch demands.
        """
        import torch.distributed as dist

        from megatron.mpu.groups import process_group

        axis: Axis = getattr(self, role)
        if axis.size == 1:
            return axis
        if axis.size == self.world_size:
            return replace(axis, group=dist.group.WORLD)
        sizes = {name: getattr(self, name).size for name in _AXES}
        members: dict[tuple[int, ...], list[int]] = {}
        for rank in range(self.world_size):
            places = _places(rank, sizes)
            members.setdefault(tuple(places[name] for name in _AXES if name not in along), []).append(rank)
        groups = [(ranks, process_group(role, ranks, timeout)) for ranks in members.values()]
        return replace(axis, group=next(group for ranks, group in groups if self.rank in ranks))

    @property
    def world(self) -> Axis:
        """All processes of the grid."""
        if self.world_size == 1:
            return ALONE
        import torch.distributed as dist

        return Axis(self.world_size, self.rank, dist.group.WORLD)

    @property
    def world_size(self) -> int:
        """Number of processes."""
        return prod(getattr(self, name).size for name in _AXES)


def _places(rank: int, sizes: dict[str, int]) -> dict[str, int]:
    """Where a rank stands on each axis."""
    places = {}
    for name in _AXES:
        rank, places[name] = divmod(rank, sizes[name])
    return places


SINGLE = Layout()
"""The layout of one process."""
