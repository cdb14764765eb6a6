"""failures.jsonl, a run's record of what went wrong beside its checkpoints: which node failed, when, and how.

Whoever notices a failure appends a line: a process that misses another one, or deepy.py when an attempt has ended.
"""

from __future__ import annotations

import json
import os
import socket
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from megatron.log import get_logger

FILE_NAME = "failures.jsonl"
_OPTIONAL = ("exit_code", "progress", "job")


@dataclass(frozen=True)
class Failure:
    """One line of the file."""

    node: str | None
    """The machine that failed, as its launcher calls it (see `node_name`); None where nobody could tell."""
    rank: int | None
    """The process that failed, among all; None where nobody could tell."""
    reason: str
    """What happened, in a few words on one line."""
    iteration: int | None
    """The last iteration that is known of: of the run where a process tells, of `latest` where deepy.py does."""
    time: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="milliseconds"))
    """When it was noticed, ISO 8601 in UTC."""
    exit_code: int | None = None
    """What the attempt ended with, in the one line that deepy.py writes for each failed attempt; None elsewhere."""
    progress: bool | None = None
    """In that line: did the attempt leave a newer checkpoint than it found?"""
    job: str | None = None
    """In that line: the Slurm job."""


_TYPES: dict[str, tuple[type, ...]] = {
    "time": (str,), "node": (str,), "rank": (int,), "reason": (str,), "iteration": (int,), "exit_code": (int,),
    "progress": (bool,), "job": (str,),
}  # fmt: skip


def node_name(env: Mapping[str, str] = os.environ) -> str:
    """What Slurm calls this machine, if it started this process, else its host name."""
    return env.get("SLURMD_NODENAME") or socket.gethostname()


def record_failure(folder: str | Path, failure: Failure) -> None:
    """Append a line in one write; a file that cannot be written costs a warning, for there is a failure to be told.

    Args:
        folder: that of the run's checkpoints; made if it is missing.
    """
    values = {key: getattr(failure, key) for key in _TYPES}
    values = {key: value for key, value in values.items() if value is not None or key not in _OPTIONAL}
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        _append(Path(folder) / FILE_NAME, f"{json.dumps(values)}\n".encode())
    except OSError as error:
        get_logger().warning("%s cannot be written: %s", Path(folder) / FILE_NAME, error.strerror or error)


def _append(path: Path, line: bytes) -> None:
    descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    try:
        size = os.fstat(descriptor).st_size
        # Who was killed while writing has left half a line, which would swallow this one.
        torn = size > 0 and os.pread(descriptor, 1, size - 1) != b"\n"
        os.write(descriptor, b"\n" * torn + line)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_failures(folder: str | Path) -> list[Failure]:
    """The lines of a run's file, oldest first; those that are torn or of another form are left out. [] without one."""
    try:
        text = (Path(folder) / FILE_NAME).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    found = (_parsed(line) for line in text.split("\n"))
    return [failure for failure in found if failure is not None]


def _parsed(line: str) -> Failure | None:
    try:
        values = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(values, dict):
        return None
    known: dict[str, Any] = {key: values.get(key) for key in _TYPES}
    fits = all(value is None or type(value) in _TYPES[key] for key, value in known.items())
    return Failure(**known) if fits and known["reason"] is not None and known["time"] is not None else None


def failed_attempts(failures: Iterable[Failure]) -> list[Failure]:
    """The lines that deepy.py wrote, one for each attempt that failed."""
    return [failure for failure in failures if failure.exit_code is not None]


def unreliable_nodes(failures: Iterable[Failure], times: int = 2) -> list[str]:
    """The nodes that at least so many failed attempts are put down to, by name."""
    counts = Counter(failure.node for failure in failed_attempts(failures))
    return sorted(node for node, count in counts.items() if node is not None and count >= times)
