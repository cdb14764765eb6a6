"""The engine of processes that each run the whole depth of the model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from megatron.engine.base import Engine, StepResult
from megatron.engine.gradients import clip_gradients
from megatron.model.attention import SelfAttention


class SingleStageEngine(Engine):
    """Every process runs the whole depth of the model: data and tensor parallelism, ZeRO 0 to 3."""

    def _initialize(self) -> Any:
        from deepspeed.utils import set_z3_leaf_modules

        if self.zero_stage == 3:
            # Gathered around the whole of attention: query, key and value are computed together.
            set_z3_leaf_modules(self.model, [SelfAttention])
        return super()._initialize()

    def train_step(self, batches: Sequence[Tensor], learning_rate: float) -> StepResult:
        """One update; see Engine."""
        self._engine.train()
        self._set_learning_rate(learning_rate)
        losses = []
        for position, tokens in enumerate(batches):
            loss = self._loss(tokens)
            losses.append(loss.detach())
            self._engine.backward(loss)
            if position + 1 < len(batches):
                self._engine.step()
        mean = torch.stack(losses).mean()
        norm = clip_gradients(self.model.parameters(), self.clip, self.layout) if self.zero_stage == 0 else None
        if self.layout.data.size == 1:  # else this rank alone may see it; the gradient norm tells all of them
            self._require_finite("lm_loss", mean)
        if norm is not None:
            self._require_finite("grad_norm", norm)
        skipped_before = self._engine.skipped_steps
        self._engine.step()
        return self._finish_step(mean, norm, self._engine.skipped_steps > skipped_before)

    def _loss(self, tokens: Tensor) -> Tensor:
        inputs, labels, mask = self._split(tokens)
        return self._cross_entropy(self._engine(inputs), labels, mask)

    def _sum_of_losses(self, batches: Iterable[Tensor]) -> Tensor:
        self._engine.eval()
        total = torch.zeros(2, dtype=torch.float64, device=self.device)
        for tokens in batches:
            total[0] += self._loss(tokens)
            total[1] += 1
        self._engine.train()
        return total
