"""Section `parallel`: how a model is spread over processes."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import ConfigDict, Field, model_validator

from megatron.config.sections.base import Section
from megatron.config.zero_keys import type_mistakes


class ZeroConfig(Section):
    """DeepSpeed's zero_optimization; keys beyond these are handed to DeepSpeed as they are."""

    model_config = ConfigDict(frozen=True, extra="allow")

    stage: Literal[0, 1, 2, 3] = 0
    """0: replicated; 1: optimizer states sharded over data ranks; 2: gradients too; 3: parameters too."""
    cpu_offload: bool | None = None
    """Old spelling of offload_optimizer {device: cpu}."""

    @model_validator(mode="before")
    @classmethod
    def _check_types(cls, values: Any) -> Any:
        for mistake in type_mistakes(values) if isinstance(values, dict) else ():
            raise mistake  # once it is mended, the next one
        return values


class ParallelConfig(Section):
    """How a model is spread over processes."""

    pipe_parallel_size: int = Field(default=0, ge=0, le=65_536)
    """Pipeline stages; 0 and 1 both mean no pipeline."""
    model_parallel_size: int = Field(default=1, gt=0, le=65_536)
    """Tensor-parallel ranks that share one layer."""
    sequence_parallel: bool = False
    """With model_parallel_size above 1: shard activations between the projections by tokens over the same ranks. Saves
    activation memory at the same communication volume."""
    zero_optimization: ZeroConfig = ZeroConfig()
    """DeepSpeed's ZeRO table, for example {stage: 1, reduce_bucket_size: 500000000}."""

    @property
    def pipeline_stages(self) -> int:
        """Number of pipeline stages, at least 1."""
        return max(1, self.pipe_parallel_size)
