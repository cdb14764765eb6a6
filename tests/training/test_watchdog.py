"""A rank that is killed, stopped or hangs, in real runs: it is named in time, all end, and their stacks are written."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import psutil
import pytest

from megatron.checkpoint.store import RunFolder
from megatron.config import RunConfig
from megatron.errors import EXIT_LOST_RANK
from megatron.failures import read_failures
from megatron.mpu.environment import free_port
from megatron.mpu.processes import abandoned_on_error
from megatron.signals import StopRequest
from megatron.tasks import LanguageTask
from megatron.training.loop import train
from tests.launched import wait_until
from tests.ranks import start_rank

pytestmark = pytest.mark.processes

LIMIT = 4.0
STRUCK = 3
"""The call of the victim's loss, of what collates its samples or writes its part of a save, in which it happens."""


def hang() -> None:
    lock = threading.Lock()
    lock.acquire()
    lock.acquire()


def stop() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@dataclass(frozen=True)
class Case:
    """What happens to which rank of how many, and what the line says of it."""

    world: int
    victim: int
    fate: Callable[[], None]
    words: str
    place: str = "loss"
    keys: dict[str, Any] = field(default_factory=dict)


ALL = -1
WATCHDOG = {"limits": dict.fromkeys(("batch", "forward_backward", "update", "save"), LIMIT), "heartbeat_seconds": 60}
IN_LOSS = "hangs in forward_backward of iteration 3"
CASES = {
    "killed": Case(2, 1, kill, "has been killed or has crashed"),
    "first killed": Case(2, 0, kill, "has been killed or has crashed"),
    "stopped": Case(2, 1, stop, "is stopped, by a SIGSTOP"),
    "first stopped": Case(2, 0, stop, "is stopped, by a SIGSTOP"),
    "hangs": Case(2, 1, hang, IN_LOSS, keys={"zero_optimization": {"stage": 1}}),
    "first hangs in its data": Case(2, 0, hang, "hangs in batch of iteration 3", "collate"),
    "hangs in a save": Case(2, 1, hang, "hangs in save of iteration", "write_part", {"checkpoint_factor": 1}),
    "alone": Case(1, 0, hang, "hangs in batch of iteration", "collate", {"num_workers": 1}),
    "tensor ranks": Case(4, 2, hang, IN_LOSS, keys={"model_parallel_size": 2}),
    "suspended": Case(2, ALL, stop, ""),
    "last stage": Case(4, 3, stop, "is stopped, by a SIGSTOP", keys={"pipe_parallel_size": 2}),
}


MISSING = [name for name, case in CASES.items() if case.victim != ALL]


def struck_run(config: RunConfig, case: Case, folder: Path) -> None:
    """A run in which the victim meets its fate."""
    rank = int(os.environ["RANK"])
    os.dup2(os.open(folder / f"stderr{rank}", os.O_WRONLY | os.O_CREAT), 2)
    owner: Any = RunFolder if case.place == "write_part" else LanguageTask
    real, calls = getattr(owner, case.place), 0

    def struck(*arguments: Any, **keywords: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == STRUCK and case.victim in (rank, ALL):
            (folder / "struck").write_text(json.dumps([os.getpid(), time.time()]))
            case.fate()
        return real(*arguments, **keywords)

    setattr(owner, case.place, struck)
    with StopRequest() as request, request.other_ranks_may_be_gone(), abandoned_on_error():
        train(config, request)


@dataclass(frozen=True)
class Outcome:
    """What a run that was struck left behind."""

    folder: Path
    codes: list[int | None]
    seconds: float
    """From the blow to the end of the last process."""
    is_left: bool
    """The process that was struck, which may be a worker of a loader."""

    def stderr(self, rank: int) -> str:
        return (self.folder / f"stderr{rank}").read_text()


def end_of(ranks: list[ForkServerProcess], folder: Path) -> Outcome:
    """Wait for all ranks, for 60 seconds in all."""
    deadline = time.monotonic() + 60
    for rank in ranks:
        rank.join(max(0.0, deadline - time.monotonic()))
    codes = [rank.exitcode for rank in ranks]
    for rank in ranks:
        rank.kill()
    pid, since = json.loads((folder / "struck").read_text())
    is_left = psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    return Outcome(folder, codes, time.time() - since, is_left)


def start(config: RunConfig, case: Case, folder: Path) -> list[ForkServerProcess]:
    port = free_port()
    return [start_rank(rank, case.world, port, struck_run, config, case, folder) for rank in range(case.world)]


@pytest.fixture(scope="module")
def outcomes(tiny_config: Callable[..., RunConfig], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outcome]:
    """All cases at once: they wait, mostly."""
    started = {}
    for name, case in CASES.items():
        folder = tmp_path_factory.mktemp("struck")
        config = tiny_config(eval_iters=0, save=str(folder / "out"), watchdog=WATCHDOG, **case.keys)
        started[name] = start(config, case, folder), folder
    go_on = [rank.pid for rank in started["suspended"][0]]
    assert wait_until(lambda: all(psutil.Process(pid).status() == psutil.STATUS_STOPPED for pid in go_on), 30)
    time.sleep(1.5 * LIMIT)
    for pid in go_on:
        os.kill(pid, signal.SIGCONT)
    return {name: end_of(*run) for name, run in started.items()}


def test_a_run_that_is_suspended_as_a_whole_goes_on(outcomes: dict[str, Outcome]) -> None:
    outcome = outcomes["suspended"]
    assert outcome.codes == [0, 0], outcome.stderr(0)
    assert not (outcome.folder / "out" / "stacks").exists() and not read_failures(outcome.folder / "out")


@pytest.mark.parametrize("name", MISSING)
def test_a_missing_rank_is_named_and_nobody_is_left(outcomes: dict[str, Outcome], name: str) -> None:
    case, outcome = CASES[name], outcomes[name]
    print(name, outcome.seconds, [outcome.stderr(rank)[-400:] for rank in range(case.world)])
    silent = case.fate is not hang
    assert outcome.codes == [
        -signal.SIGKILL if silent and rank == case.victim else EXIT_LOST_RANK for rank in range(case.world)
    ]
    assert not outcome.is_left
    speaker = 1 if silent and case.victim == 0 else 0
    [line] = [line for line in outcome.stderr(speaker).splitlines() if "watchdog" in line and line.startswith("error")]
    assert line.startswith(f"error: watchdog: rank {case.victim} on ") and case.words in line
    assert "Traceback" not in outcome.stderr(speaker)
    for rank in set(range(case.world)) - {speaker}:
        assert "watchdog" not in outcome.stderr(rank)


@pytest.mark.parametrize("name", MISSING)
def test_who_can_writes_stacks(outcomes: dict[str, Outcome], name: str) -> None:
    case, folder = CASES[name], outcomes[name].folder / "out" / "stacks"
    silent = case.fate is not hang
    written = {rank for rank in range(case.world) if not (silent and rank == case.victim)}
    assert {file.name for file in folder.glob("rank*.txt")} == {f"rank{rank}.txt" for rank in written}
    for rank in written:
        text = (folder / f"rank{rank}.txt").read_text()
        assert text.startswith("== ") and f"rank {rank}" in text.splitlines()[0] and "train" in text
        if case.world > 1:
            entries = json.loads((folder / f"gloo_trace_rank_{rank}.json").read_text())["entries"]
            assert any(entry["profiling_name"].startswith("gloo:") for entry in entries)
    if not silent and case.world > 1:
        assert " in hang\n" in (folder / f"rank{case.victim}.txt").read_text()


@pytest.mark.parametrize("name", MISSING)
def test_the_failure_is_recorded_once(outcomes: dict[str, Outcome], name: str) -> None:
    [failure] = read_failures(outcomes[name].folder / "out")
    assert failure.rank == CASES[name].victim and failure.iteration in (3, 4) and CASES[name].words in failure.reason
