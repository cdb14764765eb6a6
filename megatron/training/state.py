"""TrainState: everything about a run that is neither weights, moments nor random numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any


@dataclass
class TrainState:
    """Progress of a run; saved in every checkpoint as train_state.json.

    megatron.checkpoint.form checks what is read; a field added here is added there.
    """

    iteration: int = 0
    """Finished iterations, skipped updates included."""
    skipped_iterations: int = 0
    """Updates that fp16 loss scaling skipped; the schedule does not count them."""
    left_out_iterations: int = 0
    """Iterations without an update for a spike's or skip_iterations' sake; the schedule counts them."""
    consumed_samples: int = 0
    """Training samples read so far."""
    consumed_tokens: int = 0
    """Training tokens read so far."""
    epoch_blocks: dict[str, list[int]] = field(default_factory=dict)
    """Per data set, the epochs that are shuffled together, in order. A longer run appends a block and keeps the
    order of the earlier ones. See megatron.data.Datasets.epoch_blocks."""
    loss_scaler: dict[str, float] = field(default_factory=dict)
    """Dynamic loss scale of fp16."""
    lineage: list[dict[str, Any]] = field(default_factory=list)
    """One entry a growth: what was there and since which iteration."""
    rollbacks: list[int] = field(default_factory=list)
    """The iterations that `iteration` has rolled the run back to, in order."""
    restarts: int = 0
    """How often the run was started again after a failure."""
    skips: list[list[int]] = field(default_factory=list)
    """[first, last] of the iterations that a rewind said to skip, one entry a rewind."""
    spike_window: dict[str, list[float]] = field(default_factory=dict)
    """The latest good losses and gradient norms, oldest first, which spikes are told by."""
    spikes_in_a_row: int = 0
    """Updates that were skipped for a spike since the last good one."""

    @property
    def updates(self) -> int:
        """What the learning-rate schedule runs on: all iterations but those that fp16 loss scaling skipped."""
        return self.iteration - self.skipped_iterations

    def advance(self, samples: int, length: int, skipped: bool = False, left_out: bool = False) -> None:
        """Count one finished iteration of `samples`, of `length` tokens each."""
        self.iteration += 1
        self.skipped_iterations += int(skipped)
        self.left_out_iterations += int(left_out)
        self.consumed_samples += samples
        self.consumed_tokens += samples * length

    def state_dict(self) -> dict[str, Any]:
        """A JSON-ready copy."""
        return asdict(self)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a saved state; keys it lacks keep their value."""
        for item in fields(self):
            if item.name in state:
                setattr(self, item.name, state[item.name])
