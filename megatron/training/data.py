"""What a run reads: its data sets, and a rank's batches of them for updates and evaluations."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

from torch import Tensor

from megatron.config.update_size import UpdateSize
from megatron.data import batches
from megatron.errors import ConfigError, UserError
from megatron.mpu.layout import Axis
from megatron.tasks import Task
from megatron.training.state import TrainState

_MOST_SAMPLES = 2**60
"""Samples of a data set: more than any run reads, and not too many for the length of a sequence in Python."""


class RunData:
    """The data sets of a whole run, and this rank's share of their samples, checked, in micro-batches.

    Index caches are built by one process a node, under a file lock.

    Args:
        state: where the run is; it is told the order of the samples (`epoch_blocks`).
        update: what an update reads.
        ranks: the data axis, whose ranks share the samples.

    Raises: UserError for data that is missing, damaged or too small.
    """

    def __init__(self, task: Task[Any], state: TrainState, update: UpdateSize, ranks: Axis) -> None:
        self._task, self._state, self._update, self._ranks = task, state, update, ranks
        training = task.config.training
        iterations, self._eval_iters = training.train_iters or 0, training.eval_iters
        # Not train_iters * samples: a resumed run may have another batch size than the samples it consumed.
        remaining = max(0, iterations - state.iteration)
        one_evaluation = self._eval_iters * update.samples
        # GPT-NeoX sizes the set for all evaluations, which decides its order; each of ours reads the beginning of it.
        is_known = any(name.startswith("valid/") for name in state.epoch_blocks)
        evaluations = 1 if is_known else iterations // training.eval_interval + 1
        counts = state.consumed_samples + remaining * update.samples, evaluations * one_evaluation, one_evaluation
        self.sets = task.datasets([min(count, _MOST_SAMPLES) for count in counts], state.epoch_blocks)
        state.epoch_blocks = self.sets.epoch_blocks
        if task.joint and update.samples < 2:
            reason = "every sample of an update is compared with the others of it, and there is none"
            raise ConfigError("train_batch_size", reason, "give 2 or more", value=update.samples)
        for split in ("valid", "test") if one_evaluation and not task.evaluates_every_sample else ():
            self._require_update(split)

    def _require_update(self, split: str) -> None:
        dataset = getattr(self.sets, split)
        if dataset is not None and len(dataset) < self._update.samples:
            raise UserError(
                f"eval_iters: an evaluation reads whole updates, {self._update.samples} samples each, and the {split} "
                f"set has {len(dataset)}; give it more of the data, or set 0 for no evaluation"
            )

    def held_out(self, size: int) -> tuple[Tensor, ...]:
        """The model's inputs for up to `size` samples that are not trained on; the same on every rank."""
        return self._task.held_out(self.sets, size)

    def training(self) -> Iterator[list[Any]]:
        """For each update to come its micro-batches, from the first sample that was not consumed yet."""
        workers, place, stream = self._task.config.data.num_workers, -1, iter(())
        while True:
            if place < self._state.consumed_samples:  # iterations were skipped, unread
                place = self._state.consumed_samples
                stream = self._stream(self.sets.train, self._update.steps, place, workers)
            yield [next(stream) for _ in range(self._update.steps)]
            place += self._update.samples

    @property
    def update_samples(self) -> int:
        """Training samples that an update of all ranks reads."""
        return self._update.samples

    def origins(self, first: int) -> list[dict[str, Any]]:
        """What the update of all ranks that begins with training sample `first` reads, a sample after the other.

        Each part is {set, index, offset, length}: prefix, sequence, first token and tokens of a corpus. Of a data set
        that cannot tell (it has no `origins`) it is the number of the sample in it.
        """
        samples, train = range(first, first + self._update.samples), self.sets.train
        if not hasattr(train, "origins"):
            return [{"set": "train", "index": sample} for sample in samples]
        return [dict(origin) for sample in samples for origin in train.origins(sample)]

    def evaluation(self, split: str) -> Iterator[Any] | None:
        """The same samples of the `valid` or `test` set every time; None where there are none to evaluate."""
        dataset = getattr(self.sets, split)
        if dataset is None or self._eval_iters == 0:
            return None
        if self._task.evaluates_every_sample:
            # All of a set, and its samples may take as long to make as those of training.
            return self._stream(dataset, 0, workers=self._task.config.data.num_workers)
        stream = self._stream(dataset, self._update.steps)
        return itertools.islice(stream, self._eval_iters * self._update.steps)

    def _stream(self, dataset: Any, steps: int, start: int = 0, workers: int = 0) -> Iterator[Any]:
        task, ranks = self._task, self._ranks
        for batch in batches(dataset, self._update.micro, steps, ranks.rank, ranks.size, start, workers, task.collate):
            task.check(batch)
            yield batch
