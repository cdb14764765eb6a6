"""The process grid: three axes (data, pipeline, tensor), built once and passed in.

Ranks are ordered as in Megatron-LM: the tensor axis is innermost, then data, then pipeline.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Layout:
    """This process's place in the grid. `Layout()` is a single process and needs no process group."""

    rank: int = 0
    data_size: int = 1
    pipeline_size: int = 1
    tensor_size: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world_size:
            raise ValueError(f"rank {self.rank} is outside a grid of {self.world_size} processes")

    @classmethod
    def for_world(cls, rank: int, world_size: int, pipeline_size: int = 1, tensor_size: int = 1) -> Layout:
        """The grid of `world_size` processes; ValueError when the model axes do not divide it."""
        model_size = pipeline_size * tensor_size
        if world_size % model_size:
            raise ValueError(
                f"{world_size} processes cannot hold pipe_parallel_size {pipeline_size} x "
                f"model_parallel_size {tensor_size}; start a multiple of {model_size}"
            )
        return cls(rank, world_size // model_size, pipeline_size, tensor_size)

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
