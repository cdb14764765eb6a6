"""The engine of a model cut into pipeline stages: DeepSpeed's schedule runs forward, backward and update."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from megatron.engine.base import Engine, StepResult
from megatron.engine.gate import Numbers
from megatron.engine.gradients import clip_gradients, combine_norm_of_stages

# Micro-batches of an evaluation's schedule, for each stage: it waits for the last stage once in so many.
_BATCHES_A_STAGE = 8


class PipelineEngine(Engine):
    """Trains one stage of a `megatron.engine.pipeline_model.PipelineModel`; ZeRO 0 and 1.

    Losses are those of the last stage, and every stage reports them.
    """

    def _initialize(self) -> Any:
        self._norm: Tensor | None = None
        model: Any = self.model
        model.loss_fn = partial(self.task.loss, layout=self.layout)
        engine = super()._initialize()
        if self.zero_stage == 0:
            # DeepSpeed's schedule ends with the update: this is the only place between it and the last gradient.
            engine.optimizer.register_step_pre_hook(self._clip)
        else:
            combine_norm_of_stages(engine.optimizer, self.layout)
        getattr(engine.optimizer, "optimizer", engine.optimizer).register_step_pre_hook(lambda *_: self.on_update())
        return engine

    def _clip(self, *_: Any) -> None:
        if self._norm is None:  # else they are clipped: the update's numbers were asked for
            self._norm = clip_gradients(self.model.parameters(), self.clip, self.layout)

    def _numbers_of_update(self) -> Numbers:
        pipeline, loss = self.layout.pipeline, 0.0
        if pipeline.is_last:  # the only stage that has a loss by now: it counts for all of them
            loss = self._engine.total_loss * (pipeline.size / self._engine.gradient_accumulation_steps())
        if self.zero_stage:
            return loss, self._norm_of_zero()
        self._clip()
        return loss, self._norm

    def _layers(self) -> list[nn.Module]:
        model: Any = self.model
        return list(model.layers())

    def _blocks(self) -> list[nn.Module]:
        model: Any = self.model
        return list(model.blocks())

    def train_step(self, batches: Sequence[Any], learning_rate: float, age: float = math.inf) -> StepResult:
        """One update; see Engine."""
        self._set_learning_rate(learning_rate, age)
        self._norm = None
        skipped_before = self._engine.skipped_steps
        self._engine.train_batch(self._items(batches))
        skipped = self._engine.skipped_steps > skipped_before
        return self._finish_step(self._engine.dp_group_loss, self._norm, skipped)

    def _items(self, batches: Iterable[Any]) -> Iterator[tuple[Tensor, tuple[Tensor, ...]]]:
        """(input of the first stage, what the loss needs on the last one) of each micro-batch."""
        for batch in batches:
            (inputs,), targets = self.task.split(batch, self.device)
            yield inputs, targets

    def _add_measures(self, batches: Iterable[Any], sums: Tensor) -> None:
        model: Any = self.model
        loss, model.loss_fn = model.loss_fn, partial(self.task.measure, layout=self.layout)
        self._engine.total_loss = None  # DeepSpeed adds up what loss_fn gives, which is of another shape now
        source = iter(batches)
        # A schedule needs the number of its batches. A few at a time: `batches` may end early, when the run is stopped.
        while items := list(self._items(itertools.islice(source, _BATCHES_A_STAGE * self.layout.pipeline.size))):
            measured = self._engine.eval_batch(
                iter(items), reduce_output=None, bcast_loss=False, num_micro_batches=len(items)
            )  # None but on the last stage
            if self.layout.pipeline.is_last:
                sums += torch.stack(measured).double().sum(0)
        model.loss_fn, self._engine.total_loss = loss, None
        model.train()

    def close(self) -> None:
        """See Engine. Drops the last micro-batch: its graph refers to the engine where no garbage collector sees it."""
        self._engine.loss = None
        for buffers in getattr(self._engine, "pipe_buffers", {}).values():
            buffers.clear()
        super().close()
