"""How much an update reads, from the three batch keys and the number of data ranks."""

from __future__ import annotations

from dataclasses import dataclass

from megatron.errors import UserError


@dataclass(frozen=True)
class UpdateSize:
    """What one update reads."""

    micro: int
    """Samples that a process computes at once."""
    steps: int
    """Passes whose gradients a process adds up."""
    samples: int
    """Samples of all processes and passes together."""
    tokens: int
    """The same in tokens."""

    @classmethod
    def of(cls, micro: int | None, steps: int | None, total: int | None, data_ranks: int, length: int) -> UpdateSize:
        """The size for the keys train_micro_batch_size_per_gpu, gradient_accumulation_steps and train_batch_size.

        Args:
            data_ranks: processes that read samples of their own.
            length: tokens of a sample.

        Raises: UserError when the keys do not fit each other.
        """
        micro, steps = _resolved(micro, steps, total, data_ranks)
        return cls(micro, steps, micro * steps * data_ranks, micro * steps * data_ranks * length)


def _resolved(micro: int | None, steps: int | None, total: int | None, data_ranks: int) -> tuple[int, int]:
    if total is None:
        if micro is None:
            raise UserError("train_micro_batch_size_per_gpu: missing; give it or train_batch_size")
        return micro, steps or 1
    if micro is None:
        micro = total // (data_ranks * (steps or 1))
    if steps is None:
        steps = total // max(1, micro * data_ranks)
    if not micro or not steps or micro * steps * data_ranks != total:
        raise UserError(
            f"train_batch_size: {total} is not micro-batch {micro} x accumulation {steps} x "
            f"{data_ranks} data-parallel processes; change one of them"
        )
    return micro, steps
