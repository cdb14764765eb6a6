"""Runs that find their newest checkpoint damaged, are rolled back, or come to weights that nothing can go on from."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron.checkpoint.reader import CheckpointReader
from megatron.checkpoint.store import RunFolder, set_aside
from megatron.config import RunConfig
from megatron.engine.base import Engine
from megatron.engine.single_stage import SingleStageEngine
from megatron.errors import UserError
from megatron.log import get_logger
from megatron.mpu import processes
from megatron.training import loop, train
from tests.ranks import run_ranks

pytestmark = pytest.mark.usefixtures("single_process")
MakeConfig = Callable[..., RunConfig]


@pytest.fixture
def log(package_log: pytest.LogCaptureFixture) -> Callable[[str], list[str]]:
    """What was logged at a level since the last call."""

    def take(level: str = "WARNING") -> list[str]:
        lines = [record.getMessage() for record in package_log.records if record.levelname == level]
        package_log.clear()
        return lines

    return take


def run(config: MakeConfig, folder: Path, **keys: Any) -> int:
    return train(config(**{"save": str(folder), "load": str(folder), "eval_iters": 0, **keys})).iteration


def cut(folder: Path) -> None:
    file = min(folder.glob("model-*"))
    file.write_bytes(file.read_bytes()[:-100])


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_run_goes_on_from_the_newest_whole_checkpoint(
    tiny_config: MakeConfig, tmp_path: Path, log: Callable[..., list[str]]
) -> None:
    root = tmp_path / "run"
    run(tiny_config, root, train_iters=6, checkpoint_factor=2)
    expected = lines(root)
    shutil.copytree(root, tmp_path / "copy")
    for damage in (cut, shutil.rmtree):  # the second is what one is told elsewhere to do with a damaged one
        damage(root / "global_step6")
        with pytest.raises(UserError, match=r"load: .*global_step6 .*found there: .*strict_load: false"):
            run(tiny_config, root, train_iters=8, strict_load=True)
        assert run(tiny_config, root, train_iters=6, checkpoint_factor=2) == 6
        warnings = log()
        assert len(warnings) == 1 and "global_step6" in warnings[0] and "going on from" in warnings[0]
        assert "global_step4" in warnings[0] and [line["lm_loss"] for line in lines(root)] == [
            line["lm_loss"] for line in expected
        ]
        assert RunFolder(root).iterations() == [2, 4, 6] and not log()
    assert (root / "damaged-global_step6").is_dir()
    assert set_aside(root / "global_step6") == root / "damaged-global_step6-2"
    for iteration in (2, 4):
        cut(root / f"global_step{iteration}")
    with pytest.raises(UserError, match=r"global_step6 is not a complete .*global_step4 is damaged.*no other one is"):
        run(tiny_config, root, train_iters=8)
    assert RunFolder(root).iterations() == [2, 4], "nothing is set aside where nothing is whole"
    # Another run's folder stays as it is.
    cut(tmp_path / "copy/global_step6")
    before = sorted(path.name for path in (tmp_path / "copy").iterdir())
    run(tiny_config, tmp_path / "other", load=str(tmp_path / "copy"), train_iters=5)
    assert sorted(path.name for path in (tmp_path / "copy").iterdir()) == before


def test_a_rollback_is_made_once_and_then_gone_on_from(
    tiny_config: MakeConfig, tmp_path: Path, log: Callable[..., list[str]]
) -> None:
    keys = {"checkpoint_factor": 2, "lr_decay_iters": 9}
    run(tiny_config, tmp_path, train_iters=8, **keys)
    again = {**keys, "iteration": 4, "train_iters": 7, "exit_interval": 5}
    assert run(tiny_config, tmp_path, **again) == 5
    log("INFO")
    assert run(tiny_config, tmp_path, **again) == 7
    said = [line for line in log("INFO") if "rolled back" in line]
    assert len(said) == 1 and "iteration: 4 is where" in said[0] and "global_step5" in said[0]
    assert CheckpointReader(tmp_path / "global_step7").train_state["rollbacks"] == [4]
    # Of 7, 6 and 5 only these two are of this run; 8 is left behind, and was 6 until it was saved again.
    cut(tmp_path / "global_step7")
    shutil.rmtree(tmp_path / "global_step6")
    shutil.rmtree(tmp_path / "global_step5")
    assert run(tiny_config, tmp_path, train_iters=5, **keys) == 5
    assert "going on from" in (said := log())[0] and said[0].count("global_step4") == 1
    # Rolled back once more, to an earlier one: the log grows.
    assert run(tiny_config, tmp_path, **keys, iteration=2, train_iters=3) == 3
    assert CheckpointReader(tmp_path / "global_step3").train_state["rollbacks"] == [4, 2]
    with pytest.raises(UserError, match=r"global_step9 is not a complete checkpoint; iterations found there: 2, 3, 4"):
        run(tiny_config, tmp_path, iteration=9, train_iters=10)


def test_stray_names_are_no_checkpoints(tmp_path: Path) -> None:
    for name in ("global_step08", "global_step", "global_step-1", "global_step8.bak", "global_step\u0663", "step8"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "manifest.json").write_text("{}")
    (tmp_path / "global_step7").write_text("a file")
    assert RunFolder(tmp_path).iterations() == [] and RunFolder(tmp_path).remove_old(1) == []


def negative_moment(engine: Engine) -> None:
    next(iter(engine.state.inner.state.values()))["exp_avg_sq"].sub_(1.0)


@pytest.mark.parametrize(("cause", "kind"), [("rate", "model"), ("moment", "optimizer")])
def test_values_that_are_of_no_use_never_become_latest(
    tiny_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cause: str, kind: str
) -> None:
    run(tiny_config, tmp_path, train_iters=1)
    real = SingleStageEngine.train_step

    def step(engine: SingleStageEngine, batches: Any, learning_rate: float, *others: Any) -> Any:
        result = real(engine, batches, 1e39 if cause == "rate" else learning_rate, *others)
        if cause == "moment":
            negative_moment(engine)
        return result

    monkeypatch.setattr(SingleStageEngine, "train_step", step)
    with pytest.raises(UserError, match=rf"global_step2 is not written: \S+ \({kind}\) has .*(not finite|negative)"):
        run(tiny_config, tmp_path, train_iters=2, checkpoint_factor=1, keep_last_n_checkpoints=1)
    assert RunFolder(tmp_path).iterations() == [1] and (tmp_path / "latest").read_text() == "global_step1\n"
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()
    CheckpointReader(tmp_path / "global_step1")


def _end_of_ranks(keys: dict[str, Any], poison: bool) -> tuple[str, list[str]]:
    """How a run ends on this rank, and what it warns of."""
    from megatron.config import load_config

    warnings: list[str] = []
    get_logger().warning = lambda text, *values: warnings.append(text % values)  # type: ignore[method-assign]
    real = SingleStageEngine.train_step

    def step(engine: SingleStageEngine, *arguments: Any) -> Any:
        result = real(engine, *arguments)
        if poison and engine.layout.rank == 1:
            with torch.no_grad():
                engine.state.inner.param_groups[0]["params"][0].fill_(math.nan)
        return result

    SingleStageEngine.train_step = step  # type: ignore[method-assign]
    try:
        return f"iteration {train(load_config([], keys)).iteration}", warnings
    except UserError as error:
        return str(error), warnings
    finally:
        processes.leave_world()


@pytest.mark.processes
def test_all_ranks_end_with_the_same_line_and_agree_on_where_to_go_on(tiny_config: MakeConfig, tmp_path: Path) -> None:
    config = tiny_config(
        save=str(tmp_path), load=str(tmp_path), train_iters=3, checkpoint_factor=1, eval_iters=0,
        train_micro_batch_size_per_gpu=2, zero_optimization={"stage": 1},
    )  # fmt: skip
    keys = {key: value for key, value in config.flat().items() if value is not None}
    assert [end for end, _ in run_ranks(2, _end_of_ranks, keys, False)] == ["iteration 3"] * 2
    cut(tmp_path / "global_step3")
    ends = run_ranks(2, _end_of_ranks, {**keys, "train_iters": 4}, True)
    assert ends[0][0] == ends[1][0] and "global_step3 is not written" in ends[0][0], ends
    assert len(ends[0][1]) == 1 and "global_step2, the newest whole" in ends[0][1][0]
    assert RunFolder(tmp_path).iterations() == [1, 2] and (tmp_path / "latest").read_text() == "global_step2\n"


@pytest.mark.processes
def test_the_first_rank_may_write_for_longer_than_it_is_waited_for_in_silence(
    tiny_config: MakeConfig, tmp_path: Path
) -> None:
    """The others are told that it is at work, from the first file to the removal of old checkpoints."""
    ends = run_ranks(2, _slow_write, str(tmp_path), tiny_config(train_micro_batch_size_per_gpu=2).flat())
    assert ends == ["iteration 1"] * 2


def _slow_write(folder: str, keys: dict[str, Any]) -> str:
    import time

    from megatron.config import load_config

    processes._BEAT_SECONDS, processes._SILENCE_SECONDS = 0.1, 0.8
    real = RunFolder.save

    def slow(folder: Any, state: Any, write: bool = True) -> Path:
        target = real(folder, state, write)
        if write:
            time.sleep(2.0)
        return target

    RunFolder.save = slow
    changes = {"save": folder, "train_iters": 1, "eval_iters": 0}
    given = {key: value for key, value in keys.items() if value is not None}
    try:
        return f"iteration {train(load_config([], {**given, **changes})).iteration}"
    finally:
        processes.leave_world()


class Killed(BaseException):
    pass


@pytest.mark.parametrize("last", [4, 2], ids=["on the way", "at the end"])
def test_evaluations_that_a_kill_cost_are_made_up_once(
    tiny_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, last: int
) -> None:
    keys = {"eval_iters": 1, "eval_interval": 2, "checkpoint_factor": 2, "train_iters": last, "split": "80,10,10"}
    run(tiny_config, tmp_path / "whole", **keys)

    def die(*_: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(loop.Trainer, "_evaluate", die)
        with pytest.raises(Killed):
            run(tiny_config, tmp_path / "parts", **keys)
    assert not any("valid_lm_loss" in line for line in lines(tmp_path / "parts"))
    for _ in range(2):
        run(tiny_config, tmp_path / "parts", **keys)
        evaluations = [
            [line for line in lines(tmp_path / name) if "lm_loss" not in line] for name in ("whole", "parts")
        ]
        assert evaluations[0] == evaluations[1] and "test_lm_loss" in evaluations[0][-1]


def test_a_validation_that_a_stop_left_out_is_made_up(tiny_config: MakeConfig, tmp_path: Path) -> None:
    keys = {"eval_iters": 1, "eval_interval": 2, "train_iters": 4}
    run(tiny_config, tmp_path, **keys, exit_interval=2)
    run(tiny_config, tmp_path, **keys)
    assert [line["iteration"] for line in lines(tmp_path) if "valid_lm_loss" in line] == [2, 4]
    assert os.path.exists(tmp_path / "latest")
