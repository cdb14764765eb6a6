"""Metrics and logs: readable afterwards, and never a reason for a run to end."""

from __future__ import annotations

import json
import logging
import math
import os
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron.config import RunConfig
from megatron.errors import UserError
from megatron.log import get_logger, log_to_file
from megatron.metrics import MetricsLog, TensorBoard
from megatron.training import train

MakeConfig = Callable[..., RunConfig]
ROOT = Path(__file__).parents[2]


@pytest.fixture
def warnings(package_log: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    return lambda: [record.getMessage() for record in package_log.records if record.levelno == logging.WARNING]


def make_unwritable(path: Path, form: str) -> None:
    if form == "folder":
        path.mkdir()
    elif form == "fifo":
        os.mkfifo(path)
    elif form == "full":
        path.symlink_to("/dev/full")
    else:
        path.symlink_to(path.parent / "none" / "of" / "them")


FORMS = ["folder", "fifo", "full", "dangling"]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.usefixtures("single_process")
def test_a_run_whose_logs_cannot_be_written_is_trained(
    tiny_config: MakeConfig, tmp_path: Path, warnings: Callable[[], list[str]], capfd: Any, form: str
) -> None:
    logs = tmp_path / "logs"
    logs.mkdir()
    for name in ("metrics.jsonl", "train.log"):
        make_unwritable(logs / name, form)
    state = train(tiny_config(log_dir=str(logs), save=str(tmp_path / "run"), train_iters=3, eval_iters=0))
    assert state.iteration == 3 and (tmp_path / "run/global_step3").is_dir()
    said = warnings()
    assert len(said) == 1 and said[0].startswith("metrics.jsonl: metrics cannot be written: "), said
    errors = capfd.readouterr().err
    assert errors.count("train.log cannot be written") == 1 and "Traceback" not in errors
    log_to_file(tmp_path / "own" / "train.log")  # leaves the broken one
    get_logger().info("one line")
    assert "one line" in (tmp_path / "own" / "train.log").read_text()


def failing(error: Exception, fails_at: str) -> types.ModuleType:
    """A wandb that fails with `error` in one of its functions."""
    module: Any = types.ModuleType("wandb")

    class Error(Exception):
        pass

    class CommError(Error):
        pass

    def act(name: str) -> None:
        if name == fails_at:
            raise CommError("no answer") if isinstance(error, ConnectionError) else error

    def init(**_: Any) -> Any:
        act("init")
        return types.SimpleNamespace(log=lambda *_, **__: act("log"), finish=lambda: act("finish"))

    module.Error, module.CommError, module.init = Error, CommError, init
    return module


@pytest.mark.parametrize("fails_at", ["init", "log", "finish"])
def test_a_service_that_fails_costs_one_warning(
    tiny_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, warnings: Any, fails_at: str
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", failing(ConnectionError(), fails_at))
    log = MetricsLog(tiny_config(use_wandb=True, log_dir=str(tmp_path)), 0, 0)
    for iteration in (1, 2, 3):
        log.log({"iteration": iteration, "lm_loss": 1.0})
    log.close()
    assert len(warnings()) == 1 and "use_wandb" in warnings()[0] and "no answer" in warnings()[0]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 3


def test_a_full_disk_costs_no_half_line_and_later_ones_are_written(
    tiny_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, warnings: Any
) -> None:
    log = MetricsLog(tiny_config(log_dir=str(tmp_path), tensorboard_dir=str(tmp_path / "board")), 0, 0)
    lines, board = log.sinks[1], log.sinks[2]
    assert isinstance(board, TensorBoard)

    class Full:
        """A raw file on a disk with room for 5 bytes."""

        def __init__(self, file: Any) -> None:
            self.file = file

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

        def write(self, content: bytes) -> int:
            written: int = self.file.write(content[:5])
            return written

    for iteration in range(1, 6):
        is_full = iteration in (2, 3)
        for records in (lines._file, board._writer._writer):  # type: ignore[attr-defined]
            raw = records._file.file if isinstance(records._file, Full) else records._file
            records._file = Full(raw) if is_full else raw
        log.log({"iteration": iteration, "lm_loss": float(iteration)})
    log.close()
    assert [json.loads(x)["iteration"] for x in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [1, 4, 5]
    assert len(warnings()) == 2 and all("No space left" in line for line in warnings())
    assert scalars(tmp_path / "board") == {"lm_loss": [(1, 1.0), (4, 4.0), (5, 5.0)]}


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard's own reader finds."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_values_that_are_not_finite_are_null(tiny_config: MakeConfig, tmp_path: Path) -> None:
    log = MetricsLog(tiny_config(log_dir=str(tmp_path)), 0, 0)
    log.log({"iteration": 1, "lm_loss": math.nan, "grad_norm": -math.inf, "mfu": None, "learning_rate": 0.5})
    log.close()
    text = (tmp_path / "metrics.jsonl").read_text()
    assert text == '{"iteration": 1, "lm_loss": null, "grad_norm": null, "mfu": null, "learning_rate": 0.5}\n'


def test_a_bad_byte_costs_its_line_and_the_file_is_kept(tiny_config: MakeConfig, tmp_path: Path, warnings: Any) -> None:
    path = tmp_path / "metrics.jsonl"
    rows = [
        b'{"iteration": 1}',
        b'{"iteration": 2, "\xff": 1}',
        b'{"iteration": 3}',
        b'{"iteration": 4}',
        b'{"it',
    ]
    path.write_bytes(whole := b"\n".join(rows))
    log = MetricsLog(tiny_config(log_dir=str(tmp_path)), 0, 3)
    log.close()
    assert path.read_bytes() == b'{"iteration": 1}\n{"iteration": 3}\n'
    assert (tmp_path / "metrics.jsonl.1").read_bytes() == whole
    assert len(warnings()) == 1 and "1 of 5 lines cannot be read" in warnings()[0]


def test_a_mistake_of_the_user_is_still_named(tiny_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="use_wandb: wandb is not installed"):
        MetricsLog(tiny_config(use_wandb=True), 0, 0)


@pytest.mark.launches
def test_a_console_that_cannot_be_written_says_so_once_and_ends_with_0() -> None:
    program = "from megatron.log import get_logger\nfor _ in range(3): get_logger().info('line')"
    with open("/dev/full", "w") as full:
        result = subprocess.run(
            [sys.executable, "-c", program], cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert result.returncode == 0
    assert result.stderr == "the console log cannot be written: No space left on device; the run goes on without\n"
