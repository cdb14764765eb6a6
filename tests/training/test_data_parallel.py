"""Two data-parallel processes do what one does on the same batches, at every ZeRO stage, checkpoints included."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megatron.checkpoint.store import CheckpointReader
from megatron.config import RunConfig
from megatron.training import train
from tests.ranks import run_ranks

pytestmark = pytest.mark.processes

STAGES = (0, 1, 2, 3)


def train_all(configs: list[RunConfig]) -> list[int]:
    return [train(config).iteration for config in configs]


def read(folder: Path, iteration: int) -> dict[str, torch.Tensor]:
    reader = CheckpointReader(folder / f"global_step{iteration}")
    return {f"{kind}/{n}": reader.tensor(kind, n) for kind in ("model", "optimizer") for n in reader.names(kind)}


def losses(folder: Path) -> list[float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line.get("lm_loss", line.get("valid_lm_loss")) for line in lines]


@pytest.mark.usefixtures("single_process")
def test_two_ranks_equal_one_and_checkpoints_change_hands(
    tiny_config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    keys = {"train_batch_size": 8, "train_iters": 5, "eval_interval": 5, "lr_decay_iters": 20}
    one = tmp_path / "one"
    train(tiny_config(**keys, train_micro_batch_size_per_gpu=8, save=str(one)))
    folders = {stage: tmp_path / f"zero{stage}" for stage in STAGES}
    two = {"train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 2}
    configs = [
        tiny_config(**{**keys, **two}, save=str(folder), load=str(folder), zero_optimization={"stage": stage})
        for stage, folder in folders.items()
    ]
    assert run_ranks(2, train_all, configs) == [[5, 5, 5, 5]] * 2
    expected = read(one, 5)
    for stage, folder in folders.items():
        assert losses(folder) == pytest.approx(losses(one), abs=1e-5), stage
        found = read(folder, 5)
        assert found.keys() == expected.keys()
        for name in expected:
            assert torch.allclose(found[name], expected[name], rtol=0, atol=1e-5), (stage, name)

    # One process goes on from what two saved at each stage, as from its own checkpoint.
    train(tiny_config(**{**keys, "train_iters": 10}, train_micro_batch_size_per_gpu=8, load=str(one), save=str(one)))
    for folder in folders.values():
        more = {**keys, "train_iters": 10, "train_micro_batch_size_per_gpu": 8}
        train(tiny_config(**more, save=str(folder), load=str(folder)))
        assert losses(folder) == pytest.approx(losses(one), abs=1e-5)
