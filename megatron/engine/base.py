"""What the engine with a pipeline and the one without have in common; the loop works with this.

The only file that calls `deepspeed.initialize`.
"""

from __future__ import annotations

import gc
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from pydantic import ValidationError
from torch import Tensor, nn

from megatron.checkpoint.tensors import Tensors
from megatron.config.mistakes import mistakes
from megatron.engine.compiled import compile_blocks, forget_compiled
from megatron.engine.gate import Numbers, UpdateGate
from megatron.engine.grid import DeepSpeedGrid
from megatron.engine.new_keys import NewKeys
from megatron.engine.optimizer import build_optimizer, freeze_old_parameters
from megatron.engine.settings import EngineSettings
from megatron.engine.state import EngineState
from megatron.engine.watch import StepWatch
from megatron.errors import ConfigError, UserError
from megatron.model.fill import share_of
from megatron.mpu import Layout
from megatron.mpu.device import process_device, uses_gpu
from megatron.tasks import Task

_SCALER_FIELDS = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


@dataclass(frozen=True)
class StepResult:
    """What one update reports: the mean loss of this rank's micro-batches, the gradient norm before clipping.

    There is no norm where fp16 loss scaling skipped the update, nor of Muon's with ZeRO.
    """

    loss: Tensor
    grad_norm: Tensor | float | None
    skipped: bool
    withheld: bool = False
    """The weights are as they were, for the loss or the norm was a spike; see `Engine.withhold`."""


class Engine(ABC):
    """Trains one model, or this process's part of it, with DeepSpeed.

    Args:
        settings: what it is told.
        task: what the model learns.
        layout: the grid.
        model: on the training device, fp32, holding the values of `tensors`.
        tensors: the fp32 values of the parameters, for 16-bit training's master weights.
        grid: `DeepSpeedGrid.of(layout)`.
    """

    on_update: Callable[[], None]
    """Called when the gradients of an update are there, before they are clipped or the optimizer steps."""

    def __init__(
        self,
        settings: EngineSettings,
        task: Task[Any],
        layout: Layout,
        model: nn.Module,
        tensors: Tensors,
        grid: DeepSpeedGrid | None = None,
    ) -> None:
        self.settings, self.task, self.layout, self._grid = settings, task, layout, grid
        self.model, self.device = model, process_device()
        self.clip, self.zero_stage = settings.optimization.gradient_clipping, settings.zero_stage
        self._gate: UpdateGate | None = None
        self.on_update = _nothing
        self.watch = StepWatch(layout, self.device, task.loss_name, settings.allow_nonfinite_loss)
        # With ZeRO, DeepSpeed's Muon replaces gradients by updates before it takes their norm.
        self._norm_is_of_updates = settings.optimization.optimizer.type == "Muon" and self.zero_stage > 0
        frozen: dict[str, Tensor] = {}
        if settings.scaling.freeze_old_tokens:
            freeze_old_parameters(self._layers(), settings.growths)
            # The engine has no fp32 copy of what it does not train, and keeps none.
            frozen = {
                name: share_of(tensors, name, parameter, layout).float().cpu().clone()
                for name, parameter in model.named_parameters()
                if not parameter.requires_grad
            }
        # A training run saves and restores through EngineState: DeepSpeed's checkpoint engine is never used.
        self._engine = self._initialize()
        self.state = EngineState(model, self._engine.optimizer, self.zero_stage, layout, frozen)
        if settings.dtype != "fp32":
            self.state.write_masters(tensors)
        if settings.ema_decay is not None:
            self.state.keep_average(settings.ema_decay)
        self.new_keys = NewKeys(self.state, self._engine.optimizer.param_groups, settings)
        if settings.compile_blocks:
            compile_blocks(self._blocks(), self.device, settings.model.tokens_per_sample())

    def _initialize(self) -> Any:
        import deepspeed

        deepspeed.utils.groups.mpu = None  # DeepSpeed would take over the grid of an earlier engine of this process
        optimizer = build_optimizer(self.model, self.settings)
        try:
            engine, *_ = deepspeed.initialize(
                model=self.model,
                optimizer=optimizer,
                config=self.settings.deepspeed,
                mpu=self._grid,
                dist_init_required=False,
            )
        except ValidationError as error:
            first = mistakes(error)[0]
            raise ConfigError(
                f"zero_optimization.{first.key}", first.reason, first.advice, value=first.value
            ) from error
        except (AssertionError, TypeError, ValueError) as error:
            reason = " ".join(str(error).split())[:300]
            raise UserError(f"zero_optimization: DeepSpeed cannot run these settings: {reason}") from error
        return engine

    @abstractmethod
    def _layers(self) -> list[nn.Module]:
        """The layers that this process holds, whole or its share of them."""

    @abstractmethod
    def _blocks(self) -> list[nn.Module]:
        """Those of the layers that are blocks."""

    @abstractmethod
    def train_step(self, batches: Sequence[Any], learning_rate: float, age: float = math.inf) -> StepResult:
        """One update from the task's micro-batches, `gradient_accumulation_steps` of them.

        Whether its loss and gradient norm are finite is for `watch` to find out: this does not wait for the device.

        Args:
            age: updates since the latest growth, whose tokens may have a warm-up of their own.
        """

    @abstractmethod
    def _add_measures(self, batches: Iterable[Any], sums: Tensor) -> None:
        """Add the task's measures of micro-batches to `sums`, [m] in fp64, over this process's data rank.

        The same on every tensor rank; on the last pipeline stage only.
        """

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Any]) -> dict[str, float]:
        """The task's measures, added up over the micro-batches of all data ranks, of the average of the weights if one
        is kept and to be used. Collective."""
        sums = torch.zeros(len(self.task.measures), dtype=torch.float64, device=self.device)
        average = self.state.average if self.settings.use_ema else None
        with nullcontext() if average is None else average.in_model():
            self._add_measures(batches, sums)
        for group in (self.layout.data.group, self.layout.pipeline.group):
            if group is not None:
                dist.all_reduce(sums, group=group)
        return dict(zip(self.task.measures, sums.tolist(), strict=True))

    @abstractmethod
    def _numbers_of_update(self) -> Numbers:
        """Loss and gradient norm before the update; the mean of all ranks' losses is the loss."""

    def withhold(self, is_bad: Callable[[float, float | None], bool]) -> None:
        """From now on ask of every update, before it is made, whether it is to be left out. Each then waits for it.

        Args:
            is_bad: told the mean loss and the gradient norm, None where there is none; the same on all ranks.
        """
        self._gate = UpdateGate(self.state.inner, self.watch, self._numbers_of_update, is_bad)

    def _norm_of_zero(self) -> Tensor | float | None:
        """The gradient norm that DeepSpeed has for the update it is at, with ZeRO."""
        norm: Tensor | float | None = self._engine.optimizer._global_grad_norm
        return None if self._norm_is_of_updates else norm

    def _finish_step(self, loss: Tensor, norm: Tensor | float | None, skipped: bool) -> StepResult:
        """What DeepSpeed says after an update; `norm` None asks it for the norm."""
        if norm is None and not self._norm_is_of_updates:
            norm = self._engine.get_global_grad_norm()
        if skipped:
            # ZeRO skips updates that are not finite, which only fp16 recovers from.
            norm = None if self.settings.dtype == "fp16" else float("inf")
        withheld = self._gate is not None and self._gate.close_step(loss, norm)
        if self.state.average is not None and not (skipped or withheld):
            self.state.average.update()
        return StepResult(loss, norm, skipped and not withheld, withheld)

    def _set_learning_rate(self, learning_rate: float, age: float) -> None:
        for group in self._engine.optimizer.param_groups:
            warmup = group.get("warmup", 0)
            group["lr"] = learning_rate * group.get("lr_scale", 1.0) * (age / warmup if age < warmup else 1.0)

    def mean_over_ranks(self, value: Tensor) -> float:
        """Average of a scalar over the data ranks. Collective."""
        value = value.detach().clone()
        if self.layout.data.group is not None:
            dist.all_reduce(value, group=self.layout.data.group)
            value /= self.layout.data.size
        return value.item()

    def any_rank(self, flag: bool) -> bool:
        """True on every rank when it is true on one. Collective over the world."""
        if self.layout.world_size == 1:
            return flag
        tensor = torch.tensor(int(flag), device=self.device)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        return bool(tensor.item())

    def close(self) -> None:
        """Let go of everything that takes memory, so that another engine can be built in this process.

        A run that grows builds one: what DeepSpeed kept of this engine, it would hold next to the new optimizer.
        """
        self._engine.destroy()
        _empty_optimizer(self._engine, self.state.inner)
        if self.zero_stage == 3:
            _forget_modules(self.model)
        if self.settings.compile_blocks:
            forget_compiled()
        del self._engine, self.model, self.state, self.new_keys
        gc.collect()  # engine, optimizer and parameters refer to each other in circles
        if uses_gpu():
            torch.cuda.empty_cache()

    @property
    def loss_scaler(self) -> dict[str, float]:
        """State of fp16 loss scaling; empty in other precisions."""
        scaler = getattr(self._engine.optimizer, "loss_scaler", None)
        if self.settings.dtype != "fp16" or scaler is None:
            return {}
        return {name: getattr(scaler, name) for name in _SCALER_FIELDS if hasattr(scaler, name)}

    @loss_scaler.setter
    def loss_scaler(self, values: dict[str, float]) -> None:
        scaler = getattr(self._engine.optimizer, "loss_scaler", None)
        for name in self.loss_scaler.keys() & values.keys():
            setattr(scaler, name, values[name])


def _nothing() -> None:
    pass


def _empty_optimizer(engine: Any, inner: torch.optim.Optimizer) -> None:
    """Take the fp32 values, moments and buffers from the optimizer of a destroyed DeepSpeed engine.

    So they go even where something still refers to the optimizer, such as the traceback of an error.
    """
    optimizer, engine.optimizer = engine.optimizer, None  # when the engine is deleted, it is destroyed once more
    inner.state.clear()
    inner.param_groups.clear()
    if optimizer is not inner:  # DeepSpeed's wrapper, whose attributes differ between ZeRO stages and versions
        vars(optimizer).clear()


def _forget_modules(model: nn.Module) -> None:
    """Take the modules of `model` out of the two places where ZeRO 3 keeps them for the whole process.

    On the list of modules in forward it puts the root when an engine is built, and an error adds those it was raised
    in. The other place is an unbounded cache by module, on a wrapped method of a class; other engines fill it again.
    """
    from deepspeed.runtime.zero import parameter_offload
    from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator

    stack: list[nn.Module] = getattr(parameter_offload, "FWD_MODULE_STACK", [])
    own = set(model.modules())
    stack[:] = [module for module in stack if module not in own]
    for method in vars(PartitionedParameterCoordinator).values():
        for cell in getattr(method, "__closure__", None) or ():
            if hasattr(cell.cell_contents, "cache_clear"):
                cell.cell_contents.cache_clear()
