"""Image runs that are loaded by worker processes: the same bits, and mistakes in one line."""

from __future__ import annotations

import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron.checkpoint.store import CheckpointReader
from megatron.config import RunConfig
from megatron.data import IndexedDataset, IndexedDatasetBuilder, batches
from megatron.errors import UserError, run_command
from megatron.training import data as training_data
from megatron.training import train
from tests.faults.injected import Fault
from tests.ranks import run_ranks, start_process
from tests.tasks.image_runs import config_of, write_images
from tests.tasks.test_images import EVERYTHING
from tests.training.cases import metrics

pytestmark = [pytest.mark.usefixtures("single_process"), pytest.mark.filterwarnings("ignore:This DataLoader will")]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_images(tmp_path_factory.mktemp("images") / "corners")


def train_and_be_killed(config: RunConfig, updates: int) -> None:
    """SIGKILL comes after so many updates."""
    Fault("kill", 0, updates).install(0)
    train(config)


def train_recorded(config: RunConfig) -> list[tuple[int, int]]:
    """Train, once a killed run has let go of the folder; (first sample, loader processes) of what was asked for."""
    asked = list[tuple[int, int]]()

    def recorded(dataset: Any, *arguments: Any) -> Any:
        asked.append((arguments[1], arguments[5]))
        return batches(dataset, *arguments)

    training_data.batches = recorded
    deadline = time.monotonic() + 30
    while True:  # the loader processes of a killed run notice within seconds, and hold its lock till then
        try:
            train(config)
            return asked
        except UserError as error:
            assert "another run is writing" in str(error) and time.monotonic() < deadline
            time.sleep(0.5)


@pytest.mark.launches
@pytest.mark.processes
def test_a_run_is_the_same_with_other_workers_after_a_kill(images: str, tmp_path: Path) -> None:
    # Each run has a process of its own, as users' runs have: what is left behind by other tests may change last digits.
    keys = {**EVERYTHING, "eval_interval": 2, "checkpoint_factor": 2, "async_save": False}
    [asked] = run_ranks(1, train_recorded, config_of(images, tmp_path / "whole", **keys))
    process = start_process(train_and_be_killed, config_of(images, tmp_path / "parts", **keys, num_workers=1), 3)
    process.join()
    assert process.exitcode == -signal.SIGKILL and (tmp_path / "parts/latest").read_text().strip() == "global_step2"
    asked += run_ranks(1, train_recorded, config_of(images, tmp_path / "parts", **keys, num_workers=3))[0]
    assert {workers for _, workers in asked} == {0, 3} and (0, 3) in asked, "an evaluation has workers too"
    for name in ("loss", "valid_loss", "valid_acc1", "test_loss"):
        assert metrics(tmp_path / "whole", name) == metrics(tmp_path / "parts", name)
    whole, parts = (CheckpointReader(tmp_path / name / "global_step5") for name in ("whole", "parts"))
    for kind in ("model", "optimizer"):
        assert all(whole.tensor(kind, name).equal(parts.tensor(kind, name)) for name in whole.names(kind))


@pytest.mark.launches
@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_broken_image_ends_a_run_in_one_line(
    images: str, tmp_path: Path, num_workers: int, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = IndexedDataset(images)
    with IndexedDatasetBuilder(tmp_path / "x_image_document", np.uint8) as builder:
        for number in range(len(whole)):
            builder.add_document(whole[number][:50] if number == 3 else whole[number])
        builder.finalize()
    for ending in (".bin", ".idx"):
        labels = Path(images.replace("_image_", "_label_") + ending)
        (tmp_path / f"x_label_document{ending}").write_bytes(labels.read_bytes())
    config = config_of(f"{tmp_path}/x_image_document", tmp_path / "out", num_workers=num_workers, train_iters=20)
    assert run_command(lambda: train(config) and None) == 2
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert "x_image_document.bin: image 3 cannot be decoded (" in line and line.endswith("without it")
