"""The processes of a run on this machine, as the kernel tells: gone, stopped, or there; and how to end one."""

from __future__ import annotations

import os
import signal
import socket
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

GONE, STOPPED, THERE = "gone", "stopped", "there"


@dataclass(frozen=True)
class Neighbour:
    """A process of the run: its rank, its id, and when it started, which tells it from a later one with its id."""

    rank: int
    pid: int
    started: int

    @classmethod
    def this(cls, rank: int) -> Neighbour:
        """This process."""
        found = _look(os.getpid())
        return cls(rank, os.getpid(), found[1] if found else 0)

    def __str__(self) -> str:
        return f"{self.rank} {self.pid} {self.started}"

    @classmethod
    def parse(cls, lines: str) -> list[Neighbour]:
        """Those that were written one a line."""
        return [cls(*map(int, line.split())) for line in lines.splitlines()]

    @property
    def state(self) -> str:
        """GONE, STOPPED or THERE; THERE where the kernel does not say."""
        if not self.started:
            return THERE
        found = _look(self.pid)
        if found is None or found[1] != self.started or found[0] in "ZX":
            return GONE
        return STOPPED if found[0] in "Tt" else THERE

    def kill(self) -> None:
        """End it, stopped or not."""
        if self.started and self.state != GONE:
            with suppress(OSError):
                os.kill(self.pid, signal.SIGKILL)


def machine_key() -> str:
    """The same for processes that see each other: on one machine, in one namespace of process ids."""
    boot, space = "", ""
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        space = os.readlink("/proc/self/ns/pid")
    return f"{socket.gethostname()} {boot} {space}"


def _look(pid: int) -> tuple[str, int] | None:
    """(state, start in clock ticks) of a process; None where there is none."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return fields[0], int(fields[19])
    except (OSError, IndexError, ValueError):
        return None
