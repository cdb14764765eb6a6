"""A training run whose whole process group gets SIGKILL or SIGTERM at random instants, until it is complete."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.errors import run_command
from megatron.mpu.environment import free_port
from tests.faults.injected import Fault
from tests.launched import training_lines, wait_until
from tests.ranks import start_rank

LAST, SAVED_EVERY = 40, 2


def train_in_group(config: Path, leader: int, fault: Fault | None = None) -> None:
    """What `python train.py CONFIG` does, in the process group of `leader` (0: one of its own)."""
    import sys

    os.environ.pop("DEEPY_LAUNCHER_PID", None)
    for _ in range(500):  # the leader may not have made its group yet
        with suppress(ProcessLookupError, PermissionError):
            os.setpgid(0, leader)
            break
        time.sleep(0.01)
    if fault is not None:
        fault.install(int(os.environ["RANK"]))
    sys.argv = ["train.py", str(config)]
    from train import main

    os._exit(run_command(main))


@dataclass
class Group:
    """The ranks of one start."""

    processes: list[Any]

    @property
    def id(self) -> int:
        return self.processes[0].pid

    def wait(self) -> list[int]:
        """Exit codes; waits for the processes that the ranks have started too."""
        for process in self.processes:
            process.join(60)
        assert wait_until(lambda: not members(self.id), 5), f"left behind: {members(self.id)}"
        return [process.exitcode for process in self.processes]


def members(group: int) -> list[int]:
    """Ids of the processes of a group that still run."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if os.getpgid(int(entry.name)) == group and b"\nState:\tZ" not in (entry / "status").read_bytes():
                found.append(int(entry.name))
    return found


def start_group(config: Path, world: int, fault: Fault | None = None) -> Group:
    """All ranks of a run, and what happens to one of them."""
    port, processes = free_port(), list[Any]()
    for rank in range(world):
        leader = processes[0].pid if processes else 0
        processes.append(start_rank(rank, world, port, train_in_group, config, leader, fault))
    return Group(processes)


def last_saved(folder: Path) -> int:
    """Iteration of `latest`; 0 without one."""
    latest = folder / "latest"
    return int(latest.read_text().strip().removeprefix("global_step")) if latest.exists() else 0


def last_logged(folder: Path) -> int:
    """The last iteration in metrics.jsonl."""
    lines = training_lines(folder)
    return lines[-1]["iteration"] if lines else 0


def is_grouped(group: Group) -> bool:
    """Have all ranks joined the group, so that a signal reaches them?"""
    return len(members(group.id)) >= len(group.processes)


def strike(config: Path, folder: Path, world: int, number: signal.Signals, delay: float) -> bool:
    """Start the run, signal its group after `delay` seconds; checks what is left. True if it came to its end."""
    before = last_saved(folder), last_logged(folder)
    group = start_group(config, world)
    assert wait_until(lambda: is_grouped(group), 10)
    begin = time.monotonic()
    while time.monotonic() < begin + delay and group.processes[0].is_alive():
        time.sleep(0.005)
    with suppress(ProcessLookupError):
        os.killpg(group.id, number)
    codes = group.wait()
    saved, logged = last_saved(folder), last_logged(folder)
    if number == signal.SIGTERM:
        assert all(code in (0, 128 + number) for code in codes), codes
        # During the start a run changes nothing, not even the lines past the last save of one that was killed.
        assert saved == logged or (saved, logged) == before, "SIGTERM loses nothing"
    else:
        assert all(code in (0, -number) for code in codes), codes
        # An iteration is logged before it is saved, and that save may be under way: the one before it is complete.
        assert saved >= ((logged - 1) // SAVED_EVERY - 1) * SAVED_EVERY, "nothing before the last save is lost"
    return saved == LAST


def run_to_the_end(config: Path, world: int) -> float:
    """Train without a signal; returns the seconds it took."""
    group = start_group(config, world)
    assert wait_until(lambda: is_grouped(group), 60)  # the first one waits for the fork server's imports
    begin = time.monotonic()
    assert group.wait() == [0] * world
    return time.monotonic() - begin


def plan(strikes: int, longest: float, seed: int) -> Iterator[tuple[signal.Signals, float]]:
    """So many SIGKILLs and as many SIGTERMs in random order, each with its delay in seconds."""
    draws = random.Random(seed)
    numbers = [signal.SIGKILL, signal.SIGTERM] * strikes
    draws.shuffle(numbers)
    return ((number, draws.uniform(0.0, longest)) for number in numbers)
