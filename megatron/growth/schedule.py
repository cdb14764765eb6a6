"""Growth as part of a run: which growths it has made, its configuration since then, and when the next one is due.

A run with a growth schedule is described by one configuration, whose model section is the model before the first
growth. `TrainState.lineage` says how many growths are made; everything else follows from the two.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Generic, NamedTuple

from megatron.config.sections.model import ModelSection
from megatron.config.sections.optimization import OptimizationConfig
from megatron.config.sections.scaling import NewKeys, ScalingConfig, ScheduledGrowth
from megatron.errors import UserError
from megatron.exchange import Checkpoint
from megatron.growth.plan import KINDS, Model, TokenCounts, describe, grown_config, segments_of
from megatron.log import get_logger


class Progress(NamedTuple):
    """Where a run is: finished iterations, and the tokens read by then."""

    iteration: int = 0
    consumed_tokens: int = 0

    @classmethod
    def of(cls, entry: Mapping[str, Any]) -> Progress:
        """Where the run was at a growth of its lineage."""
        return cls(int(entry["iteration"]), int(entry["consumed_tokens"]))


class Grown(NamedTuple, Generic[Model]):
    """The two sections of a configuration that a growth changes."""

    model: Model
    """The model with the tokens of all growths made."""
    scaling: ScalingConfig
    """New keys, frozen tokens and learning-rate factors are those of the latest growth."""


def check_schedule(
    model: ModelSection, scaling: ScalingConfig, options: OptimizationConfig, tensor_ranks: int, already: int = 0
) -> None:
    """Raise a UserError when one of the growths to come is impossible, before anything is trained.

    So is one by fewer tokens than there are tensor ranks: some would have none to train, which ZeRO does not allow.

    Args:
        already: scheduled growths that `model` has in it.
    """
    for number, growth in enumerate(scaling.growth[already:], already):
        peak = options.optimizer.params.lr if growth.lr is None else growth.lr
        floor = options.min_lr if growth.min_lr is None else growth.min_lr
        if growth.lr_policy == "restart" and peak < floor:
            raise UserError(
                f"growth[{number}]: lr {peak:g} is below min_lr {floor:g}; give the growth a lower min_lr too"
            )
        model = _grown_once(model, growth, number)
        if growth.freeze_old_tokens and not any(block[-1] for kind in KINDS for block in segments_of(model, kind)):
            raise UserError(f"growth[{number}]: freeze_old_tokens where no tokens are added; there is nothing to train")
    for kind, blocks in (model.token_segments or {}).items():
        fewest = min((size for block in blocks for size in block if size), default=tensor_ranks)
        if fewest < tensor_ranks:
            raise UserError(
                f"growth: {kind}_slot_num grows by {fewest} where model_parallel_size is {tensor_ranks}; each rank "
                "needs a new token: grow by more, or lower model_parallel_size"
            )


def check_times(
    growths: Sequence[ScheduledGrowth],
    train_iters: int | None,
    lineage: Sequence[Mapping[str, Any]],
    now: Progress,
    tokens_an_update: int,
) -> None:
    """Raise a UserError when the growths to come are out of order, and say so when the run ends before one of them."""
    last, done = now.iteration, growths_done(lineage)
    for number, growth in enumerate(growths[done:], done):
        begin = max(now.iteration, _start_of(growth, now, tokens_an_update))
        if begin < last:
            raise UserError(
                f"growth[{number}]: comes at iteration {begin}, that before it at {last}; sort the growths by time"
            )
        if begin > (train_iters or begin):
            get_logger().info(
                "growth[%d] is not made: it comes at iteration %d, train_iters is %d", number, begin, train_iters
            )
        last = begin


def after_growths(model: Model, scaling: ScalingConfig, done: int, already: int = 0) -> Grown[Model]:
    """Model and scaling of a run after the first `done` growths of its schedule.

    Args:
        already: growths that `model` has in it.

    Raises: UserError naming the growth that asks for fewer tokens than there are.
    """
    for number, growth in enumerate(scaling.growth[already:done], already):
        model = _grown_once(model, growth, number)
    if not done:
        return Grown(model, scaling)
    keys = ("new_keys", "freeze_old_tokens", "old_tokens_lr_scale", "new_tokens_lr_scale")
    latest = scaling.growth[done - 1]
    return Grown(model, scaling.replaced(**{key: getattr(latest, key) for key in keys}))


def _grown_once(model: Model, growth: ScheduledGrowth, number: int) -> Model:
    layers = None if growth.layers is None else tuple(growth.layers)
    counts = TokenCounts(growth.qkv_slot_num, growth.proj_slot_num, growth.ffn_slot_num, layers, growth.new_keys)
    try:
        return grown_config(model, counts)
    except UserError as error:
        raise UserError(f"growth[{number}]: {error}") from error


def lineage_entry(
    before: Checkpoint, after: Checkpoint, train_state: Mapping[str, Any], new_keys: NewKeys, *, scheduled: bool
) -> dict[str, Any]:
    """What TrainState.lineage says about a growth.

    Args:
        before, after: what grew, and what it became.
        train_state: progress at the growth, as TrainState.state_dict gives it.
        new_keys: what the new keys started as.
        scheduled: it is one of the run's own schedule.
    """
    iteration, model = train_state.get("iteration", 0), after.model_config
    return {
        "scheduled": scheduled,
        "iteration": iteration,
        "updates": iteration - train_state.get("skipped_iterations", 0),
        "consumed_tokens": train_state.get("consumed_tokens", 0),
        "added": describe(before.model_config, model),
        "new_keys": new_keys,
        "parameters": after.num_parameters,
        **{f"{kind}_slot_num": getattr(model, f"{kind}_slot_num") for kind in KINDS},
    }


def past_growths(lineage: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The lineage for a run that starts from this one's model: none of its growths is of the new run's schedule."""
    return [{**entry, "scheduled": False} for entry in lineage]


def growths_done(lineage: Sequence[Mapping[str, Any]]) -> int:
    """How many growths of its schedule a run has made."""
    return sum(1 for entry in lineage if entry.get("scheduled"))


def grown_as_saved(
    model: Model, scaling: ScalingConfig, saved: ModelSection, lineage: Sequence[Mapping[str, Any]]
) -> Grown[Model]:
    """Model and scaling of a run that goes on from a checkpoint.

    Args:
        model, scaling: as the YAML files say.
        saved: model of the checkpoint. How its tokens are divided into segments is taken over from it.
        lineage: of the checkpoint.

    Raises: UserError when the schedule does not lead to this model.
    """
    done = growths_done(lineage) if scaling.growth else 0
    if done > len(scaling.growth):
        raise UserError(
            f"growth: the run has made {done} growths of its schedule, the configuration lists "
            f"{len(scaling.growth)}; give the schedule the run was started with"
        )
    if saved.token_segments is None:
        return Grown(model, scaling)
    if model.token_segments == saved.token_segments:  # the checkpoint's own config.yml: the model since its last growth
        return after_growths(model, scaling, done, already=done)
    now = after_growths(_before_growths(model, saved, done), scaling, done)
    if now.model.token_segments != saved.token_segments:
        raise UserError(
            f"growth: the first {done} growths of the schedule do not lead to the model of the checkpoint; give the "
            "schedule the run was started with"
        )
    return now


def _before_growths(model: Model, saved: ModelSection, done: int) -> Model:
    """The configured model with the segments that the saved one had before the last `done` of its growths."""
    first = {kind: [block[: len(block) - done] for block in segments_of(saved, kind)] for kind in KINDS}
    for kind in KINDS:
        key = f"{kind}_slot_num"
        asked, total = getattr(model, key), max(map(sum, first[kind])) or None
        if asked != total:
            raise UserError(
                f"{key}: {asked} in the configuration, {total} in the checkpoint"
                + (f" before its {done} scheduled growths" if done else "")
                + "; use the configuration the model was trained with"
            )
    segments = None if len(first["qkv"][0]) == 1 else first
    return type(model)(**{**model.model_dump(), "token_segments": segments})


def is_due(growth: ScheduledGrowth, iteration: int, consumed_tokens: int) -> bool:
    """Is it time for a scheduled growth?"""
    if growth.at_iteration is not None:
        return iteration >= growth.at_iteration
    assert growth.at_tokens is not None, "one of the two is given"
    return consumed_tokens >= growth.at_tokens


def next_growth(growths: Sequence[ScheduledGrowth], lineage: Sequence[Mapping[str, Any]]) -> ScheduledGrowth | None:
    """The first scheduled growth that the run has not made yet."""
    done = growths_done(lineage)
    return growths[done] if done < len(growths) else None


def learning_rate_settings(
    options: OptimizationConfig,
    growths: Sequence[ScheduledGrowth],
    train_iters: int | None,
    lineage: Sequence[Mapping[str, Any]],
    now: Progress,
    tokens_an_update: int,
) -> tuple[OptimizationConfig, int]:
    """The optimization settings in force, and the update they start from.

    A growth with lr_policy restart has a schedule of its own, which ends where the next restart begins unless
    lr_decay_iters says otherwise; before the first, the run's own schedule does so.

    Args:
        options, growths, train_iters: of the run's configuration.
        now: where the run is; data that a smaller model's run has read counts among its tokens.
        tokens_an_update: of all ranks.
    """
    made = [entry for entry in lineage if entry.get("scheduled")]
    begun = [pair for pair in zip(made, growths, strict=False) if pair[1].lr_policy == "restart"]
    later = [growth for growth in growths[len(made) :] if growth.lr_policy == "restart"]
    since = Progress.of(begun[-1][0]) if begun else now
    end = _start_of(later[0], since, tokens_an_update) if later else train_iters
    first = since.iteration if begun else 0
    decay = None if end is None else max(1, min(end, train_iters or end) - first)
    if not begun:
        return options.replaced(lr_decay_iters=options.lr_decay_iters or (decay if later else None)), 0
    entry, growth = begun[-1]
    own = {"optimizer.params.lr": growth.lr, "warmup": growth.warmup, "min_lr": growth.min_lr}
    given = {key: value for key, value in own.items() if value is not None}
    return options.replaced(lr_decay_iters=growth.lr_decay_iters or decay, **given), int(entry["updates"])


def _start_of(growth: ScheduledGrowth, since: Progress, tokens_an_update: int) -> int:
    """The iteration at which a growth will be due, counted on from where the run is or was."""
    if growth.at_iteration is not None:
        return growth.at_iteration
    assert growth.at_tokens is not None, "one of the two is given"
    return since.iteration + max(0, math.ceil((growth.at_tokens - since.consumed_tokens) / tokens_an_update))
