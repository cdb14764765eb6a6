"""What is in a training checkpoint: progress, sizes, tokens by stage of growth, lineage, optimizer, files."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from megatron.checkpoint.store import CheckpointReader, find_checkpoint
from megatron.config.sections.model import TOKENFORMER, ModelSection
from megatron.errors import UserError
from megatron.growth.plan import KINDS, segments_of
from megatron.model import Pattention
from megatron.model.build import build_model
from megatron.model.compatibility import saved_model_config
from megatron.model.layered import LayeredModel

_MODEL_KEYS = (
    "num_layers", "hidden_size", "num_attention_heads", "seq_length", "padded_vocab_size", "norm_activation_type",
)  # fmt: skip


def describe_checkpoint(path: str | Path, verify: bool = False) -> dict[str, Any]:
    """Facts about a checkpoint, ready for JSON.

    Args:
        path: a run's folder (its latest checkpoint) or a global_step folder.
        verify: compare size and checksum of every file too.

    Raises: UserError when there is no checkpoint or it is damaged.
    """
    folder = find_checkpoint(path) if os.path.isdir(path) else None
    if folder is None:
        raise UserError(f"{path}: no checkpoint; give a run's folder or one of its global_step folders")
    reader = CheckpointReader(folder, verify)
    config, state = saved_model_config(reader), reader.train_state
    model = build_model(config, device="meta")
    return {
        "folder": str(folder),
        "iteration": reader.iteration,
        "consumed_tokens": state.get("consumed_tokens", 0),
        "consumed_samples": state.get("consumed_samples", 0),
        "skipped_iterations": state.get("skipped_iterations", 0),
        "parameters": model.num_parameters(),
        "parameters_of": _parts(model, config),
        "model": {key: getattr(config, key) for key in _MODEL_KEYS},
        "blocks": dict(Counter(config.layer_kinds)),
        "segments": {kind: segments_of(config, kind) for kind in KINDS if TOKENFORMER in config.layer_kinds},
        "tau_tokens": _tau_tokens(reader, model),
        "lineage": state.get("lineage", []),
        "optimizer": _optimizer(reader),
        "bytes": {kind: sum(f.stat().st_size for f in folder.glob(f"{kind}*")) for kind in ("model", "optimizer", "")},
        "checksums": "hold" if verify else "not checked",
    }


def _parts(model: LayeredModel, config: ModelSection) -> dict[str, int]:
    """Parameters by part of the model; blocks by their kind."""
    parts: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        part = name.split(".")[0]
        is_block = part == "layers"
        parts[f"{config.layer_kinds[int(name.split('.')[1])]} blocks" if is_block else part] += parameter.numel()
    return dict(parts)


def _tau_tokens(reader: CheckpointReader, model: LayeredModel) -> dict[str, list[int]]:
    """For each kind of layer, tau^2 block by block; q, k and v of a block are alike."""
    taus: dict[str, list[int]] = {}
    for name, module in model.named_modules():
        if isinstance(module, Pattention):
            kind = {"proj": "proj", "mlp": "ffn"}.get(name.rpartition(".")[2], "qkv")
            if kind == "qkv" and not name.endswith("query"):
                continue
            taus.setdefault(kind, []).append(int(reader.tensor("model", f"{name}.tau_tokens")))
    return taus


def _optimizer(reader: CheckpointReader) -> dict[str, Any]:
    """Its type, what it keeps, and for how many parameters (a frozen one has no state)."""
    moments: dict[str, set[str]] = {}
    for full_name in reader.names("optimizer"):
        moment, _, name = full_name.partition("/")
        moments.setdefault(moment, set()).add(name)
    shapes = {name: reader.shape("model", name) for name in set().union(*moments.values())}
    return {
        "type": (reader.config.get("optimizer") or {}).get("type"),
        "state": sorted(moments),
        "parameters_with_state": sum(_size(shape) for shape in shapes.values()),
        "updates": sorted({int(reader.tensor("optimizer", f"step/{name}")) for name in moments.get("step", ())}),
    }


def _size(shape: Sequence[int]) -> int:
    product = 1
    for length in shape:
        product *= length
    return product


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
        f"{model['seq_length']} positions, {model['padded_vocab_size']} embedding rows, "
        f"{model['norm_activation_type']}",
        *_token_lines(facts),
        *_lineage_lines(facts["lineage"]),
        f"  optimizer    {_optimizer_text(optimizer)}",
        f"  on disk      {_megabytes(size[''])}: model {_megabytes(size['model'])}, optimizer "
        f"{_megabytes(size['optimizer'])}",
        f"  checksums    {facts['checksums']}" + ("" if facts["checksums"] == "hold" else " (--verify)"),
    ]
    return "\n".join(lines)


def _token_lines(facts: dict[str, Any]) -> list[str]:
    lines = []
    for kind, blocks in facts["segments"].items():
        taus = iter(facts["tau_tokens"].get(kind, ()))
        described = [
            f"{' + '.join(map(str, block))} (tau^2 {next(taus)})" if sum(block) else "none" for block in blocks
        ]
        lines += [f"  {kind:<5}tokens  {text}, {where}" for text, where in _runs(described)]
    return lines


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
        keys = " by rotated keys" if entry.get("new_keys") == "rotated" else ""
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
