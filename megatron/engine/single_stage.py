"""The engine of processes that each run the whole depth of the model."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from megatron.engine.base import Engine, StepResult
from megatron.engine.gate import Numbers
from megatron.engine.gradients import clip_gradients
from megatron.engine.joint import losses_of_parts, rehearsed
from megatron.model.attention import SelfAttention
from megatron.model.layered import block_of
from megatron.tasks.task import Tensors


class SingleStageEngine(Engine):
    """Every process runs the whole depth of the model: data and tensor parallelism, ZeRO 0 to 3."""

    def _initialize(self) -> Any:
        from deepspeed.utils import set_z3_leaf_modules

        joint = list({type(module) for module in self.model.modules() if isinstance(module, SelfAttention)})
        if self.zero_stage == 3 and joint:
            # Gathered around the whole of attention: query, key and value are computed together.
            set_z3_leaf_modules(self.model, joint)
        return super()._initialize()

    def _layers(self) -> list[nn.Module]:
        model: Any = self.model
        return [layer for _, layer in model.parts()]

    def _blocks(self) -> list[nn.Module]:
        model: Any = self.model
        return [layer for name, layer in model.parts() if block_of(name) is not None]

    def train_step(self, batches: Sequence[Any], learning_rate: float, age: float = math.inf) -> StepResult:
        """One update; see Engine."""
        self._engine.train()
        self._set_learning_rate(learning_rate, age)
        losses = []
        for position, (batch, of_outputs) in enumerate(zip(batches, self._losses_of(batches), strict=True)):
            loss = self._reduced(batch, of_outputs)
            losses.append(loss.detach())
            self._engine.backward(loss)
            if position + 1 < len(batches):
                self._engine.step()
        mean = torch.stack(losses).mean()
        self.on_update()
        norm = clip_gradients(self.model.parameters(), self.clip, self.layout) if self.zero_stage == 0 else None
        self._numbers = mean, norm
        skipped_before = self._engine.skipped_steps
        self._engine.step()
        return self._finish_step(mean, norm, self._engine.skipped_steps > skipped_before)

    def _losses_of(self, batches: Sequence[Any]) -> Sequence[Callable[..., Tensor]]:
        """For each micro-batch of an update what makes its loss of the model's outputs."""
        if not self.task.joint or len(batches) == 1:
            return [self.task.loss] * len(batches)
        with rehearsed(self.device):
            outputs, targets = self._outputs(batches)
        return losses_of_parts(self.task, outputs, targets, self.layout)

    def _outputs(self, batches: Sequence[Any]) -> tuple[list[Tensors], list[Tensors]]:
        """The model's outputs for each micro-batch, and the targets."""
        outputs, targets = list[Tensors](), list[Tensors]()
        for batch in batches:
            inputs, of_batch = self.task.split(batch, self.device)
            outputs.append(self._engine(*inputs))
            targets.append(of_batch)
        return outputs, targets

    def _numbers_of_update(self) -> Numbers:
        loss, norm = self._numbers
        return loss, norm if self.zero_stage == 0 else self._norm_of_zero()

    def _reduced(self, batch: Any, of_outputs: Callable[..., Tensor]) -> Tensor:
        """What the task's loss or measure makes of the model's outputs, computed in its forward."""
        inputs, targets = self.task.split(batch, self.device)
        result: Tensor = self._engine(*inputs, reduce=partial(of_outputs, targets=targets, layout=self.layout))
        return result

    def _add_measures(self, batches: Iterable[Any], sums: Tensor) -> None:
        self._engine.eval()
        if self.task.joint:
            source, steps = iter(batches), self._engine.gradient_accumulation_steps()
            while len(update := list(itertools.islice(source, steps))) == steps:
                sums += self.task.measure(*self.task.joined(*self._outputs(update)), self.layout)
        else:
            for batch in batches:
                sums += self._reduced(batch, self.task.measure)
        self._engine.train()
