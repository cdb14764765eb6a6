"""Training several trials at once: the product's loop for each, and one computation for the updates of all.

Each trial has a thread in which the product's `Trainer` does everything but the update itself: growth, order of data,
rates, checkpoints, evaluation. In the main thread a batch of each makes one forward and backward pass of stacked
models. A trial that ends makes room for the next of the same shape.
"""

from __future__ import annotations

import itertools
import math
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron.config.schema import RunConfig
from megatron.engine.base import Engine, StepResult
from megatron.signals import StopRequest
from megatron.training.loop import Trainer
from megatron.training.state import TrainState
from tools.growth_experiment.regime.runs import Stopped
from tools.growth_experiment.regime.sizes import SEQUENCE
from tools.growth_experiment.regime.stacked import Shape, StackedAdamW, StackedForward

_EVALUATED_TOGETHER = 16
"""Micro-batches that an evaluation joins: what it sums up is the same."""


@dataclass
class _Member:
    """A trial on its place."""

    engine: Any
    groups: Tensor
    """For each parameter the index of the optimizer's parameter group that it is in."""
    batch: Tensor | None = None
    """Ids [b, s + 1] of the update that it waits for."""
    result: StepResult | None = None


class Together:
    """Models of one shape on a number of places, which take their updates together.

    Args:
        places: most models at once.
        stop: heard by all of them.
        compiled: fuse the arithmetic, which takes a minute; worth it for thousands of updates.
    """

    def __init__(self, places: int, stop: StopRequest, compiled: bool = True) -> None:
        self._places, self._stop, self._compiled = places, stop, compiled
        self._members: dict[int, _Member] = {}
        self._changed = threading.Condition()
        self._building = threading.Lock()
        self._shape: Shape | None = None
        self._error: BaseException | None = None
        self._computing = False

    def train(self, config: RunConfig) -> TrainState:
        """As megatron.training.train, with updates made by `compute`, which another thread is to be in."""
        with self._building:  # DeepSpeed keeps settings of an engine that is being built for the whole process
            trainer = Trainer(config)
        engine: Any = trainer.engine
        try:
            place = self._enter(engine)
        except BaseException:
            trainer.close()
            raise
        evaluate = engine.evaluate
        engine.train_step = lambda batches, lr, age=math.inf: self._step(place, batches, lr, age)
        engine.evaluate = lambda batches: evaluate(_joined(batches))
        try:
            trainer.train(self._stop)
        finally:
            self._leave(place)
        return trainer.state

    def compute(self, workers: Sequence[threading.Thread]) -> None:
        """Make the updates that the workers wait for, until all of them have ended."""
        while any(worker.is_alive() for worker in workers):
            with self._changed:
                if not self._changed.wait_for(self._is_complete, timeout=0.5):
                    continue
                members, self._computing = dict(self._members), True
            try:
                self._update(members)
            except BaseException as error:
                self._error = error
            with self._changed:
                self._computing = False
                for member in members.values():
                    member.batch = None
                self._changed.notify_all()
            if self._error is not None:
                raise self._error

    def _is_complete(self) -> bool:
        return bool(self._members) and all(member.batch is not None for member in self._members.values())

    @torch.no_grad()
    def _enter(self, engine: Engine) -> int:
        """Give a model a place: its weights and moments become views of the stack's."""
        inner, shape = engine.state.inner, Shape.of(engine.model)  # type: ignore[arg-type]
        with self._changed:
            self._changed.wait_for(lambda: not self._computing)  # an update writes to places that are free, too
            if self._shape is None:
                self._prepare(shape, engine)
            if shape != self._shape:
                raise RuntimeError("a model of another shape cannot be stacked on these")
            place = next(i for i in range(self._places) if i not in self._members)
            of_group = {id(p): i for i, group in enumerate(inner.param_groups) for p in group["params"]}
            groups = []
            for i, parameter in enumerate(engine.model.parameters()):
                kept = inner.state[parameter]
                groups.append(of_group[id(parameter)])
                self._weights[i].data[place].copy_(parameter)
                parameter.data = self._weights[i].data[place]
                for name, stack in (("exp_avg", self._adam.first), ("exp_avg_sq", self._adam.second)):
                    stack[i][place].copy_(kept.get(name, torch.zeros(())))
                    kept[name] = stack[i][place]
                self._adam.counts[i, place] = kept.get("step", torch.zeros(())).float()
                kept["step"] = self._adam.counts[i, place]
            self._members[place] = _Member(engine, torch.tensor(groups))
        return place

    def _prepare(self, shape: Shape, engine: Engine) -> None:
        params = engine.settings.optimization.optimizer.params
        shapes = [size for _, size in shape.parameters]
        self._shape, self._names = shape, [name for name, _ in shape.parameters]
        self._adam = StackedAdamW(shapes, self._places, params.betas, params.eps, engine.clip)
        self._weights = [torch.zeros(self._places, *size).requires_grad_() for size in shapes]
        self._losses: Callable[..., Tensor] = StackedForward(shape, SEQUENCE)
        if self._compiled:
            self._losses = torch.compile(self._losses, dynamic=False)
            self._adam.compile()

    def _leave(self, place: int) -> None:
        with self._changed:
            del self._members[place]
            self._changed.notify_all()

    def _step(self, place: int, batches: Sequence[Tensor], learning_rate: float, age: float) -> StepResult:
        """One update of the model on a place; see Engine.train_step."""
        (batch,) = batches
        with self._changed:
            member = self._members[place]
            member.engine._set_learning_rate(learning_rate, age)
            member.batch = batch
            self._changed.notify_all()
            self._changed.wait_for(lambda: member.batch is None or self._error is not None)
        if self._error is not None:
            raise Stopped("stopped with the trials beside it") from self._error
        assert member.result is not None
        return member.result

    def _update(self, members: dict[int, _Member]) -> None:
        some = next(iter(members.values())).batch
        assert some is not None
        ids = torch.zeros(self._places, *some.shape, dtype=torch.int64)
        rates, decays = torch.zeros(2, len(self._names), self._places).unbind()
        active = torch.zeros(self._places)
        for place, member in members.items():
            ids[place], active[place] = member.batch, 1.0  # type: ignore[assignment]
            groups = member.engine.state.inner.param_groups
            rates[:, place] = torch.tensor([group["lr"] for group in groups])[member.groups]
            decays[:, place] = torch.tensor([group["weight_decay"] for group in groups])[member.groups]
        weights = dict(zip(self._names, self._weights, strict=True))
        losses = self._losses(weights, ids[..., :-1].contiguous(), ids[..., 1:].contiguous())
        grads = torch.autograd.grad(losses.sum(), self._weights)
        norms = self._adam(self._weights, grads, rates, decays, active)
        losses = losses.detach()
        for place, member in members.items():
            member.result = StepResult(losses[place], norms[place], False)


def _joined(batches: Iterable[Tensor]) -> Iterator[Tensor]:
    source = iter(batches)
    while some := list(itertools.islice(source, _EVALUATED_TOGETHER)):
        yield torch.cat(some)
