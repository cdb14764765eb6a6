"""Growing a checkpoint on disk, outside a run: the old one stays as it is, the new one is a run of its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron.checkpoint.new_folder import require_new
from megatron.config.schema import RunConfig
from megatron.config.sections.model import ModelConfig
from megatron.config.sections.scaling import ScalingConfig
from megatron.data.indexed import IndexedDataset
from megatron.errors import UserError
from megatron.exchange import canonical, open_checkpoint
from megatron.growth.grow import grown_checkpoint
from megatron.growth.plan import TokenCounts, describe, grown_config
from megatron.growth.proof import Difference, compare_logits
from megatron.growth.schedule import lineage_entry, past_growths

# What the proof compares logits of.
_PROOF_SEQUENCES, _PROOF_LENGTH = 2, 512


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
    config: RunConfig | None = None,
    environment: Mapping[str, Any] | None = None,
) -> GrownCheckpoint:
    """Add parameter tokens to a checkpoint; written completely or not at all, and only if logits do not change.

    Optimizer state, progress and random-number states are carried over. Growths that the lineage has already become
    history: the schedule of a run that continues from `target` has only those to come.

    Args:
        source: a run's folder or one of its checkpoints, an official pytorch_model.bin or training folder.
        target: folder of the new run; must not exist or be empty.
        seed: of the new values or rotations; default that of the run.
        config: of an official model; a training checkpoint has its own.
        environment: to be recorded beside the checkpoint.

    Raises: UserError for an impossible growth, a proof that fails, and files that cannot be read or written.
    """
    require_new(Path(target))
    base = open_checkpoint(source, config, key="IN")
    if base.iteration is not None and config is not None:
        raise UserError(f"--config: {base.folder} has its own configuration; leave the flag off")
    base.verify()
    settings, before = base.resolved(), base.language
    after = grown_config(before, counts)
    seed = int(settings["seed"]) if seed is None else seed
    grown = grown_checkpoint(base, after, seed, counts.new_keys)
    if (ids := _ids_of_data(settings, after)) is None:
        ids = _random_ids(after)
    difference = compare_logits(base, grown, [ids])
    difference.check(describe(before, after))
    entry = lineage_entry(before, after, base.train_state, counts.new_keys, scheduled=False)
    entry["logit_difference"] = difference.largest
    lineage = [*past_growths(base.train_state.get("lineage", [])), entry]
    grown = replace(
        grown,
        settings=_settings_of_new_run(settings, after, str(target)),
        train_state={**base.train_state, "lineage": lineage},
    )
    canonical.write(target, grown, environment)
    return GrownCheckpoint(entry, difference)


def _settings_of_new_run(flat: Mapping[str, Any], model: ModelConfig, folder: str) -> dict[str, Any]:
    """The resolved configuration with the grown model, folders of its own, and no growth behind or before it."""
    folders = {"save": folder, "load": folder, "iteration": None, "pretrain_partial_init": None}
    return {**flat, **model.model_dump(mode="json"), **ScalingConfig().model_dump(mode="json"), **folders}


def _ids_of_data(flat: Mapping[str, Any], model: ModelConfig) -> Tensor | None:
    """The first tokens [b, s] of the run's data; None where it is not there or belongs to another tokenizer."""
    prefix = flat.get("data_path") or (flat.get("train_data_paths") or [None])[0]
    if prefix is None or not Path(f"{prefix}.idx").is_file():
        return None
    length = min(model.seq_length, _PROOF_LENGTH)
    ids: list[int] = []
    dataset = IndexedDataset(prefix)
    for number in range(len(dataset)):
        ids.extend(dataset.get(number, length=_PROOF_SEQUENCES * length - len(ids)).tolist())
        if len(ids) == _PROOF_SEQUENCES * length:
            break
    rows = len(ids) // length
    found = torch.tensor(ids[: rows * length]).view(rows, length)
    return found if rows and int(found.max()) < (model.padded_vocab_size or 0) else None


def _random_ids(model: ModelConfig) -> Tensor:
    vocabulary = model.vocab_size or model.padded_vocab_size
    assert vocabulary is not None, "a model with tensors has an embedding"
    shape = (_PROOF_SEQUENCES, min(model.seq_length, _PROOF_LENGTH))
    return torch.randint(vocabulary, shape, generator=torch.Generator().manual_seed(0))
