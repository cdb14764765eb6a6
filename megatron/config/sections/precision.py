"""Section `precision`: the number format of training."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from megatron.config.sections.base import Section
from megatron.errors import ConfigError


class Fp16(Section):
    """fp16 training with loss scaling."""

    enabled: bool = False
    """Train in fp16 (GPU only)."""
    fp16: bool | None = None
    """Repeats `enabled` in official files; has no effect of its own."""
    type: Literal["fp16", "bfloat16"] = "fp16"
    """bfloat16: `enabled` asks for bf16, as in Pythia's files."""
    loss_scale: float = Field(default=0, ge=0, le=2**32)
    """Fixed loss scale; 0 means dynamic."""
    initial_scale_power: int = Field(default=16, ge=0, le=32)
    """The dynamic scale starts at 2 to the power of this."""
    loss_scale_window: int = Field(default=1000, gt=0)
    """Updates without an overflow before the scale doubles."""
    hysteresis: int = Field(default=2, gt=0)
    """Overflows before the scale halves."""
    min_loss_scale: float = Field(default=1, gt=0, le=2**32)
    """Smallest dynamic scale."""
    consecutive_hysteresis: bool = False
    """Refill the hysteresis at every update without an overflow."""


class Bf16(Section):
    """bf16 training."""

    enabled: bool = False
    """Train in bf16 with fp32 master weights."""
    bf16: bool | None = None
    """Repeats `enabled` in GPT-NeoX's files; has no effect of its own."""


class PrecisionConfig(Section):
    """Number format of parameters and activations; master weights and moments are always fp32."""

    precision: Literal["fp32", "bf16", "bfloat16", "fp16"] | None = None
    """fp32, bf16 or fp16; takes precedence over the fp16 and bf16 tables. Default: what those say, else fp32."""
    fp16: Fp16 = Fp16()
    """fp16 settings, for example {enabled: true, loss_scale: 0, initial_scale_power: 12}."""
    bf16: Bf16 = Bf16()
    """bf16 settings: {enabled: true}."""

    @model_validator(mode="after")
    def _check(self) -> PrecisionConfig:
        is_bf16 = self.fp16.type == "bfloat16"
        if self.precision == "fp16" and self.fp16.enabled and is_bf16:
            raise ConfigError("fp16.type", "bfloat16 beside precision fp16", "keep one of them", beside=["precision"])
        if self.precision is None and self.fp16.enabled and self.bf16.enabled and not is_bf16:
            reason, advice = "fp16 and bf16 are both enabled", "set `precision` to one of them"
            raise ConfigError("fp16.enabled", reason, advice, beside=["bf16.enabled", "precision"])
        return self

    @property
    def dtype(self) -> Literal["fp32", "bf16", "fp16"]:
        """The training dtype's short name."""
        if self.precision is not None:
            return "bf16" if self.precision == "bfloat16" else self.precision
        if self.bf16.enabled or (self.fp16.enabled and self.fp16.type == "bfloat16"):
            return "bf16"
        return "fp16" if self.fp16.enabled else "fp32"
