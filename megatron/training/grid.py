"""The grid as DeepSpeed asks for it (its `mpu` interface) where it does not build one itself."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch.distributed as dist

from megatron.mpu import Layout

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class DeepSpeedGrid:
    """Data and tensor axis of a layout without a pipeline. Every process makes one, since it makes process groups."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._data_group = layout.data_group or self._alone()
        self._tensor_group = layout.tensor_group or self._alone()

    def _alone(self) -> ProcessGroup:
        # DeepSpeed takes None for the world.
        return [dist.new_group([rank]) for rank in range(self._layout.world_size)][self._layout.rank]

    def get_model_parallel_rank(self) -> int:
        """Place on the tensor axis."""
        return self._layout.tensor_rank

    def get_model_parallel_world_size(self) -> int:
        """Length of the tensor axis."""
        return self._layout.tensor_size

    def get_model_parallel_group(self) -> ProcessGroup:
        """The processes that share this one's copy of the model."""
        return self._tensor_group

    def get_data_parallel_rank(self) -> int:
        """Place on the data axis."""
        return self._layout.data_rank

    def get_data_parallel_world_size(self) -> int:
        """Length of the data axis."""
        return self._layout.data_size

    def get_data_parallel_group(self) -> ProcessGroup:
        """The processes that hold the same share of the model."""
        return self._data_group
