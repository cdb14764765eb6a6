"""One way to run a configuration on a number of GPUs."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Choice:
    """A layout, a ZeRO stage, a division of the update into micro-batches, and whether blocks are recomputed."""

    tensor: int
    """Length of the tensor axis (t in formulas)."""
    pipeline: int
    """Number of pipeline stages (p in formulas)."""
    data: int
    """Length of the data axis (d in formulas)."""
    sequence_parallel: bool
    """Activations between the projections are sharded by tokens over the tensor axis."""
    zero_stage: int
    """DeepSpeed's ZeRO stage."""
    micro_batch: int
    """Samples of a micro-batch on one data rank."""
    accumulation: int
    """Micro-batches of an update (m in formulas)."""
    recompute: bool
    """Whether blocks are recomputed in the backward pass (checkpoint_activations)."""

    @property
    def gpus(self) -> int:
        """Number of processes."""
        return self.tensor * self.pipeline * self.data

    @property
    def samples(self) -> int:
        """Samples of one update."""
        return self.micro_batch * self.accumulation * self.data

    def overrides(self) -> dict[str, object]:
        """The configuration keys that ask for this choice."""
        return {
            "model_parallel_size": self.tensor,
            "sequence_parallel": self.sequence_parallel,
            "pipe_parallel_size": self.pipeline,
            "zero_optimization.stage": self.zero_stage,
            "train_micro_batch_size_per_gpu": self.micro_batch,
            "gradient_accumulation_steps": self.accumulation,
            "checkpoint_activations": self.recompute,
        }
