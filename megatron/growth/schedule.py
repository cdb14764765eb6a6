"""Growth as part of a run: which stage it is in, the configuration of that stage, and when the next one is due.

A run with a growth schedule is described by one configuration, whose model section is the model before the first
growth. `TrainState.lineage` says how many stages are done; everything else follows from the two.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from megatron.config.schema import RunConfig
from megatron.config.sections.model import ModelSection
from megatron.config.sections.scaling import GrowthStage, NewKeys
from megatron.errors import UserError
from megatron.growth.plan import KINDS, TokenCounts, describe, grown_config, segments_of
from megatron.log import get_logger
from megatron.model.build import build_model


class Progress(NamedTuple):
    """Where a run is: finished iterations, and the tokens read by then."""

    iteration: int = 0
    consumed_tokens: int = 0

    @classmethod
    def of(cls, entry: Mapping[str, Any]) -> Progress:
        """Where the run was at a growth of its lineage."""
        return cls(int(entry["iteration"]), int(entry["consumed_tokens"]))


def stage_counts(stage: GrowthStage) -> TokenCounts:
    """The token counts of a scheduled growth."""
    layers = None if stage.layers is None else tuple(stage.layers)
    return TokenCounts(stage.qkv_slot_num, stage.proj_slot_num, stage.ffn_slot_num, layers, stage.new_keys)


def check_schedule(config: RunConfig, already: int = 0) -> None:
    """Raise a UserError when one of the growths to come is impossible, before anything is trained.

    So is one by fewer tokens than there are tensor ranks: some would have none to train, which ZeRO does not allow.

    Args:
        already: scheduled growths that the model of `config` has in it.
    """
    for number in range(already, len(config.scaling.growth)):
        _check_stage(config, number, already)
    model, ranks = stage_config(config, len(config.scaling.growth), already).model, config.parallel.model_parallel_size
    for kind, blocks in (model.token_segments or {}).items():
        fewest = min((size for block in blocks for size in block if size), default=ranks)
        if fewest < ranks:
            raise UserError(
                f"growth: {kind}_slot_num grows by {fewest} where model_parallel_size is {ranks}; each rank needs a "
                "new token: grow by more, or lower model_parallel_size"
            )


def _check_stage(config: RunConfig, number: int, already: int) -> None:
    stage, options = config.scaling.growth[number], config.optimization
    peak = options.optimizer.params.lr if stage.lr is None else stage.lr
    floor = options.min_lr if stage.min_lr is None else stage.min_lr
    if stage.lr_policy == "restart" and peak < floor:
        raise UserError(f"growth[{number}]: lr {peak:g} is below min_lr {floor:g}; give the stage a lower min_lr too")
    after = stage_config(config, number + 1, already).model
    if stage.freeze_old_tokens and not any(block[-1] for kind in KINDS for block in segments_of(after, kind)):
        raise UserError(f"growth[{number}]: freeze_old_tokens where no tokens are added; there is nothing to train")


def check_times(config: RunConfig, lineage: Sequence[Mapping[str, Any]], now: Progress, tokens_an_update: int) -> None:
    """Raise a UserError when the growths to come are out of order, and say so when the run ends before one of them."""
    last = now.iteration
    for number, stage in enumerate(config.scaling.growth):
        if number < stages_done(lineage):
            continue
        begin = max(now.iteration, _start_of(stage, now, tokens_an_update))
        if begin < last:
            raise UserError(
                f"growth[{number}]: comes at iteration {begin}, that before it at {last}; sort the stages by time"
            )
        if begin > (config.training.train_iters or begin):
            get_logger().info(
                "growth[%d] is not made: it comes at iteration %d, train_iters is %d",
                number, begin, config.training.train_iters,
            )  # fmt: skip
        last = begin


def stage_config(config: RunConfig, done: int, already: int = 0) -> RunConfig:
    """The run's configuration after its first `done` scheduled growths: model, and what is frozen or scaled.

    Args:
        already: growths that the model of `config` has in it.

    Raises: UserError naming the stage that asks for fewer tokens than there are.
    """
    model = config.model
    for number, stage in enumerate(config.scaling.growth[:done]):
        if number < already:
            continue
        try:
            model = grown_config(model, stage_counts(stage))
        except UserError as error:
            raise UserError(f"growth[{number}]: {error}") from error
    if not done:
        return config
    now = config.scaling.growth[done - 1]
    keys = ("new_keys", "freeze_old_tokens", "old_tokens_lr_scale", "new_tokens_lr_scale")
    scaling = config.scaling.model_copy(update={key: getattr(now, key) for key in keys})
    return config.model_copy(update={"model": model, "scaling": scaling})


def lineage_entry(
    before: ModelSection, after: ModelSection, train_state: Mapping[str, Any], new_keys: NewKeys, *, scheduled: bool
) -> dict[str, Any]:
    """What TrainState.lineage says about a growth.

    Args:
        train_state: progress at the growth, as TrainState.state_dict gives it.
        new_keys: what the new keys started as.
        scheduled: it is a stage of the run's own schedule.
    """
    iteration = train_state.get("iteration", 0)
    return {
        "scheduled": scheduled,
        "iteration": iteration,
        "updates": iteration - train_state.get("skipped_iterations", 0),
        "consumed_tokens": train_state.get("consumed_tokens", 0),
        "added": describe(before, after),
        "new_keys": new_keys,
        "parameters": build_model(after, device="meta").num_parameters(),
        **{f"{kind}_slot_num": getattr(after, f"{kind}_slot_num") for kind in KINDS},
    }


def past_growths(lineage: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The lineage for a run that starts from this one's model: none of its growths is of the new run's schedule."""
    return [{**entry, "scheduled": False} for entry in lineage]


def stages_done(lineage: Sequence[Mapping[str, Any]]) -> int:
    """How many growths of its schedule a run has made."""
    return sum(1 for entry in lineage if entry.get("scheduled"))


def resumed_config(config: RunConfig, saved: ModelSection, lineage: Sequence[Mapping[str, Any]]) -> RunConfig:
    """The configuration of the stage that a checkpoint is in.

    Args:
        config: as the YAML files say.
        saved: model of the checkpoint. How its tokens are divided into segments is taken over from it.
        lineage: of the checkpoint.

    Raises: UserError when the schedule does not lead to this model.
    """
    done = stages_done(lineage) if config.scaling.growth else 0
    if done > len(config.scaling.growth):
        raise UserError(
            f"growth: the run has made {done} growths of its schedule, the configuration lists "
            f"{len(config.scaling.growth)}; give the schedule the run was started with"
        )
    if saved.token_segments is None:
        return config
    if config.model.token_segments == saved.token_segments:  # the checkpoint's own config.yml: the model of this stage
        return stage_config(config, done, already=done)
    first = {kind: [block[: len(block) - done] for block in segments_of(saved, kind)] for kind in KINDS}
    totals = {f"{kind}_slot_num": max(map(sum, first[kind])) for kind in KINDS}
    for key, total in totals.items():
        if getattr(config.model, key) != total:
            raise UserError(
                f"{key}: {getattr(config.model, key)} in the configuration, {total} in the checkpoint"
                + (f" before its {done} scheduled growths" if done else "")
                + "; use the configuration the model was trained with"
            )
    segments = None if len(first["qkv"][0]) == 1 else first
    start = type(config.model)(**{**config.model.model_dump(), "token_segments": segments})
    now = stage_config(config.model_copy(update={"model": start}), done)
    if now.model.token_segments != saved.token_segments:
        raise UserError(
            f"growth: the first {done} stages of the schedule do not lead to the model of the checkpoint; give the "
            "schedule the run was started with"
        )
    return now


def is_due(stage: GrowthStage, iteration: int, consumed_tokens: int) -> bool:
    """Is it time for a scheduled growth?"""
    if stage.at_iteration is not None:
        return iteration >= stage.at_iteration
    assert stage.at_tokens is not None, "one of the two is given"
    return consumed_tokens >= stage.at_tokens


def next_stage(config: RunConfig, lineage: Sequence[Mapping[str, Any]]) -> GrowthStage | None:
    """The first scheduled growth that the run has not made yet."""
    done, stages = stages_done(lineage), config.scaling.growth
    return stages[done] if done < len(stages) else None


def learning_rate_schedule(
    config: RunConfig, lineage: Sequence[Mapping[str, Any]], now: Progress, tokens_an_update: int
) -> tuple[RunConfig, int]:
    """The optimization settings in force, and the update they start from.

    A stage with lr_policy restart has a schedule of its own, which ends where the next restart begins unless
    lr_decay_iters says otherwise; before the first, the run's own schedule does so.

    Args:
        now: where the run is; data that a smaller model's run has read counts among its tokens.
        tokens_an_update: of all ranks.
    """
    stages = config.scaling.growth
    scheduled = [entry for entry in lineage if entry.get("scheduled")] if stages else []
    begun = [n for n in range(len(scheduled)) if stages[n].lr_policy == "restart"]
    start = int(scheduled[begun[-1]]["updates"]) if begun else 0
    since = Progress.of(scheduled[begun[-1]]) if begun else now
    later = [stage for stage in stages[(begun[-1] + 1 if begun else 0) :] if stage.lr_policy == "restart"]
    end = _start_of(later[0], since, tokens_an_update) if later else config.training.train_iters
    first = since.iteration if begun else 0
    decay = None if end is None else max(1, min(end, config.training.train_iters or end) - first)
    options = config.optimization
    update: dict[str, Any] = {"lr_decay_iters": options.lr_decay_iters or (decay if later else None)}
    if begun:
        own = stages[begun[-1]]
        params = options.optimizer.params
        spec = {"params": params.model_copy(update={"lr": params.lr if own.lr is None else own.lr})}
        update = {
            "lr_decay_iters": own.lr_decay_iters or decay,
            "warmup": options.warmup if own.warmup is None else own.warmup,
            "min_lr": options.min_lr if own.min_lr is None else own.min_lr,
            "optimizer": options.optimizer.model_copy(update=spec),
        }
    return config.model_copy(update={"optimization": options.model_copy(update=update)}), start


def _start_of(stage: GrowthStage, since: Progress, tokens_an_update: int) -> int:
    """The iteration at which a stage will be due, counted on from where the run is or was."""
    if stage.at_iteration is not None:
        return stage.at_iteration
    assert stage.at_tokens is not None, "one of the two is given"
    return since.iteration + max(0, math.ceil((stage.at_tokens - since.consumed_tokens) / tokens_an_update))
