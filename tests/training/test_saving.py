"""Saves beside training: what they wait for, what becomes of failures, and who writes what."""

from __future__ import annotations

import json
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from megatron.checkpoint import store
from megatron.checkpoint.pieces import Piece
from megatron.checkpoint.snapshot import HostBuffers
from megatron.checkpoint.store import CheckpointReader, Part, RunFolder
from megatron.config import RunConfig
from megatron.errors import UserError
from megatron.signals import StopRequest
from megatron.training import train
from megatron.training.loop import Trainer
from tests.ranks import run_ranks
from tests.whole_state import Whole

MakeConfig = Callable[..., RunConfig]
pytestmark = pytest.mark.usefixtures("single_process")


@pytest.mark.engine
def test_training_goes_on_while_a_checkpoint_is_written(
    tiny_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first save is not finished before the third iteration is; what it writes is of the first."""
    trained_on, real = threading.Event(), store.write_pieces
    advance = Trainer._iterate

    def slow(folder: Path, pieces: Any, rank: Any) -> Part:
        if folder.name.endswith("global_step1"):
            assert trained_on.wait(60)
        return real(folder, pieces, rank)

    def iterate(self: Trainer, batches: Any) -> Any:
        step = advance(self, batches)
        if self.state.iteration == 3:
            assert RunFolder(tmp_path / "a").iterations() == []
            trained_on.set()
        return step

    keys: dict[str, Any] = {"train_iters": 3, "extra_save_iters": [1], "eval_iters": 0}
    with monkeypatch.context() as patch:
        patch.setattr(store, "write_pieces", slow)
        patch.setattr(Trainer, "_iterate", iterate)
        train(tiny_config(save=str(tmp_path / "a"), **keys))
    train(tiny_config(save=str(tmp_path / "b"), async_save=False, **keys))
    assert RunFolder(tmp_path / "a").iterations() == [1, 3]
    for step in (1, 3):
        files = [{f.name: f.read_bytes() for f in (tmp_path / r / f"global_step{step}").glob("*.*s*")} for r in "ab"]
        for of_run in files:
            config = of_run.pop("config.yml", None), of_run.pop("manifest.json")
            assert config[1]
        assert files[0] == files[1]


@pytest.mark.engine
def test_a_run_that_is_closed_keeps_no_copy(tiny_config: MakeConfig, tmp_path: Path) -> None:
    """One that grows or goes back is there until the next start has read what it saved."""
    copies = list[weakref.ref[torch.Tensor]]()
    real = HostBuffers.copies

    def noted(buffers: HostBuffers, pieces: Any) -> list[Piece]:
        found = real(buffers, pieces)
        copies.extend(weakref.ref(piece.tensor) for piece in found)
        return found

    run = Trainer(tiny_config(train_iters=3, save=str(tmp_path), checkpoint_factor=2, eval_iters=0))
    with patch.object(HostBuffers, "copies", noted), StopRequest() as stop:
        run.train(stop)
    assert copies and not any(copy() is not None for copy in copies)


def test_one_copy_is_kept_for_all_saves() -> None:
    buffers, values = HostBuffers(), torch.zeros(4, 3)
    first = buffers.copies([Piece("model", "w", (4, 3), (0, 0), values)])
    values.fill_(1.0)
    assert not first[0].tensor.any()
    again = buffers.copies([Piece("model", "w", (4, 3), (0, 0), values)])
    assert again[0].tensor.data_ptr() == first[0].tensor.data_ptr() and again[0].tensor.all()


def refuse_on(rank: int, iterations: tuple[int, ...], config: RunConfig) -> str:
    """The message of a run in which this rank cannot write the checkpoints of these iterations."""
    real = store.write_pieces

    def write(folder: Path, pieces: Any, of_rank: Any) -> Part:
        if of_rank in (None, rank) and int(folder.name.rpartition("global_step")[2]) in iterations:
            raise OSError(28, "No space left on device")
        return real(folder, pieces, of_rank)

    store.write_pieces = write
    try:
        train(config)
    except UserError as error:
        return str(error)
    finally:
        store.write_pieces = real
    return ""


@pytest.mark.processes
@pytest.mark.parametrize("rank", [0, 1])
def test_what_one_rank_cannot_write_all_ranks_hear_of(tiny_config: MakeConfig, tmp_path: Path, rank: int) -> None:
    keys: dict[str, Any] = {"save": str(tmp_path), "load": str(tmp_path), "checkpoint_factor": 2, "eval_iters": 0}
    stop = tiny_config(train_iters=7, **keys)
    goes_on = tiny_config(train_iters=7, on_save_failure="continue", **keys)
    first, second = run_ranks(2, refuse_on, rank, (4,), stop)
    assert first == second
    assert "global_step4: [Errno 28] No space left on device; earlier checkpoints are intact" in first
    assert RunFolder(tmp_path).iterations() == [2]
    assert run_ranks(2, refuse_on, rank, (4,), goes_on) == ["", ""]
    assert RunFolder(tmp_path).iterations() == [2, 6, 7]
    assert [path.name for path in tmp_path.glob(".*")] == []


@pytest.mark.engine
def test_the_last_checkpoint_has_to_be_written(tiny_config: MakeConfig, tmp_path: Path) -> None:
    config = tiny_config(train_iters=2, save=str(tmp_path), on_save_failure="continue", eval_iters=0)
    assert "global_step2: [Errno 28] No space left" in refuse_on(0, (2,), config)
    assert list(tmp_path.glob(".*")) == []  # half a checkpoint would keep room from those to come


@pytest.mark.engine
def test_an_unexpected_error_of_the_writer_ends_the_run(
    tiny_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> Part:
        raise ZeroDivisionError("of the test")

    monkeypatch.setattr(store, "write_pieces", broken)
    config = tiny_config(
        train_iters=9, save=str(tmp_path), checkpoint_factor=2, on_save_failure="continue", eval_iters=0
    )
    with pytest.raises(UserError, match="save: ZeroDivisionError: of the test"):
        train(config)


@pytest.mark.engine
def test_short_lived_checkpoints_are_resumed_from_and_go(tiny_config: MakeConfig, tmp_path: Path) -> None:
    keys: dict[str, Any] = {
        "save": str(tmp_path), "load": str(tmp_path), "checkpoint_factor": 6, "non_persistent_save_interval": 2,
        "eval_iters": 0, "keep_last_n_checkpoints": 2, "log_interval": 1,
    }  # fmt: skip
    seen: list[list[int]] = []
    real = RunFolder.publish

    def publish(self: RunFolder, *arguments: Any) -> Path:
        folder = real(self, *arguments)
        seen.append(self.iterations())
        return folder

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunFolder, "publish", publish)
        train(tiny_config(train_iters=11, **keys))
    assert seen == [[2], [2, 4], [4, 6], [6, 8], [6, 8, 10], [6, 10, 11]]
    assert RunFolder(tmp_path).iterations() == [6, 11]
    train(tiny_config(train_iters=12, **keys))
    assert RunFolder(tmp_path).iterations() == [11, 12]


def shares(config: RunConfig) -> tuple[int, int, int]:
    """Bytes of tensors that this rank writes at the end of a run, those it reads of them to go on, and all there are.

    A row of a file that is read twice, to verify and to use it, counts once: it is in the page cache then.
    """
    train(config)
    rows: dict[tuple[str, str, int], int] = {}
    real = CheckpointReader._read_part

    def read_part(self: CheckpointReader, part: Any, box: Any = None) -> Any:
        tensor = real(self, part, box)
        offset, size = box or part.box
        for row in range(*((offset[0], offset[0] + size[0]) if size else (0, 1))):
            rows[part.file, part.key, row] = tensor.nbytes // max(1, len(tensor) if size else 1)
        return tensor

    CheckpointReader._read_part = read_part  # type: ignore[method-assign]
    try:
        run = Trainer(config.replaced(training=config.training.replaced(train_iters=9)))
    finally:
        CheckpointReader._read_part = real  # type: ignore[method-assign]
    Whole(run.engine.state)  # finds values that are missing or there twice
    rank = run.layout.rank
    run.close()
    folder = RunFolder(str(config.checkpoint.save)).checkpoint(2)
    assert folder is not None
    sizes = {file.name: file.stat().st_size for file in folder.glob("*.safetensors")}
    written = sum(size for name, size in sizes.items() if name.split("-")[1] == f"{rank:05d}")
    return written, sum(rows.values()), sum(sizes.values())


@pytest.mark.processes
@pytest.mark.parametrize(
    "axes",
    [{}, {"model_parallel_size": 2}, {"pipe_parallel_size": 2}],
    ids=["dp4", "tp2dp2", "pp2dp2"],
)
def test_each_of_four_ranks_writes_and_reads_its_part(
    tiny_config: MakeConfig, tmp_path: Path, axes: dict[str, int]
) -> None:
    config = tiny_config(
        train_iters=2, save=str(tmp_path), load=str(tmp_path), zero_optimization={"stage": 1}, eval_iters=0,
        ema_decay=0.9,
        hidden_size=256, qkv_slot_num=256, proj_slot_num=256, ffn_slot_num=512, num_attention_heads=4, **axes,
    )  # fmt: skip
    for written, read, whole in run_ranks(4, shares, config):
        assert written <= 0.30 * whole and read <= 0.35 * whole, (written / whole, read / whole)
    manifest = json.loads((tmp_path / "global_step2" / "manifest.json").read_text())
    assert manifest["version"] == 2 and len({name.split("-")[1] for name in manifest["files"] if "-" in name}) == 4
