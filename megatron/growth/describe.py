"""What is in a training checkpoint: progress, sizes, tokens by stage of growth, lineage, optimizer, files."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from megatron.checkpoint.tensors import Tensors
from megatron.config.sections.model import TOKENFORMER, ModelSection, RowNorm
from megatron.errors import UserError
from megatron.exchange import Checkpoint, canonical, open_checkpoint
from megatron.exchange.names import TAU, in_model_order, is_parameter
from megatron.growth.plan import KINDS, segments_of
from megatron.model.build import build_model
from megatron.model.layered import block_of
from megatron.model.pattention import named_pattentions, norm_groups
from megatron.mpu.roles import role_of

_MODEL_KEYS = (
    "num_layers", "hidden_size", "num_attention_heads", "seq_length", "padded_vocab_size", "norm_activation_type",
)  # fmt: skip

_SIZES = {"seq_length": "positions", "padded_vocab_size": "embedding rows"}


def describe_checkpoint(path: str | Path, verify: bool = False) -> dict[str, Any]:
    """Facts about a checkpoint, ready for JSON.

    Args:
        path: a run's folder (its latest checkpoint) or a global_step folder.
        verify: compare size and checksum of every file too.

    Raises: UserError when there is no checkpoint or it is damaged.
    """
    folder = canonical.matches(Path(path)) if os.path.isdir(path) else None
    if folder is None:
        raise UserError(f"{path}: no checkpoint; give a run's folder or one of its global_step folders")
    checkpoint = open_checkpoint(folder)
    if verify:
        checkpoint.verify()
    config, state, settings = checkpoint.model_config, checkpoint.train_state, checkpoint.resolved()
    return {
        "folder": str(folder),
        "iteration": checkpoint.iteration,
        "consumed_tokens": state.get("consumed_tokens", 0),
        "consumed_samples": state.get("consumed_samples", 0),
        "skipped_iterations": state.get("skipped_iterations", 0),
        "parameters": checkpoint.num_parameters,
        "parameters_of": _parts(checkpoint.tensors, config),
        "model": {key: getattr(config, key) for key in _MODEL_KEYS if key in type(config).model_fields},
        "blocks": dict(Counter(kind for tower in config.towers().values() for kind in tower.layer_kinds)),
        "segments": _segments(config),
        "segment_norms": config.segment_norms,
        "tau_tokens": _tau_tokens(checkpoint),
        "lineage": state.get("lineage", []),
        "optimizer": {"type": (settings.get("optimizer") or {}).get("type"), **_moments(checkpoint.tensors)},
        "ema_decay": settings.get("ema_decay") if checkpoint.has_ema else None,
        "bytes": {
            kind: sum(f.stat().st_size for f in folder.glob(f"{kind}*")) for kind in ("model", "optimizer", "ema", "")
        },
        "checksums": "hold" if verify else "not checked",
    }


def _parts(tensors: Tensors, config: ModelSection) -> dict[str, int]:
    """Parameters by part of the model; blocks by their kind."""
    parts: Counter[str] = Counter()
    for name in filter(is_parameter, in_model_order(tensors.names("model"))):
        prefix, tower = config.tower_of(name)
        block = block_of(name)
        kind = f"{tower.layer_kinds[block[1]]} blocks" if block else name.removeprefix(prefix).partition(".")[0]
        parts[_of_tower(prefix, kind)] += math.prod(tensors.shape("model", name))
    return dict(parts)


def _of_tower(prefix: str, what: str) -> str:
    """What something is called in a tower whose names begin so: `qkv`, or `text qkv`."""
    return f"{prefix.replace('.', ' ')}{what}"


def _segments(config: ModelSection) -> dict[str, list[list[int]]]:
    """For each kind of layer, of each tower that has some, block by block the tokens of each growth."""
    return {
        _of_tower(prefix, kind): segments_of(tower, kind)
        for prefix, tower in config.towers().items()
        for kind in KINDS
        if TOKENFORMER in tower.layer_kinds
    }


def _tau_tokens(checkpoint: Checkpoint) -> dict[str, list[int | list[int]]]:
    """For each kind of layer, tau^2 block by block, of several row norms each; q, k and v of a block are alike."""
    taus: dict[str, list[int | list[int]]] = {}
    for layer, module in named_pattentions(build_model(checkpoint.model_config, device="meta")):
        if not layer.endswith((".key", ".value")):
            projection = role_of(module.get_parameter("key_tokens_0")).projection or ""
            kind = _of_tower(checkpoint.model_config.tower_of(layer)[0], projection)
            taus.setdefault(kind, []).append(checkpoint.tensors.tensor("model", f"{layer}.{TAU}").tolist())
    return taus


def _moments(tensors: Tensors) -> dict[str, Any]:
    """What the optimizer keeps, and for how many parameters (a frozen one has no state)."""
    moments: dict[str, set[str]] = {}
    for full_name in tensors.names("optimizer"):
        moment, _, name = full_name.partition("/")
        moments.setdefault(moment, set()).add(name)
    with_state = set[str]().union(*moments.values())
    return {
        "state": sorted(moments),
        "parameters_with_state": sum(math.prod(tensors.shape("model", name)) for name in with_state),
        "updates": sorted({int(tensors.tensor("optimizer", f"step/{name}")) for name in moments.get("step", ())}),
    }


def as_text(facts: dict[str, Any]) -> str:
    """The facts of `describe_checkpoint` for reading, some twenty lines."""
    model, optimizer, size = facts["model"], facts["optimizer"], facts["bytes"]
    blocks = ", ".join(f"{count} {kind}" for kind, count in facts["blocks"].items())
    lines = [
        facts["folder"],
        f"  iteration    {facts['iteration']:,}; {facts['consumed_tokens']:,} tokens, {facts['consumed_samples']:,} "
        f"samples consumed, {facts['skipped_iterations']:,} updates skipped",
        f"  parameters   {facts['parameters']:,}: "
        + ", ".join(f"{part} {count:,}" for part, count in facts["parameters_of"].items()),
        f"  model        {blocks} blocks of width {model['hidden_size']}, {model['num_attention_heads']} heads, "
        + "".join(f"{model[key]} {what}, " for key, what in _SIZES.items() if key in model)
        + model["norm_activation_type"],
        *_token_lines(facts),
        *_lineage_lines(facts["lineage"]),
        f"  optimizer    {_optimizer_text(optimizer)}",
        *([f"  EMA          of every parameter, decay {facts['ema_decay']}"] if size["ema"] else []),
        f"  on disk      {_megabytes(size[''])}: model {_megabytes(size['model'])}, optimizer "
        f"{_megabytes(size['optimizer'])}" + (f", EMA {_megabytes(size['ema'])}" if size["ema"] else ""),
        f"  checksums    {facts['checksums']}" + ("" if facts["checksums"] == "hold" else " (--verify)"),
    ]
    return "\n".join(lines)


def _token_lines(facts: dict[str, Any]) -> list[str]:
    lines = []
    for kind, blocks in facts["segments"].items():
        taus = iter(facts["tau_tokens"].get(kind, ()))
        described = [
            _segments_text(block, facts["segment_norms"], next(taus)) if sum(block) else "none" for block in blocks
        ]
        name = f"{kind} " if " " in kind else f"{kind:<5}"
        lines += [f"  {name}tokens  {text}, {where}" for text, where in _runs(described)]
    return lines


def _segments_text(sizes: list[int], norms: Sequence[RowNorm] | None, tau: int | list[int]) -> str:
    """`40 + 32 (tau^2 40)`, and with several row norms `40 + 32 | 24 (tau^2 40 | 24)`."""
    groups = norm_groups(sizes, norms)
    if len(groups) < 2:
        return f"{' + '.join(map(str, sizes))} (tau^2 {tau})"
    parts = [" + ".join(str(sizes[i]) for i in group) for group in groups]
    return f"{' | '.join(parts)} (tau^2 {' | '.join(map(str, tau if isinstance(tau, list) else [tau]))})"


def _runs(values: Iterable[str]) -> list[tuple[str, str]]:
    """Equal neighbours together: (value, `layers first to last`)."""
    runs: list[tuple[str, int, int]] = []
    for index, value in enumerate(values):
        if runs and runs[-1][0] == value:
            runs[-1] = (value, runs[-1][1], index)
        else:
            runs.append((value, index, index))
    return [(value, f"layer {a}" if a == b else f"layers {a} to {b}") for value, a, b in runs]


def _lineage_lines(lineage: list[dict[str, Any]]) -> list[str]:
    if not lineage:
        return ["  lineage      never grown"]
    lines = []
    for number, entry in enumerate(lineage, 1):
        difference = entry.get("logit_difference")
        proof = "not proven" if difference is None else f"logits differed by {difference:.1e}"
        keys = f" by {entry['new_keys']} keys" if entry.get("new_keys", "zero") != "zero" else ""
        keys += " with a row norm of their own" if entry.get("row_norm") == "segment" else ""
        how = "scheduled" if entry.get("scheduled") else "not of this run's schedule"
        lines.append(
            f"  growth {number}     at iteration {entry['iteration']:,} ({entry['consumed_tokens']:,} tokens): "
            f"{entry['added']}{keys}; {entry['parameters']:,} parameters; {proof}; {how}"
        )
    return lines


def _optimizer_text(optimizer: dict[str, Any]) -> str:
    if not optimizer["state"]:
        return f"{optimizer['type']} without state"
    updates = f", updates {', '.join(map(str, optimizer['updates']))}" if optimizer["updates"] else ""
    return (
        f"{optimizer['type']}: {', '.join(optimizer['state'])} of {optimizer['parameters_with_state']:,} parameters"
        + updates
    )


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"
