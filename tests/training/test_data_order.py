"""The order of a run's data: as GPT-NeoX has it in a new run, and as it was in one that goes on."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron.config import RunConfig
from megatron.data import GPTDataset, IndexedDataset
from megatron.errors import UserError
from megatron.mpu.layout import SINGLE
from megatron.tasks import build_task
from megatron.training import train
from megatron.training.data import RunData
from megatron.training.state import TrainState

pytestmark = pytest.mark.usefixtures("single_process")
MakeConfig = Callable[..., RunConfig]
KEYS: dict[str, Any] = {"eval_interval": 2, "eval_iters": 2, "train_iters": 20}
BATCH = 4


def state_of(folder: Path, iteration: int) -> dict[str, Any]:
    return json.loads((folder / f"global_step{iteration}" / "train_state.json").read_text())


def valid_set(config: RunConfig, state: TrainState) -> Any:
    return RunData(build_task(config), state, config.update_size(1), SINGLE.data).sets.valid


def losses(folder: Path, name: str) -> dict[int, float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {line["iteration"]: line[name] for line in lines if name in line}


@pytest.mark.parametrize("iterations", [20, 7, 1])
def test_the_validation_set_is_sized_for_all_evaluations(tiny_config: MakeConfig, iterations: int) -> None:
    config, state = tiny_config(**{**KEYS, "train_iters": iterations}), TrainState()
    valid = valid_set(config, state)
    # GPT-NeoX: (train_iters // eval_interval + 1) * eval_iters * train_batch_size samples.
    samples = (iterations // 2 + 1) * 2 * BATCH
    corpus = IndexedDataset(config.data.data_path)
    expected = GPTDataset(corpus, 16, config.training.seed, samples, documents=valid.documents)
    assert state.epoch_blocks["valid/0"] == expected.epoch_blocks
    assert all(np.array_equal(valid[i], expected[i]) for i in range(2 * BATCH))


def test_each_set_of_a_blend_is_sized_for_all_evaluations(tiny_config: MakeConfig, corpus_prefix: str) -> None:
    paths = {"data_path": None, "train_data_paths": [corpus_prefix], "valid_data_paths": [corpus_prefix] * 2}
    config, state = tiny_config(**{**KEYS, "train_iters": 2000}, **paths), TrainState()
    valid = valid_set(config, state)
    per_set = -(-1001 * 2 * BATCH * 0.5 * 1.005 // 1)
    expected = GPTDataset(IndexedDataset(corpus_prefix), 16, config.training.seed, int(per_set))
    assert state.epoch_blocks["valid/0"] == state.epoch_blocks["valid/1"] == expected.epoch_blocks != [1]
    assert np.array_equal(valid[0], expected[0]) and len(valid) == 1001 * 2 * BATCH


def test_a_run_that_goes_on_keeps_its_validation_order(tiny_config: MakeConfig) -> None:
    config = tiny_config(**KEYS)
    state = TrainState(iteration=10, consumed_samples=40, epoch_blocks={"train/0": [1], "valid/0": [1]})
    first = valid_set(config, state)
    assert state.epoch_blocks["valid/0"] == [1]
    longer = TrainState(iteration=10, consumed_samples=40, epoch_blocks=state.epoch_blocks)
    more = tiny_config(**{**KEYS, "train_iters": 4000})
    again = valid_set(more, longer)
    assert longer.epoch_blocks["valid/0"] == [1] and np.array_equal(again[7], first[7])


def test_an_evaluation_in_between_does_not_lose_it(tiny_config: MakeConfig, tmp_path: Path) -> None:
    folders = {"save": str(tmp_path), "load": str(tmp_path), "checkpoint_factor": 2}
    train(tiny_config(**{**KEYS, "train_iters": 2}, **folders))
    first = state_of(tmp_path, 2)["epoch_blocks"]["valid/0"]
    train(tiny_config(**{**KEYS, "train_iters": 4, "eval_iters": 0}, **folders))
    assert state_of(tmp_path, 4)["epoch_blocks"]["valid/0"] == first


def test_a_thousand_million_updates_start_in_seconds_and_resume_exactly(
    tiny_config: MakeConfig, tmp_path: Path
) -> None:
    keys = {**KEYS, "train_iters": 10**9, "lr_decay_iters": 10**9, "eval_interval": 1000}
    start = time.monotonic()
    for name, stops in (("whole", (4,)), ("parts", (2, 4))):
        folders = {"save": str(tmp_path / name), "load": str(tmp_path / name)}
        for stop in stops:
            train(tiny_config(**keys, **folders, exit_interval=stop))
    assert time.monotonic() - start < 60
    assert losses(tmp_path / "parts", "lm_loss") == losses(tmp_path / "whole", "lm_loss")
    blocks = state_of(tmp_path / "parts", 4)["epoch_blocks"]
    assert blocks == state_of(tmp_path / "whole", 4)["epoch_blocks"] and blocks["train/0/later"] == blocks["train/0"]


def test_negative_ids_are_no_indices(tiny_config: MakeConfig) -> None:
    with pytest.raises(UserError, match="data_path: the data has token id -2"):
        build_task(tiny_config()).check(torch.tensor([[5, -2]]))
