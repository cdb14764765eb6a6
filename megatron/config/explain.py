"""What `--explain` prints: every value, where it came from, what is ignored and why."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from typing import Any

from megatron.config.hostfile import missing_hostfile
from megatron.config.load import Resolved
from megatron.config.schema import SECTIONS, RunConfig
from megatron.config.sections.model import ModelConfig


def explain(resolved: Resolved) -> str:
    """The text of `--explain`: a table of key, value and source for each section, then the ignored keys."""
    lines: list[str] = []
    followed = followed_values(resolved.config)
    hostfile = missing_hostfile(resolved.config.launch, os.environ)
    for name in SECTIONS:
        leaves = list(_leaves(getattr(resolved.config, name).model_dump(mode="json")))
        lines += [f"{name}:"] if leaves else []
        for key, value in leaves:
            shown, source = value, "default"
            if key in resolved.derived:
                source = f"derived: {resolved.derived[key]}"
            elif key in resolved.settings:
                source = resolved.settings[key].source
            elif key in followed:
                shown, reason = followed[key]
                source = f"derived: {reason}"
            if key == "hostfile" and hostfile:
                source += f": {hostfile.partition(': ')[2]}"
            lines.append(f"  {key:<40} {_form(shown):<32} {source}")
    lines.append("ignored:" if resolved.ignored else "ignored: nothing")
    lines += [
        f"  {setting.spelling:<40} {_form(setting.value):<32} {setting.source}: {reason}"
        for setting, reason in resolved.ignored
    ]
    return "\n".join(lines)


def followed_values(config: RunConfig) -> dict[str, tuple[Any, str]]:
    """Unset keys whose value follows from other keys: (value, why)."""
    iters = config.optimization.lr_decay_iters or config.training.train_iters
    found = {
        "precision": (config.precision.dtype, "fp16.enabled and bf16.enabled"),
        "lr_decay_iters": (iters, "train_iters"),
        "log_dir": (config.checkpoint.save, "save"),
    }
    model = config.model
    if isinstance(model, ModelConfig):
        found["final_norm"] = model.final_norm_kind, "norm"
        found["max_position_embeddings"] = model.seq_length, "seq_length"
        found["intermediate_size"] = 4 * model.hidden_size, "4 * hidden_size"
    return found


def _leaves(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _form(value: Any) -> str:
    return json.dumps(value)
