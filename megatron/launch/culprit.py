"""Which process ended a run, by what srun, mpirun and pdsh say of it on stderr."""

from __future__ import annotations

import os
import re
import signal
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import IO

from megatron.errors import EXIT_LOST_RANK
from megatron.signals import STOP_SIGNALS

# `srun: error: node2: task 1: Killed`, `... tasks 1-3: Exited with exit code 1`, `... Segmentation fault (core dumped)`
_SRUN = re.compile(
    r"srun: error: ([\w.-]+): tasks? (\d+)[^:]*: (?:Exited with exit code (\d+)|(.+?)(?: \(core dumped\))?)"
)
_MPIRUN_SIGNAL = re.compile(r"mpirun noticed that process rank (\d+) .*on node (\S+) exited on signal (\d+)\b.*")
_MPIRUN_NAME, _MPIRUN_CODE = re.compile(r"\s*Process name: \[\[\d+,\d+\],(\d+)\]"), re.compile(r"\s*Exit code:\s+(\d+)")
_PDSH = re.compile(r"pdsh@\S+: (\S+): ssh exited with exit code (\d+)")

_SIGNALS = {signal.strsignal(number): int(number) for number in signal.Signals}
_STOPPED = {128 + number for number in STOP_SIGNALS}


@dataclass(frozen=True)
class Culprit:
    """A process that has ended, or a node whose processes have."""

    node: str | None
    rank: int | None
    exit_code: int
    """As shells have it: 128 and the number of the signal that killed it."""


def shell_code(code: int) -> int:
    """A worker killed by signal n comes out of DeepSpeed's launcher as 256 - n, of Popen as -n; shells say 128 + n."""
    if code < 0:
        return 128 - code
    return 128 + 256 - code if code > 192 else code


class Listener:
    """Passes a launcher's stderr on to ours, at once, and remembers who has ended how.

    Args:
        pipe: what the launcher writes to.
        hosts: {node: processes}, in the order of the ranks.
        failed: called when the first process has failed.
    """

    def __init__(self, pipe: IO[bytes], hosts: Mapping[str, int], failed: Callable[[], None] = lambda: None) -> None:
        self._pipe, self._hosts, self._failed = pipe, hosts, failed
        self._ended: list[Culprit] = []
        self._rank: int | None = None
        self._thread = threading.Thread(target=self._read, daemon=True, name="launcher-stderr")
        self._thread.start()

    def culprit(self, seconds: float = 2.0) -> Culprit | None:
        """Who ended the run: the first that did not end for the sake of others. The launcher has ended.

        Args:
            seconds: how long to wait for its last lines, where another process has the pipe open too.
        """
        self._thread.join(seconds)
        return min(self._ended, key=lambda one: _rank_of_blame(one.exit_code), default=None)

    def _read(self) -> None:
        rest = b""
        while chunk := os.read(self._pipe.fileno(), 65536):
            with suppress(OSError):  # nobody reads ours any more; the launcher must not wait for that
                os.write(2, chunk)
            *lines, rest = (rest + chunk).split(b"\n")
            known = len(self._ended)
            for line in lines:
                self._take(line.decode(errors="replace"))
            if self._ended and not known:
                self._failed()
            rest = rest[-4096:]
        self._pipe.close()

    def _take(self, line: str) -> None:
        if match := _SRUN.fullmatch(line):
            code = int(match[3]) if match[3] else 128 + _SIGNALS.get(match[4], 0)
            self._ended.append(Culprit(match[1], int(match[2]), shell_code(code)))
        elif match := _MPIRUN_SIGNAL.fullmatch(line):
            self._ended.append(Culprit(match[2], int(match[1]), 128 + int(match[3])))
        elif match := _MPIRUN_NAME.fullmatch(line):
            self._rank = int(match[1])
        elif (match := _MPIRUN_CODE.fullmatch(line)) and self._rank is not None:
            self._ended.append(Culprit(self._node_of(self._rank), self._rank, shell_code(int(match[1]))))
        elif match := _PDSH.fullmatch(line):
            self._ended.append(Culprit(match[1], None, shell_code(int(match[2]))))

    def _node_of(self, rank: int) -> str | None:
        """The node of a rank, where every node has its processes in order."""
        for node, processes in self._hosts.items():
            if rank < processes:
                return node
            rank -= processes
        return None


def _rank_of_blame(code: int) -> int:
    """0 for what ended by itself, 1 for what was stopped, 2 for what ended because another had."""
    return 2 if code == EXIT_LOST_RANK else 1 if code in _STOPPED else 0
