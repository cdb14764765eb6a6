"""What a rank reads of the data: the batches of its updates and of its evaluations."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

from megatron.config.update_size import UpdateSize
from megatron.data import Datasets, batches
from megatron.mpu.layout import Axis
from megatron.tasks import Task


class Batches:
    """This rank's share of a run's samples, checked, in micro-batches.

    Args:
        ranks: the data axis, whose ranks share the samples.
        eval_iters: updates' worth of samples in an evaluation, where the task does not read the whole set.
        workers: threads that read ahead while the model trains.
    """

    def __init__(
        self, task: Task[Any], datasets: Datasets, update: UpdateSize, ranks: Axis, eval_iters: int, workers: int
    ) -> None:
        self._task, self._datasets, self._update, self._ranks = task, datasets, update, ranks
        self._eval_iters, self._workers = eval_iters, workers

    def training(self, consumed_samples: int) -> Iterator[list[Any]]:
        """For each update its micro-batches, from the first sample that was not consumed yet."""
        stream = self._stream(self._datasets.train, self._update.steps, consumed_samples, self._workers)
        while True:
            yield [next(stream) for _ in range(self._update.steps)]

    def evaluation(self, split: str) -> Iterator[Any] | None:
        """The same samples of the `valid` or `test` set every time; None where there are none to evaluate."""
        dataset = getattr(self._datasets, split)
        if dataset is None or self._eval_iters == 0:
            return None
        if self._task.evaluates_every_sample:
            return self._stream(dataset, 0)
        stream = self._stream(dataset, self._update.steps)
        return itertools.islice(stream, self._eval_iters * self._update.steps)

    def _stream(self, dataset: Any, steps: int, start: int = 0, workers: int = 0) -> Iterator[Any]:
        task, ranks = self._task, self._ranks
        for batch in batches(dataset, self._update.micro, steps, ranks.rank, ranks.size, start, workers, task.collate):
            task.check(batch)
            yield batch
