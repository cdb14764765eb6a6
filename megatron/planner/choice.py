"""One way to run a configuration on a number of GPUs."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Choice:
    """A layout, a ZeRO stage, a division of the update into micro-batches, and whether blocks are recomputed.

    Attributes:
        tensor, pipeline, data: lengths of the axes (t, p, d in formulas).
        sequence_parallel: activations between the projections are sharded by tokens over the tensor axis.
        zero_stage: DeepSpeed's ZeRO stage.
        micro_batch: samples of a micro-batch on one data rank.
        accumulation: micro-batches of an update (m in formulas).
        recompute: checkpoint_activations.
    """

    tensor: int
    pipeline: int
    data: int
    sequence_parallel: bool
    zero_stage: int
    micro_batch: int
    accumulation: int
    recompute: bool

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
