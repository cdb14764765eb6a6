"""What the training loop works with."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from megatron.checkpoint.store import FolderLock
from megatron.config.schema import RunConfig
from megatron.config.update_size import UpdateSize
from megatron.data import Datasets, batches
from megatron.engine.base import Engine
from megatron.growth.schedule import is_due, next_growth
from megatron.metrics import MetricsLog, Throughput
from megatron.mpu import Layout
from megatron.tasks import Task
from megatron.training.schedule import LRSchedule
from megatron.training.state import TrainState


@dataclass
class Run:
    """Everything the loop works with."""

    config: RunConfig
    task: Task[Any]
    layout: Layout
    engine: Engine
    state: TrainState
    schedule: LRSchedule
    datasets: Datasets
    metrics: MetricsLog
    throughput: Throughput
    update: UpdateSize
    flops_per_token: float
    peak_flops: float | None
    resumed: bool = False
    lock: FolderLock | None = None
    saved: int | None = None
    loss_sum: Tensor | None = None
    losses_summed: int = 0

    @property
    def last_iteration(self) -> int:
        """Iteration after which the run is done."""
        assert self.config.training.train_iters is not None, "start_run checks it"
        return self.config.training.train_iters

    def training_batches(self) -> Iterator[list[Any]]:
        """For each update its micro-batches, from the first sample that was not consumed yet."""
        start, workers = self.state.consumed_samples, self.config.data.num_workers
        stream = self._batches(self.datasets.train, self.update.steps, start, workers)
        while True:
            yield [next(stream) for _ in range(self.update.steps)]

    def evaluation_batches(self, dataset: Any) -> Iterator[Any]:
        """This rank's share of the same samples every time: eval_iters global batches, or the whole set."""
        if self.task.evaluates_every_sample:
            return self._batches(dataset, 0)
        stream = self._batches(dataset, self.update.steps)
        return itertools.islice(stream, self.config.training.eval_iters * self.update.steps)

    def _batches(self, dataset: Any, steps: int, start: int = 0, workers: int = 0) -> Iterator[Any]:
        data, task = self.layout.data, self.task
        for batch in batches(dataset, self.update.micro, steps, data.rank, data.size, start, workers, task.collate):
            task.check(batch)
            yield batch

    def add_loss(self, loss: Tensor) -> None:
        """Collect a step's loss for the mean of the next log line, without waiting for the device."""
        self.loss_sum = loss if self.loss_sum is None else self.loss_sum + loss
        self.losses_summed += 1

    def take_mean_loss(self) -> float:
        """Mean loss over all ranks and the iterations since the last call. Collective."""
        assert self.loss_sum is not None, "called after at least one step"
        mean = self.engine.mean_over_ranks(self.loss_sum / self.losses_summed)
        self.loss_sum, self.losses_summed = None, 0
        return mean

    def growth_is_due(self) -> bool:
        """Has the time of the next scheduled growth come, with training to follow it?"""
        growth, state = next_growth(self.config.scaling.growth, self.state.lineage), self.state
        return (
            growth is not None
            and is_due(growth, state.iteration, state.consumed_tokens)
            and state.iteration < self.last_iteration
        )

    def close(self) -> None:
        """Flush the metrics, let go of the model and give the save folder free."""
        self.metrics.close()
        self.engine.close()
        if self.lock is not None:
            self.lock.close()
