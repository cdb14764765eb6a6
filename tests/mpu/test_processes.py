"""Joining, waiting for the first rank, and noticing a rank that is lost, on real processes."""

from __future__ import annotations

import os
import signal
import time
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron.errors import EXIT_LOST_RANK, UserError
from megatron.mpu import SINGLE, Layout, processes
from megatron.mpu.environment import free_port
from megatron.mpu.peers import PeerWatch
from megatron.mpu.processes import abandoned_on_error, connect_world, first_rank_does
from tests.ranks import run_ranks, start_process

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


def watched(how: str) -> str:
    """What the first rank's watch says when the second is stopped, or ends with an error, for ever in a collective."""
    layout = layout_of(2)
    lines: list[str] = []
    watch = PeerWatch(layout.rank, 2, interval=0.1, limit=1.0, end=lines.append)
    if layout.rank == 1:
        time.sleep(0.5)  # counted once at least
        if how == "error":
            watch.give_up()
        else:
            watch.stop()  # its thread stands still, as that of a stopped process
        time.sleep(2.5)
        return ""
    for _ in range(100):
        if lines:
            break
        time.sleep(0.05)
    return lines[0] if lines else "nothing was noticed"


@pytest.mark.processes
@pytest.mark.parametrize(("how", "words"), [("error", "ended with an error"), ("stop", "no sign of life for 1 s")])
def test_a_lost_rank_is_named_to_the_others(how: str, words: str) -> None:
    line = run_ranks(2, watched, how)[0]
    assert line.startswith("rank 1 on ") and words in line


def wait_for_a_stopped_peer(rank: int, port: int) -> None:
    """The second rank stops itself; the first waits for it in a collective until its watch ends it."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_PORT=str(port))
    connect_world("gloo", timedelta(minutes=5))
    PeerWatch(rank, 2, interval=0.1, limit=1.0)
    if rank == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    dist.barrier()


@pytest.mark.processes
def test_a_process_that_waits_for_a_stopped_one_ends() -> None:
    port = free_port()
    ranks = [start_process(wait_for_a_stopped_peer, rank, port) for rank in range(2)]
    try:
        ranks[0].join(20)
        assert ranks[0].exitcode == EXIT_LOST_RANK
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
