"""Section `scaling`: growing the model by parameter tokens."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from megatron.config.sections.base import MAX_FACTOR, MAX_SIZE, Section
from megatron.config.sections.model import RowNorm
from megatron.errors import ConfigError

NewKeys = Literal["zero", "rotated", "random", "official"]
"""What new keys start as; megatron.growth.grow says how."""

NewKeysDecay = Literal["always", "at_old_rms"]
"""When new keys are subject to weight decay."""

NewMoments = Literal["zero", "mean"]
"""What Adam's second moments of new tokens start as; megatron.growth.moments says how."""

GrowthRecipe = Literal["zero_keys", "own_norm"]
"""Several keys of a growth under one name."""

RECIPES: dict[GrowthRecipe, dict[str, Any]] = {
    "zero_keys": {},
    "own_norm": {"row_norm": "segment", "lr_scale": {"old": 0.3}},
}
"""What a recipe gives to keys that an entry leaves out. A name keeps its meaning: files and checkpoints rely on it."""

Part = Literal["new_keys", "new_values", "old_keys", "old_values", "other"]
"""Parameters by role and age: keys and values of the latest growth, those of before, and all that is no token."""

Factor = Annotated[float, Field(ge=0, le=MAX_FACTOR)]


def initial_keys(new_keys: NewKeys | None, row_norm: RowNorm) -> NewKeys:
    """What new keys start as where `new_keys` may be left out. Raises ConfigError for keys that cannot learn so."""
    if row_norm == "segment" and new_keys == "zero":
        reason = "zero keys cannot learn under a row norm of their own, which is zero"
        raise ConfigError("new_keys", reason, "leave new_keys out, or set row_norm: joint", beside=["row_norm"])
    if row_norm == "joint" and new_keys == "random":
        reason = "random keys would change the row norm that they share with the old ones"
        raise ConfigError("new_keys", reason, "set row_norm: segment", beside=["row_norm"])
    if row_norm == "segment" and new_keys == "official":
        reason = "the official code knows no row norm of their own"
        raise ConfigError("new_keys", reason, "set row_norm: joint, or new_keys: random", beside=["row_norm"])
    return new_keys or ("random" if row_norm == "segment" else "zero")


class LrScale(Section):
    """Factors on the learning rate by role and age."""

    new_keys: Factor | None = None
    """Of the new tokens' keys."""
    new_values: Factor | None = None
    """Of the new tokens' values."""
    old_keys: Factor | None = None
    """Of all other tokens' keys. Default: old."""
    old_values: Factor | None = None
    """Of all other tokens' values. Default: old."""
    other: Factor | None = None
    """Of everything that is no token of a block's Pattention. Default: old."""
    old: Factor | None = None
    """Of everything but the new tokens."""

    @model_validator(mode="before")
    @classmethod
    def _spell(cls, values: Any) -> Any:
        return _with_underscores(values)


class NewTokensWarmup(Section):
    """Updates since the growth in which the new tokens' learning rate rises linearly from 0."""

    new_keys: int = Field(default=0, ge=0)
    """Those of the keys."""
    new_values: int = Field(default=0, ge=0)
    """Those of the values."""

    @model_validator(mode="before")
    @classmethod
    def _for_both(cls, values: Any) -> Any:
        if isinstance(values, (dict, cls)):
            return _with_underscores(values)
        if isinstance(values, bool) or not isinstance(values, (int, float)) or values < 0 or values != values // 1:
            raise ValueError(f"expected a number of updates, or {{new_keys: .., new_values: ..}}, got {values}")
        return {"new_keys": values, "new_values": values}


def _with_underscores(values: Any) -> Any:
    if not isinstance(values, dict):
        return values
    return {str(key).replace("-", "_"): value for key, value in values.items()}


def _with_recipe(values: Any) -> Any:
    """The keys of an entry's recipe that the entry leaves out; another factor on old tokens takes the place of its."""
    if not isinstance(values, dict) or values.get("recipe") not in list(RECIPES):
        return values
    left_out = {"lr_scale"} if "old_tokens_lr_scale" in values else set()
    keys = RECIPES[values["recipe"]]
    return {**{key: value for key, value in keys.items() if key not in left_out}, **values}


def _check_scales(scales: LrScale | None, old: float | None, new: float | None) -> None:
    """Raise a ConfigError where a table says something else than one of the two short forms."""
    for key, value, covered in (
        ("old_tokens_lr_scale", old, ("old", "old_keys", "old_values", "other")),
        ("new_tokens_lr_scale", new, ("new_keys", "new_values")),
    ):
        for name in covered:
            other = getattr(scales, name, None)
            if value is not None and other is not None and other != value:
                raise ConfigError(
                    key, f"{value:g} contradicts {name} {other:g} of lr_scale", "keep one of them", beside=["lr_scale"]
                )


Tower = Literal["image", "text", "both"]
"""Which of a model's networks grows."""


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
    tower: Tower | None = None
    """Of a model with an image tower and a text tower: which of them grows. Two growths at one time may be of one tower
    each. Default: both."""
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
    recipe: GrowthRecipe = "zero_keys"
    """What the keys below are where they are left out. zero_keys: their defaults. own_norm: row_norm segment
    and lr_scale {old: 0.3}, which learned most of what was measured (docs/growth_regime.md)."""
    new_keys: NewKeys | None = None
    """zero: as in the paper. rotated: random rotations of the old keys with values of zero, which is just as exact
    and learns faster; with l2_norm_gelu, by at least min(tokens, hidden_size) tokens. random, with row_norm segment:
    as large as the old keys, in all directions, with values of zero. official: keys and values as a new model's, and
    tau of the new number of tokens, as the official code grows and the paper grew: the loss jumps. Default: random with
    row_norm segment, else zero."""
    row_norm: RowNorm = "joint"
    """joint: the new tokens share the row norm and the tau of those before them. segment: they have their own, so that
    any keys with values of zero change nothing, and the old tokens' weights never feel the new ones."""
    freeze_old_tokens: bool = False
    """Train only the new tokens, and the connector of networks that are joined, until the next growth."""
    lr_scale: LrScale | None = None
    """Factors on the learning rate by role and age, for example {new_keys: 2, new_values: 0.3, old: 0.1}; also
    old_keys, old_values and other, what is no token, which are old unless given."""
    old_tokens_lr_scale: Factor | None = None
    """Short for lr_scale: {old: ..}, the factor of everything but the new tokens."""
    new_tokens_lr_scale: Factor | None = None
    """Short for lr_scale: {new_keys: .., new_values: ..}, the factor of the new tokens."""
    new_tokens_warmup: NewTokensWarmup = NewTokensWarmup()
    """Updates since the growth in which the new tokens' learning rate rises linearly from 0, whatever else it does: a
    number, or one for the keys and one for the values."""
    new_keys_decay: NewKeysDecay = "always"
    """at_old_rms: no weight decay on the new keys until their root mean square is that of the old keys, apart for qkv,
    proj and ffn."""
    new_moments: NewMoments = "zero"
    """What Adam's second moments of new tokens start as: zero with an own count of updates, or mean, the mean of the
    old tokens' in the same layer, with their count."""

    @model_validator(mode="before")
    @classmethod
    def _complete(cls, values: Any) -> Any:
        return _with_recipe(_with_underscores(values))

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
        _check_scales(self.lr_scale, self.old_tokens_lr_scale, self.new_tokens_lr_scale)
        initial_keys(self.new_keys, self.row_norm)
        return self


class ScalingConfig(Section):
    """Incremental scaling: growing the model by parameter tokens."""

    growth: list[ScheduledGrowth] = []
    """Growths inside the run, in order, for example [{at_iteration: 1000, qkv_slot_num: 1792, ffn_slot_num: 7168}]. The
    token counts of the model section are those before the first."""
    partial_init_policy: Literal["restart", "continue"] = "restart"
    """With pretrain_partial_init: whether iterations and learning-rate schedule start anew or go on."""
    new_keys: NewKeys | None = None
    """What the new keys of pretrain_partial_init start as: zero as in the paper; rotated, random rotations of the old
    keys (l2_norm_gelu), which is just as exact and learns faster; random, with row_norm segment; or official, those of
    a new model, after which the loss jumps. Default: random with row_norm segment, else zero."""
    row_norm: RowNorm = "joint"
    """The row norm of the new tokens of pretrain_partial_init: that of the old ones (joint), or their own (segment)."""
    freeze_old_tokens: bool = False
    """Train only the tokens of the latest growth, and the connector of networks that are joined."""
    lr_scale: LrScale | None = None
    """Factors on the learning rate by role and age, for example {new_keys: 2, new_values: 0.3, old: 0.1}; also
    old_keys, old_values and other, what is no token, which are old unless given. New are the latest growth's."""
    old_tokens_lr_scale: Factor | None = None
    """Short for lr_scale: {old: ..}, the factor of everything but the tokens of the latest growth."""
    new_tokens_lr_scale: Factor | None = None
    """Short for lr_scale: {new_keys: .., new_values: ..}, the factor of the tokens of the latest growth."""
    new_tokens_warmup: NewTokensWarmup = NewTokensWarmup()
    """Updates since the latest growth in which its tokens' learning rate rises linearly from 0: a number, or one for
    the keys and one for the values."""
    new_keys_decay: NewKeysDecay = "always"
    """at_old_rms: no weight decay on the latest growth's keys until their root mean square is that of the older keys,
    apart for qkv, proj and ffn."""
    new_moments: NewMoments = "zero"
    """What Adam's second moments of the new tokens of pretrain_partial_init start as: zero with an own count of
    updates, or mean, the mean of the old tokens' in the same layer, with their count."""

    @model_validator(mode="after")
    def _check(self) -> ScalingConfig:
        for key in ("at_iteration", "at_tokens"):
            timed = [growth for growth in self.growth if getattr(growth, key) is not None]
            for first, second in zip(timed, timed[1:], strict=False):
                earlier, later = getattr(first, key), getattr(second, key)
                of_two_towers = {first.tower, second.tower} == {"image", "text"}
                if later < earlier or (later == earlier and not of_two_towers):
                    reason = f"entries are out of order, {key} {later} follows {earlier}"
                    raise ConfigError("growth", reason, "sort them by time")
        _check_scales(self.lr_scale, self.old_tokens_lr_scale, self.new_tokens_lr_scale)
        initial_keys(self.new_keys, self.row_norm)
        return self

    def warmup_of(self, part: Part) -> int:
        """Updates since the latest growth in which the learning rate of a part of the parameters rises from 0."""
        return int(getattr(self.new_tokens_warmup, part, 0))

    def lr_factor(self, part: Part) -> float:
        """The factor on the learning rate of a part of the parameters."""
        scales = self.lr_scale or LrScale()
        own = getattr(scales, part)
        given = (
            [own, self.new_tokens_lr_scale] if part.startswith("new_") else [own, scales.old, self.old_tokens_lr_scale]
        )
        return next((factor for factor in given if factor is not None), 1.0)
