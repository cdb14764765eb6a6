"""Small grown runs and what they left behind."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron.checkpoint.store import CheckpointReader
from megatron.config import RunConfig
from megatron.inference import load_model
from megatron.training import train

MakeConfig = Callable[..., RunConfig]

# The tiny model of tests/conftest.py has 24 / 24 / 40 tokens.
COUNTS = {"qkv_slot_num": 48, "proj_slot_num": 36, "ffn_slot_num": 72}
CONTINUE = {"lr_policy": "continue"}
# The usual epsilon of 1e-8 would turn rounding errors of gradients near zero into different updates.
STEADY = {"optimizer": {"type": "Adam", "params": {"lr": 1e-3, "betas": [0.9, 0.95], "eps": 1e-6}}}

TENSOR, PIPELINE = {"model_parallel_size": 2}, {"pipe_parallel_size": 2}
DATA = {"train_micro_batch_size_per_gpu": 2}


def zero(number: int) -> dict[str, Any]:
    """The ZeRO stage of a run."""
    table: dict[str, Any] = {"stage": number}
    if number == 3:
        table["stage3_param_persistence_threshold"] = 0  # else parameters as small as these stay gathered
    return {"zero_optimization": table}


def stage(at: int, **keys: Any) -> dict[str, Any]:
    """A scheduled growth to COUNTS unless told otherwise."""
    return {"at_iteration": at, **COUNTS, **keys}


def run(config: MakeConfig, folder: Path, **keys: Any) -> None:
    train(config(**{"save": str(folder), "load": str(folder), **keys}))


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def metric(folder: Path, key: str = "lm_loss") -> dict[int, float]:
    return {line["iteration"]: line[key] for line in lines(folder) if key in line}


def checkpoint(folder: Path, iteration: int | None = None) -> CheckpointReader:
    name = (folder / "latest").read_text().strip() if iteration is None else f"global_step{iteration}"
    return CheckpointReader(folder / name)


def tensors(
    folder: Path, iteration: int | None = None, kinds: tuple[str, ...] = ("model", "optimizer", "ema")
) -> dict[str, Tensor]:
    reader = checkpoint(folder, iteration)
    return {f"{kind}/{n}": reader.tensor(kind, n) for kind in kinds for n in reader.names(kind)}


def state(folder: Path, iteration: int | None = None) -> dict[str, Any]:
    return checkpoint(folder, iteration).train_state


def is_new(name: str, growth: int = 1) -> bool:
    return name.endswith(f"_tokens_{growth}")


def assert_equal(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    for name in left:
        assert torch.equal(left[name], right[name]), name


def logits(path: Path, ids: Tensor) -> Tensor:
    with torch.no_grad():
        found: Tensor = load_model(path, dtype=torch.float64)(ids)
    return found


def worst(a: Tensor, b: Tensor) -> float:
    return (a - b).abs().max().item()
