"""Section `scaling`: growing the model by parameter tokens."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from megatron.config.sections.base import MAX_FACTOR, MAX_SIZE, Section
from megatron.errors import ConfigError

NewKeys = Literal["zero", "rotated"]
"""What new keys start as; megatron.growth.grow says how."""


class ScheduledGrowth(Section):
    """One growth inside a run: when, to how many tokens, and how training goes on."""

    at_iteration: int | None = Field(default=None, gt=0)
    """Grow after this many iterations of the run."""
    at_tokens: int | None = Field(default=None, gt=0)
    """Grow once this many tokens of training data have been consumed; instead of at_iteration."""
    qkv_slot_num: int | None = Field(default=None, gt=0, le=MAX_SIZE)
    """Tokens of each query, key and value projection after the growth. Default: as many as before."""
    proj_slot_num: int | None = Field(default=None, gt=0, le=MAX_SIZE)
    """Tokens of the attention output projection after the growth. Default: as many as before."""
    ffn_slot_num: int | None = Field(default=None, gt=0, le=MAX_SIZE)
    """Tokens of the feed-forward after the growth. Default: as many as before."""
    layers: Annotated[list[Annotated[int, Field(ge=0, strict=False)]], Field(min_length=1)] | None = None
    """Blocks that grow, counted from 0. Default: all."""
    lr_policy: Literal["restart", "continue"] = "restart"
    """restart: a schedule of its own, warm-up included; continue: the schedule goes on as if nothing had happened."""
    lr: float | None = Field(default=None, ge=0, le=1000)
    """Peak learning rate of a restart. Default: that of the run."""
    min_lr: float | None = Field(default=None, ge=0, le=1000)
    """Learning rate at the end of a restart's decay. Default: that of the run."""
    warmup: float | None = Field(default=None, ge=0, le=1)
    """Fraction of a restart's lr_decay_iters spent on a linear warm-up. Default: that of the run."""
    lr_warmup_iters: int | None = Field(default=None, ge=0)
    """Iterations of a restart's warm-up, instead of warmup. Default: that of the run."""
    lr_decay_iters: int | None = Field(default=None, gt=0)
    """Iterations of a restart's decay. Default: until the next restart or train_iters; WSD does not decay before the
    next restart then."""
    new_keys: NewKeys = "zero"
    """zero: as in the paper. rotated: random rotations of the old keys with values of zero, which is just as exact
    and learns faster; with l2_norm_gelu, by at least min(tokens, hidden_size) tokens."""
    freeze_old_tokens: bool = False
    """Train only the new tokens, until the next growth."""
    old_tokens_lr_scale: float = Field(default=1.0, ge=0, le=MAX_FACTOR)
    """Factor on the learning rate of everything but the new tokens."""
    new_tokens_lr_scale: float = Field(default=1.0, ge=0, le=MAX_FACTOR)
    """Factor on the learning rate of the new tokens."""

    @model_validator(mode="before")
    @classmethod
    def _spell_with_underscores(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        return {str(key).replace("-", "_"): value for key, value in values.items()}

    @model_validator(mode="after")
    def _check(self) -> ScheduledGrowth:
        if (self.at_iteration is None) == (self.at_tokens is None):
            raise ConfigError("", "needs at_iteration or at_tokens, one of the two")
        if self.qkv_slot_num is None and self.proj_slot_num is None and self.ffn_slot_num is None:
            reason = "needs qkv_slot_num, proj_slot_num or ffn_slot_num; as many as before add none"
            raise ConfigError("", reason)
        for key in ("lr", "min_lr", "warmup", "lr_warmup_iters", "lr_decay_iters"):
            if self.lr_policy == "continue" and getattr(self, key) is not None:
                raise ConfigError(key, "belongs to a schedule of its own", "set lr_policy: restart")
        return self


class ScalingConfig(Section):
    """Incremental scaling: growing the model by parameter tokens."""

    growth: list[ScheduledGrowth] = []
    """Growths inside the run, in order, for example [{at_iteration: 1000, qkv_slot_num: 1792, ffn_slot_num: 7168}]. The
    token counts of the model section are those before the first."""
    partial_init_policy: Literal["restart", "continue"] = "restart"
    """With pretrain_partial_init: whether iterations and learning-rate schedule start anew or go on."""
    new_keys: NewKeys = "zero"
    """What the new keys of pretrain_partial_init start as: zero as in the paper, or rotated, random rotations of
    the old keys (l2_norm_gelu), which is just as exact and learns faster."""
    freeze_old_tokens: bool = False
    """Train only the tokens of the latest growth."""
    old_tokens_lr_scale: float = Field(default=1.0, ge=0, le=MAX_FACTOR)
    """Factor on the learning rate of everything but the tokens of the latest growth."""
    new_tokens_lr_scale: float = Field(default=1.0, ge=0, le=MAX_FACTOR)
    """Factor on the learning rate of the tokens of the latest growth."""

    @model_validator(mode="after")
    def _check(self) -> ScalingConfig:
        for key in ("at_iteration", "at_tokens"):
            times = [value for growth in self.growth if (value := getattr(growth, key)) is not None]
            for earlier, later in zip(times, times[1:], strict=False):
                if later <= earlier:
                    reason = f"entries are out of order, {key} {later} follows {earlier}"
                    raise ConfigError("growth", reason, "sort them by time")
        return self
