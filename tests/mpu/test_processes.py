"""Joining, waiting for the first rank, and noticing a rank that is lost, on real processes."""

from __future__ import annotations

import os
import signal
import threading
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron.errors import EXIT_LOST_RANK, UserError
from megatron.log import get_logger
from megatron.mpu import SINGLE, Layout, processes
from megatron.mpu.environment import free_port
from megatron.mpu.peers import Peers
from megatron.mpu.processes import abandoned_on_error, connect_world, first_rank_does
from megatron.mpu.progress import Limits
from tests.ranks import run_ranks, start_rank

SHORT = timedelta(seconds=2)


def layout_of(world: int) -> Layout:
    connect_world("gloo", SHORT)
    return Layout.for_world(dist.get_rank(), world)


def long_work(seconds: float) -> Any:
    layout = layout_of(2)
    found = first_rank_does(lambda: time.sleep(seconds) or "done", layout)
    dist.barrier()
    return found


@pytest.mark.processes
def test_work_of_the_first_rank_may_take_longer_than_a_collective() -> None:
    assert run_ranks(2, long_work, 2 * SHORT.total_seconds()) == ["done", None]


def refused() -> list[str]:
    """A UserError and another error of the first rank, as each rank meets them."""
    layout, found = layout_of(2), []

    def mistake() -> None:
        raise UserError("save: the disk is full")

    def fault() -> None:
        raise ZeroDivisionError

    for action in (mistake, fault):
        try:
            first_rank_does(action, layout)
        except (UserError, ZeroDivisionError) as error:
            found.append(f"{type(error).__name__}: {error}")
    return found


@pytest.mark.processes
def test_an_error_of_the_first_rank_ends_all() -> None:
    first, second = run_ranks(2, refused)
    assert first == ["UserError: save: the disk is full", "ZeroDivisionError: "]
    assert second == [first[0], "LostRank: the first rank ended with an error; see its lines"]


def silence() -> str:
    processes._BEAT_SECONDS, processes._SILENCE_SECONDS = 0.1, 1.0
    layout = layout_of(2)
    if layout.rank == 0:
        time.sleep(2.5)  # never says that it is at work
        return ""
    with pytest.raises(UserError) as error:
        first_rank_does(lambda: None, layout)
    return str(error.value)


@pytest.mark.processes
def test_a_first_rank_that_falls_silent_is_given_up() -> None:
    assert "silent for 1 s" in run_ranks(2, silence)[1]


def ended_by_its_watchdog(how: str, file: Path) -> None:
    """The second rank ends with an error, is stopped or hangs; the first waits for it until its watchdog ends it."""
    os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), 2)
    connect_world("gloo", SHORT if how == "hang" else timedelta(minutes=5))
    layout = Layout.for_world(dist.get_rank(), 2)
    processes.watchdog_of(layout).begin("evaluation", Limits(heartbeat=2.0))
    with abandoned_on_error():
        if layout.rank == 1 and how == "error":
            raise ZeroDivisionError
        if layout.rank == 1 and how == "hang":
            threading.Event().wait()
        if layout.rank == 1:
            os.kill(os.getpid(), signal.SIGSTOP)
        dist.barrier()


@pytest.mark.processes
@pytest.mark.parametrize(
    ("how", "words", "code"),
    [
        ("error", "ended with an error", 1),
        ("stop", "is stopped, by a SIGSTOP", -signal.SIGKILL),
        ("hang", "hangs in evaluation", EXIT_LOST_RANK),  # no limit but that of the collective
    ],
)
def test_a_lost_rank_is_named_and_ends_the_others(tmp_path: Path, how: str, words: str, code: int) -> None:
    port, files = free_port(), [tmp_path / "0", tmp_path / "1"]
    ranks = [start_rank(rank, 2, port, ended_by_its_watchdog, how, file) for rank, file in enumerate(files)]
    try:
        for rank in ranks:
            rank.join(30)
        assert [rank.exitcode for rank in ranks] == [EXIT_LOST_RANK, code]
        line = next(line for line in files[0].read_text().splitlines() if line.startswith("error: watchdog: "))
        assert "rank 1 on " in line and words in line
    finally:
        for rank in ranks:
            rank.kill()


def errors_end_groups() -> bool:
    layout_of(2)
    with pytest.raises(UserError), abandoned_on_error():
        dist.barrier()
        raise UserError("a mistake")
    return dist.is_initialized()


@pytest.mark.processes
def test_groups_end_with_an_error() -> None:
    assert run_ranks(2, errors_end_groups) == [False, False]


def test_one_process_opens_no_port_and_waits_for_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(processes._shared_store(0, 1, SHORT), dist.HashStore)
    assert first_rank_does(lambda: 3, SINGLE) == 3


def test_groups_of_nccl_are_bound_to_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "process_device", lambda: torch.device("cuda", 3))
    bound = {"device_id": torch.device("cuda", 3)}
    for version, backend, world, expected in (
        ("2.13.0+cpu", "nccl", 2, bound), ("2.6.0", "nccl", 2, bound), ("2.7.0", "nccl", 2, {}),
        ("2.7.1+cu126", "nccl", 2, bound), ("2.13.0", "gloo", 2, {}), ("2.13.0", "nccl", 1, {}),
    ):  # fmt: skip
        monkeypatch.setattr(torch, "__version__", version)
        assert processes._bound_device(backend, world) == expected, (version, backend, world)


def not_watched_any_more() -> str:
    """The watchdog of the second rank meets a fault of its own; what the first one's does within the heartbeat."""
    layout, lines = layout_of(2), list[str]()
    if layout.rank == 1:
        get_logger().addFilter(lambda record: lines.append(record.getMessage()) or True)
        Peers.gone = lambda _: 1 / 0  # type: ignore[assignment, method-assign, return-value]
    processes.watchdog_of(layout).begin("evaluation", Limits(heartbeat=1.0))
    time.sleep(3.0)
    return "; ".join(lines)


@pytest.mark.processes
def test_a_fault_of_the_watchdog_ends_no_run() -> None:
    first, second = run_ranks(2, not_watched_any_more)
    assert first == "" and second == "watchdog: ZeroDivisionError: division by zero; rank 1 is not watched any more"
