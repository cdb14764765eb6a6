"""Folders as a node sees them: room, speed of writing, files that are there, and what nodes share."""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_BLOCK = 4 << 20
_LOCKS = {"flock": fcntl.flock, "fcntl": fcntl.lockf}
_TOKEN = "token"
HELD, FREE = "held", "free"


def existing_folder(path: str | os.PathLike[str]) -> Path:
    """`path`, or the nearest folder above it that exists: nothing is made for a check."""
    folder = Path(path).absolute()
    while not folder.is_dir() and folder != folder.parent:
        folder = folder.parent
    return folder


def look_at_folder(path: str | None) -> dict[str, Any]:
    """Path, free bytes and bytes written a second of a folder, default this node's temporary folder.

    `rate` is None where it cannot be written to, and `reason` says why. Raises OSError when it is not there.
    """
    folder = path or tempfile.gettempdir()
    found: dict[str, Any] = {"path": folder, "free": shutil.disk_usage(folder).free, "rate": None, "reason": None}
    try:
        found["rate"] = write_rate(folder)
    except OSError as error:
        found["reason"] = error.strerror or str(error)
    return found


def write_rate(folder: str, size: int = 64 << 20, seconds: float = 3.0, rounds: int = 3) -> float:
    """Bytes a second that reach the disk: the best round of writing `size` bytes, or as many as fit in `seconds`.

    The file has no name where the file system can do that, and loses it at once elsewhere.
    """
    block, best, elapsed = os.urandom(_BLOCK), 0.0, 0.0
    for _ in range(rounds):
        with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
            start, written = time.monotonic(), 0
            while written < size and time.monotonic() - start < seconds:
                written += file.write(block) or 0
            os.fsync(file.fileno())
            elapsed = time.monotonic() - start
        best = max(best, written / elapsed)
        if elapsed > seconds / 2:
            break
    return best


def file_sizes(paths: Sequence[str]) -> dict[str, int | None]:
    """Bytes of each file; None for one that is not there or cannot be read."""
    return {path: os.path.getsize(path) if os.access(path, os.R_OK) else None for path in paths}


@contextmanager
def held_folder(parent: Path) -> Iterator[dict[str, str]]:
    """A folder in `parent` with a file of a secret word and two files that this process holds locks on.

    Gives what look_at_shared() needs on the other nodes. Raises OSError where none can be made; gone afterwards.
    """
    token = secrets.token_hex(8)
    folder = Path(tempfile.mkdtemp(prefix=".doctor-", dir=parent))
    try:
        with contextlib.ExitStack() as stack:
            (folder / _TOKEN).write_text(token)
            for name, lock in _LOCKS.items():
                file = stack.enter_context((folder / name).open("w"))
                with contextlib.suppress(OSError):  # the nodes find out what is wrong
                    lock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield {"folder": str(folder), "token": token}
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def look_at_shared(folder: str, token: str) -> dict[str, Any]:
    """Does this node see the folder of held_folder(), and the locks on its files?

    Returns: `seen`; for each kind of lock HELD, FREE (its holder's lock does not reach this node), or an error.
    """
    try:
        seen = (Path(folder) / _TOKEN).read_text() == token
    except FileNotFoundError:
        seen = False
    return {"folder": os.path.dirname(folder), "seen": seen, **({n: _try(folder, n) for n in _LOCKS} if seen else {})}


def _try(folder: str, name: str) -> str:
    with open(os.path.join(folder, name), "r+") as file:
        try:
            _LOCKS[name](file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            return HELD
        except OSError as error:
            return error.strerror or str(error)
        return FREE
