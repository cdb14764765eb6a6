"""Growing a checkpoint on disk, outside a run: the old one stays as it is, the new one is a run of its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron.checkpoint.new_folder import require_new
from megatron.config.schema import RunConfig
from megatron.config.sections.checkpoint import TOWER_KEYS
from megatron.config.sections.model import ModelSection
from megatron.config.sections.scaling import NewMoments, ScalingConfig
from megatron.errors import UserError
from megatron.exchange import canonical, open_checkpoint
from megatron.growth.grow import grown_checkpoint, lineage_entry
from megatron.growth.plan import TokenCounts, describe, grown_config
from megatron.growth.proof import Difference, compare_logits
from megatron.growth.schedule import past_growths
from megatron.tasks import task_of

_PROOF_SAMPLES = 2
"""What the proof compares outputs of."""


@dataclass(frozen=True)
class GrownCheckpoint:
    """A checkpoint that was grown: its lineage entry, and logits before and after."""

    entry: Mapping[str, Any]
    difference: Difference


def grow_checkpoint(
    source: str | Path,
    target: str | Path,
    counts: TokenCounts,
    *,
    seed: int | None = None,
    new_moments: NewMoments = "zero",
    config: RunConfig | None = None,
    environment: Mapping[str, Any] | None = None,
) -> GrownCheckpoint:
    """Add parameter tokens to a checkpoint; written completely or not at all, and only if logits do not change, which
    they do where new keys are `official`.

    Optimizer state, progress and random-number states are carried over. Growths that the lineage has already become
    history: the schedule of a run that continues from `target` has only those to come.

    Args:
        source: a run's folder or one of its checkpoints, an official pytorch_model.bin or training folder.
        target: folder of the new run; must not exist or be empty.
        seed: of what is drawn; default that of the run.
        new_moments: what Adam's second moments of the new tokens start as.
        config: of an official model; a training checkpoint has its own.
        environment: to be recorded beside the checkpoint.

    Raises: UserError for an impossible growth, a proof that fails, and files that cannot be read or written.
    """
    require_new(Path(target))
    base = open_checkpoint(source, config, key="IN")
    if base.iteration is not None and config is not None:
        raise UserError(f"--config: {base.folder} has its own configuration; leave the flag off")
    base.verify()
    settings, before = base.resolved(), base.model_config
    after = grown_config(before, counts)
    seed = int(settings["seed"]) if seed is None else seed
    grown = grown_checkpoint(base, after, seed, counts.keys, new_moments)
    inputs = task_of(before).example_inputs(before, settings, _PROOF_SAMPLES)
    difference = compare_logits(base, grown, inputs)
    of_average = compare_logits(base.averaged(), grown.averaged(), inputs) if base.has_ema else None
    if counts.keys != "official":
        difference.check(describe(before, after))
        if of_average is not None:
            of_average.check(f"{describe(before, after)} with averaged weights")
    entry = lineage_entry(base, grown, base.train_state, counts.keys, scheduled=False)
    entry["logit_difference"] = difference.largest
    if of_average is not None:
        entry["ema_logit_difference"] = of_average.largest
    lineage = [*past_growths(base.train_state.get("lineage", [])), entry]
    grown = replace(
        grown,
        settings=_settings_of_new_run(settings, after, str(target)),
        train_state={**base.train_state, "lineage": lineage},
    )
    canonical.write(target, grown, environment)
    return GrownCheckpoint(entry, difference)


def _settings_of_new_run(flat: Mapping[str, Any], model: ModelSection, folder: str) -> dict[str, Any]:
    """The resolved configuration with the grown model, folders of its own, and no growth behind or before it."""
    folders = {"save": folder, "load": folder, "iteration": None, "pretrain_partial_init": None}
    folders |= dict.fromkeys(TOWER_KEYS)
    return {**flat, **model.model_dump(mode="json"), **ScalingConfig().model_dump(mode="json"), **folders}
