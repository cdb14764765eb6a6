"""Section `optimization`: optimizer, weight decay, clipping and the learning-rate schedule."""

from __future__ import annotations

import typing
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from megatron.config.sections.base import ListedNumber, Section
from megatron.errors import ConfigError
from megatron.text import shortened


class OptimizerParams(Section):
    """Arguments of the optimizer."""

    lr: float = Field(default=6e-4, ge=0, le=1000)
    """Peak learning rate (also accepted at the top level, as learning_rate or lr)."""
    betas: tuple[ListedNumber, ListedNumber] = Field(default=(0.9, 0.999), strict=False)
    """Decay rates of Adam's and Lion's moments."""
    eps: float = Field(default=1e-8, ge=0, le=1)
    """Term added to Adam's denominator."""
    momentum: float = Field(default=0.0, ge=0, lt=1)
    """Momentum of SGD and Muon (for Muon, 0 means its usual 0.95)."""

    @field_validator("betas")
    @classmethod
    def _decays(cls, values: tuple[float, float]) -> tuple[float, float]:
        if not all(0 <= value < 1 for value in values):
            raise ValueError(f"each must be at least 0 and below 1, got [{values[0]:g}, {values[1]:g}]")
        return values


OptimizerType = Literal["Adam", "AdamW", "CPU_Adam", "FusedAdam", "ApexAdam", "Lion", "Muon", "SGD"]
ADAM_FAMILY: tuple[OptimizerType, ...] = ("Adam", "AdamW", "FusedAdam", "ApexAdam", "CPU_Adam")
"""Those that keep the same two moments, and can go on from each other's."""
OPTIMIZER_SPELLINGS: dict[str, OptimizerType] = {
    "adam": "Adam", "adamw": "AdamW", "cpu_adam": "CPU_Adam", "cpuadam": "CPU_Adam",
    "deepspeedcpuadam": "CPU_Adam", "fusedadam": "FusedAdam", "apexadam": "ApexAdam", "apex_adam": "ApexAdam",
    "lion": "Lion", "muon": "Muon", "sgd": "SGD",
}  # fmt: skip


class OptimizerSpec(Section):
    """Which optimizer and its arguments."""

    type: OptimizerType = "Adam"
    """Adam and AdamW: torch's AdamW, fused where the device has it. FusedAdam: DeepSpeed's. ApexAdam: NVIDIA
    apex's. CPU_Adam: DeepSpeed's for offloaded states. Lion, Muon, SGD."""
    params: OptimizerParams = OptimizerParams()
    """Its arguments."""

    @field_validator("type", mode="before")
    @classmethod
    def _spelling(cls, value: Any) -> Any:
        if isinstance(value, str) and value.lower() in OPTIMIZER_SPELLINGS:
            return OPTIMIZER_SPELLINGS[value.lower()]
        names = ", ".join(typing.get_args(OptimizerType))
        raise ValueError(f"'{shortened(value)}' is not supported; choose one of {names}")


WsdDecayStyle = Literal["exponential", "linear", "cosine", "minus_sqrt"]
"""Shapes of WSD's decay; megatron.training.schedule has the formulas."""


class OptimizationConfig(Section):
    """Optimizer, weight decay, clipping and learning-rate schedule."""

    optimizer: OptimizerSpec = OptimizerSpec()
    """The optimizer, for example {type: Adam, params: {lr: 6.0e-4, betas: [0.9, 0.95], eps: 1.0e-8}}."""
    weight_decay: float = Field(default=0.1, ge=0, le=1000)
    """Decoupled weight decay of every matrix; vectors (norms, biases) have none."""
    gradient_clipping: float = Field(default=1.0, ge=0, le=1e12)
    """Largest global gradient norm; 0 turns clipping off."""
    min_lr: float = Field(default=0.0, ge=0, le=1000)
    """Learning rate at the end of the decay and from then on."""
    lr_decay_style: Literal["linear", "cosine", "exponential", "constant", "WSD"] = "linear"
    """Shape of the decay after the warm-up. WSD (warm-up, stable, decay) stays at the peak until the last
    lr_wsd_decay_iters iterations."""
    lr_decay_iters: int | None = Field(default=None, gt=0)
    """Iterations until min_lr is reached. Default: train_iters."""
    lr_wsd_decay_style: WsdDecayStyle = "exponential"
    """Shape of WSD's decay."""
    lr_wsd_decay_iters: int = Field(default=0, ge=0)
    """Iterations of WSD's decay, the last of lr_decay_iters. 0: it stays at the peak, for a trunk that runs branch from
    (tools/ckpts/branch.py)."""
    warmup: float = Field(default=0.01, ge=0, le=1)
    """Fraction of lr_decay_iters spent on a linear warm-up from 0."""
    lr_warmup_iters: int | None = Field(default=None, ge=0)
    """Iterations of the warm-up, whatever the length of the run; instead of warmup."""

    @model_validator(mode="after")
    def _check(self) -> OptimizationConfig:
        if self.lr_wsd_decay_iters and self.lr_decay_style != "WSD":
            reason = f"{self.lr_wsd_decay_iters} is of WSD, and lr_decay_style is {self.lr_decay_style}"
            raise ConfigError("lr_wsd_decay_iters", reason, "set WSD, or remove it", beside=["lr_decay_style"])
        return self

    def warmup_iters(self, total: int) -> float:
        """Iterations of the warm-up of a schedule of `total`."""
        return self.warmup * total if self.lr_warmup_iters is None else self.lr_warmup_iters
