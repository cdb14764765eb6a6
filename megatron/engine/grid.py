"""The grid as DeepSpeed asks for it (its `mpu` interface) where it does not build one itself, and its groups."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from megatron.mpu import Layout
from megatron.mpu.groups import process_group

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@contextmanager
def reused_groups(timeout: timedelta | None) -> Iterator[None]:
    """Inside, DeepSpeed builds an engine with the process groups that it made for an earlier one of this process.

    It does not say what it wants a group for, but asks in the same order each time: the k-th group of some ranks is the
    k-th of an earlier engine. What is asked for within one engine is never the same group twice. Their collectives wait
    for `timeout`, as those of our own groups; DeepSpeed would leave them the backend's default.
    """
    from deepspeed.comm.torch import TorchBackend
    from deepspeed.utils import groups

    # Asked for once a process and kept: as if it were not there, so that it is counted each time.
    groups._WORLD_GROUP = None
    asked: Counter[tuple[int, ...]] = Counter()
    original = TorchBackend.new_group

    def new_group(_: Any, ranks: Iterable[int]) -> ProcessGroup:
        members = tuple(sorted(ranks))
        asked[members] += 1
        return process_group(f"DeepSpeed {asked[members]}", members, timeout)

    TorchBackend.new_group = new_group
    try:
        yield
    finally:
        TorchBackend.new_group = original


class DeepSpeedGrid:
    """Data and tensor axis of a layout without a pipeline. Every process makes one, since it asks for groups."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._data_group = layout.data.group or self._alone()
        self._tensor_group = layout.tensor.group or self._alone()

    @classmethod
    def of(cls, layout: Layout) -> DeepSpeedGrid | None:
        """The grid that DeepSpeed is told of; None where a PipelineModule tells it, or it is data ranks only."""
        return cls(layout) if layout.tensor.size > 1 and layout.pipeline.size == 1 else None

    def _alone(self) -> ProcessGroup:
        # DeepSpeed takes None for the world.
        return [process_group("alone", [rank]) for rank in range(self._layout.world_size)][self._layout.rank]

    def get_model_parallel_rank(self) -> int:
        """Place on the tensor axis."""
        return self._layout.tensor.rank

    def get_model_parallel_world_size(self) -> int:
        """Length of the tensor axis."""
        return self._layout.tensor.size

    def get_model_parallel_group(self) -> ProcessGroup:
        """The processes that share this one's copy of the model."""
        return self._tensor_group

    def get_data_parallel_rank(self) -> int:
        """Place on the data axis."""
        return self._layout.data.rank

    def get_data_parallel_world_size(self) -> int:
        """Length of the data axis."""
        return self._layout.data.size

    def get_data_parallel_group(self) -> ProcessGroup:
        """The processes that hold the same share of the model."""
        return self._data_group
