"""The engine of a model cut into pipeline stages: DeepSpeed's schedule runs forward, backward and update."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from megatron.engine.base import Engine, StepResult
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
        model.loss_fn = self._loss
        engine = super()._initialize()
        if self.zero_stage == 0:
            # DeepSpeed's schedule ends with the update: this is the only place between it and the last gradient.
            engine.optimizer.register_step_pre_hook(self._clip)
        else:
            combine_norm_of_stages(engine.optimizer, self.layout)
        return engine

    def _clip(self, *_: Any) -> None:
        self._norm = clip_gradients(self.model.parameters(), self.clip, self.layout)

    def train_step(self, batches: Sequence[Tensor], learning_rate: float) -> StepResult:
        """One update; see Engine."""
        self._set_learning_rate(learning_rate)
        skipped_before = self._engine.skipped_steps
        self._engine.train_batch(self._items(batches))
        loss = self._engine.dp_group_loss
        self._require_finite("lm_loss", loss)
        return self._finish_step(loss, self._norm, self._engine.skipped_steps > skipped_before)

    def _items(self, batches: Iterable[Tensor]) -> Iterator[tuple[Tensor, tuple[Tensor, ...]]]:
        """(inputs for the first stage, what `_loss` needs on the last one) of each micro-batch."""
        for tokens in batches:
            inputs, *targets = self._split(tokens)
            yield inputs, tuple(t for t in targets if t is not None)

    def _loss(self, logits: Tensor, targets: tuple[Tensor, ...]) -> Tensor:
        labels, mask = targets if len(targets) == 2 else (targets[0], None)
        return self._cross_entropy(logits, labels, mask)

    def _sum_of_losses(self, batches: Iterable[Tensor]) -> Tensor:
        total, source = torch.zeros(2, dtype=torch.float64, device=self.device), iter(batches)
        # A schedule needs the number of its batches. A few at a time: `batches` may end early, when the run is stopped.
        while items := list(self._items(itertools.islice(source, _BATCHES_A_STAGE * self.layout.pipeline.size))):
            losses = self._engine.eval_batch(
                iter(items), reduce_output=None, bcast_loss=False, num_micro_batches=len(items)
            )  # None but on the last stage
            if self.layout.pipeline.is_last:
                total += torch.stack([torch.stack(losses).double().sum(), total.new_tensor(len(losses))])
        self.model.train()
        return total

    def close(self) -> None:
        """See Engine. Drops the last micro-batch: its graph refers to the engine where no garbage collector sees it."""
        self._engine.loss = None
        for buffers in getattr(self._engine, "pipe_buffers", {}).values():
            buffers.clear()
        super().close()
