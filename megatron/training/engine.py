"""The DeepSpeed engine: process group, DeepSpeed configuration, one training step, evaluation.

The only file that calls `deepspeed.initialize`. `Engine` is what the loop works with, `SingleStageEngine` the one
without a pipeline; the one with is in megatron.training.pipeline_engine.
"""

from __future__ import annotations

import gc
import importlib.util
import logging
import os
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from pydantic import ValidationError
from torch import Tensor, nn

from megatron.checkpoint.state import ParameterSource
from megatron.config.schema import RunConfig
from megatron.errors import UserError
from megatron.model.attention import SelfAttention
from megatron.mpu import Layout
from megatron.mpu.device import (
    DTYPES,
    process_device,
    require_gpu,
    set_cuda_environment,
    set_numerics,
    uses_gpu,
)
from megatron.mpu.processes import connect_world
from megatron.mpu.shard import take_share
from megatron.ops.cross_entropy import cross_entropy
from megatron.training.engine_state import EngineState
from megatron.training.gradients import clip_gradients
from megatron.training.grid import DeepSpeedGrid
from megatron.training.optimizer import build_optimizer, freeze_old_parameters

_SCALER_FIELDS = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


def initialize_distributed(config: RunConfig) -> Layout:
    """Join the process group that RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT describe; returns the grid.

    Raises: UserError where a GPU is asked for and there is none, and for a world the model axes do not divide.
    """
    deterministic, parallel, launch = config.training.deterministic, config.parallel, config.launch
    set_cuda_environment(deterministic, parallel.model_parallel_size)
    request, overrides = config.gpu_request()
    require_gpu(request, _ways_without_gpu(overrides))
    set_numerics(deterministic)
    if not uses_gpu():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed looks for one, and says that it found none
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # DeepSpeed's ZeRO 3 calls collectives by their old names.
    warnings.filterwarnings("ignore", message=".*torch.distributed.* is deprecated", category=FutureWarning)
    if not uses_gpu():
        # Without this DeepSpeed compiles a shared-memory collective for a minute before the first step.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    timeout = timedelta(minutes=launch.distributed_timeout_minutes)
    connect_world(launch.distributed_backend, timeout, launch.ranks_per_gpu)
    if not deepspeed.comm.is_initialized():
        deepspeed.init_distributed(dist_backend=dist.get_backend(), auto_mpi_discovery=False, verbose=False)
    try:
        layout = Layout.for_world(
            dist.get_rank(),
            dist.get_world_size(),
            parallel.pipeline_stages,
            parallel.model_parallel_size,
            parallel.sequence_parallel,
        )
    except ValueError as error:
        raise UserError(str(error)) from error
    return layout.connect(timeout)


def _ways_without_gpu(overrides: Sequence[str]) -> str:
    text = f"train on the CPU with {' '.join(f'`--set {override}`' for override in overrides)}"
    if "attention_backend=sdpa" in overrides and importlib.util.find_spec("flash_attn") is None:
        text += "; flash_attn is missing too: pip install -r requirements/requirements-flashattention.txt"
    return text


def deepspeed_config(config: RunConfig, layout: Layout) -> dict[str, Any]:
    """The JSON configuration DeepSpeed is given."""
    update = config.update_size(layout.data.size)
    zero = config.parallel.zero_optimization.model_dump(exclude_none=True)
    if zero.pop("cpu_offload", False):
        zero.setdefault("offload_optimizer", {"device": "cpu"})
    for table in (zero.get("offload_optimizer"), zero.get("offload_param")):
        if isinstance(table, dict) and table.get("device") == "cpu":
            table.setdefault("pin_memory", uses_gpu())  # else every copy to the GPU goes through a second one
    result: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": update.micro,
        "gradient_accumulation_steps": update.steps,
        # Always set: DeepSpeed's own default is 1.0. Without ZeRO in fp32 Engine clips, to know the norm.
        "gradient_clipping": config.optimization.gradient_clipping if zero["stage"] else 0.0,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        # With offload_optimizer torch's fused AdamW runs on the CPU too; optimizer.type CPU_Adam asks for DeepSpeed's.
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 2**62,
        "wall_clock_breakdown": config.logging.wall_clock_breakdown,
    }
    if layout.pipeline.size > 1:
        # Tensor ranks send different activations between stages: DeepSpeed must not cut them up again.
        result["pipeline"] = {"pipe_partitioned": False, "grad_partitioned": False}
    if config.precision.dtype == "bf16":
        result["bf16"] = {"enabled": True}
    if config.precision.dtype == "fp16":
        result["fp16"] = {**config.precision.fp16.model_dump(exclude={"fp16", "type"}), "enabled": True}
    return result


def deepspeed_grid(layout: Layout) -> DeepSpeedGrid | None:
    """The grid that DeepSpeed is told of; None where it knows all (data ranks only) or a PipelineModule tells it."""
    return DeepSpeedGrid(layout) if layout.tensor.size > 1 and layout.pipeline.size == 1 else None


def partition_parameters(module: nn.Module, config: RunConfig, layout: Layout, grid: DeepSpeedGrid | None) -> None:
    """ZeRO 3: leave this process its part of each parameter of `module`, in the training dtype; they come filled.

    Called part by part of a model, so that a model that is larger than a device's memory fits it at no time as a whole.
    """
    import deepspeed

    module.to(DTYPES[config.precision.dtype])
    group = grid.get_data_parallel_group() if grid is not None else layout.data.group
    settings = deepspeed_config(config, layout)
    deepspeed.zero.Init(module=module, data_parallel_group=group, config_dict_or_path=settings, mpu=grid)


@dataclass(frozen=True)
class StepResult:
    """What one update reports: the mean loss of this rank's micro-batches, the gradient norm before clipping."""

    loss: Tensor
    grad_norm: Tensor | float | None
    skipped: bool


class Engine(ABC):
    """Trains one model, or this process's part of it, with DeepSpeed.

    Args:
        config, layout: the run.
        model: on the training device, fp32, holding the values of `source`.
        source: the whole fp32 value of each parameter, for 16-bit training's master weights.
        eod_id: end-of-document token, for eod_mask_loss.
        grid: `deepspeed_grid(layout)`.
    """

    def __init__(
        self,
        config: RunConfig,
        layout: Layout,
        model: nn.Module,
        source: ParameterSource,
        eod_id: int,
        grid: DeepSpeedGrid | None = None,
    ) -> None:
        self._grid = grid
        self.config, self.layout, self.model, self.device = config, layout, model, process_device()
        self.eod_id = eod_id if config.training.eod_mask_loss else None
        self.clip = config.optimization.gradient_clipping
        self.zero_stage: int = config.parallel.zero_optimization.stage
        # With ZeRO, DeepSpeed's Muon replaces gradients by updates before it takes their norm.
        self._norm_is_of_updates = config.optimization.optimizer.type == "Muon" and self.zero_stage > 0
        frozen: dict[str, Tensor] = {}
        if config.scaling.freeze_old_tokens:
            freeze_old_parameters(model, config.model)
            # The engine has no fp32 copy of what it does not train, and keeps none.
            frozen = {
                name: take_share(source(name), parameter, layout.tensor).float().cpu().clone()
                for name, parameter in model.named_parameters()
                if not parameter.requires_grad
            }
        # A training run saves and restores through EngineState: DeepSpeed's checkpoint engine is never used.
        self._engine = self._initialize()
        self.state = EngineState(model, self._engine.optimizer, self.zero_stage, layout, frozen)
        if config.precision.dtype != "fp32":
            self.state.write_masters(source)

    def _initialize(self) -> Any:
        import deepspeed

        deepspeed.utils.groups.mpu = None  # DeepSpeed would take over the grid of an earlier engine of this process
        optimizer = build_optimizer(self.model, self.config)
        try:
            engine, *_ = deepspeed.initialize(
                model=self.model,
                optimizer=optimizer,
                config=deepspeed_config(self.config, self.layout),
                mpu=self._grid,
                dist_init_required=False,
            )
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(map(str, first["loc"]))
            raise UserError(f"zero_optimization.{key}: {first['msg']}; got {first.get('input')!r}") from error
        except (AssertionError, TypeError, ValueError) as error:
            reason = " ".join(str(error).split())[:300]
            raise UserError(f"zero_optimization: DeepSpeed cannot run these settings: {reason}") from error
        return engine

    @abstractmethod
    def train_step(self, batches: Sequence[Tensor], learning_rate: float) -> StepResult:
        """One update from `gradient_accumulation_steps` micro-batches of tokens [micro, seq_length + 1].

        Raises: UserError when the loss or the gradient norm is not finite; nothing of such a step is saved.
        """

    @abstractmethod
    def _sum_of_losses(self, batches: Iterable[Tensor]) -> Tensor:
        """Sum of the mean losses of micro-batches and their number, [2] in fp64, over this process's data rank.

        The same on every tensor rank; on the last pipeline stage only, zeros elsewhere.
        """

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Tensor]) -> float:
        """Mean loss over micro-batches [micro, seq_length + 1] of all data ranks, in nats per token. Collective."""
        total = self._sum_of_losses(batches)
        for group in (self.layout.data.group, self.layout.pipeline.group):
            if group is not None:
                dist.all_reduce(total, group=group)
        return (total[0] / total[1]).item()

    def _split(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Tokens [b, s + 1] -> inputs [b, s], labels [b, s] and, with eod_mask_loss, which predictions count."""
        tokens = tokens.to(self.device, non_blocking=True)
        inputs, labels = tokens[:, :-1], tokens[:, 1:]
        return inputs, labels, None if self.eod_id is None else inputs != self.eod_id

    def _cross_entropy(self, logits: Tensor, labels: Tensor, mask: Tensor | None) -> Tensor:
        """Mean loss from this tensor rank's share of the logits, the same on every tensor rank."""
        return cross_entropy(logits, labels, mask, self.layout.tensor, self.config.model.padded_vocab_size)

    def _finish_step(self, loss: Tensor, norm: Tensor | float | None, skipped: bool) -> StepResult:
        """Check what DeepSpeed says after an update; `norm` None asks it for the norm."""
        if norm is None and not self._norm_is_of_updates:
            norm = self._engine.get_global_grad_norm()
        # ZeRO learns the norm while it updates. It skips updates that are not finite, which only fp16 recovers from.
        if skipped and self.config.precision.dtype != "fp16":
            self._require_finite("grad_norm", torch.tensor(float("inf")))
        elif norm is not None and not skipped:
            self._require_finite("grad_norm", torch.as_tensor(norm))
        return StepResult(loss, norm, skipped)

    def _require_finite(self, name: str, value: Tensor) -> None:
        # The update waits for the gradient norm anyway, so looking at these costs no extra stall.
        if not self.config.training.allow_nonfinite_loss and not torch.isfinite(value):
            raise UserError(
                f"{name}: {value.item()} is not finite, stopped before anything was saved; "
                "resume from the last checkpoint with a smaller lr or another seed, or set allow_nonfinite_loss: true"
            )

    def _set_learning_rate(self, learning_rate: float) -> None:
        for group in self._engine.optimizer.param_groups:
            group["lr"] = learning_rate * group.get("lr_scale", 1.0)

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

    def model_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Whole canonical parameters (fp32) and buffers; collective."""
        yield from self.state.masters()
        yield from self.state.buffers()

    def close(self) -> None:
        """Let go of everything that takes memory, so that another engine can be built in this process.

        A run that grows builds one: what DeepSpeed kept of this engine, it would hold next to the new optimizer.
        """
        self._engine.destroy()
        _empty_optimizer(self._engine, self.state.inner)
        if self.zero_stage == 3:
            _forget_modules(self.model)
        del self._engine, self.model, self.state
        gc.collect()  # engine, optimizer and parameters refer to each other in circles
        if uses_gpu():
            torch.cuda.empty_cache()

    @property
    def loss_scaler(self) -> dict[str, float]:
        """State of fp16 loss scaling; empty in other precisions."""
        scaler = getattr(self._engine.optimizer, "loss_scaler", None)
        if self.config.precision.dtype != "fp16" or scaler is None:
            return {}
        return {name: getattr(scaler, name) for name in _SCALER_FIELDS if hasattr(scaler, name)}

    @loss_scaler.setter
    def loss_scaler(self, values: dict[str, float]) -> None:
        scaler = getattr(self._engine.optimizer, "loss_scaler", None)
        for name in self.loss_scaler.keys() & values.keys():
            setattr(scaler, name, values[name])


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
