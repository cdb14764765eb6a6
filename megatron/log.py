"""Rank-aware logging: every module logs through here, only rank 0 reaches the console.

Logging never ends a run, and never speaks of itself more than once: what cannot be written is lost, with one line on
stderr.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import sys
import time
from pathlib import Path
from typing import Any, TextIO

_NAME = "megatron"
_FORMAT = logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S")


class _RankZeroOnly(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        return getattr(record, "all_ranks", False) or int(os.environ.get("RANK", "0")) == 0


class _Lenient(logging.Handler):
    """Says once that a line could not be written, and goes on."""

    place = ""
    _has_failed = False

    def handleError(self, record: logging.LogRecord) -> None:
        """One line on stderr where logging would print a traceback for each line."""
        if not self._has_failed:
            self._has_failed = True
            self.first_failure(sys.exc_info()[1])

    def first_failure(self, error: BaseException | None) -> None:
        """Say what cannot be written."""
        reason = getattr(error, "strerror", None) or error
        with contextlib.suppress(OSError, ValueError, AttributeError):
            sys.stderr.write(f"{self.place} cannot be written: {reason}; the run goes on without\n")
            sys.stderr.flush()


class _Console(_Lenient, logging.StreamHandler[TextIO]):
    """Writes to whatever sys.stdout is now: it may be redirected, and the first one closed, during a process."""

    place = "the console log"

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:  # type: ignore[override]
        return sys.stdout

    def first_failure(self, error: BaseException | None) -> None:
        """What is left in the buffer would make Python end with an exit code of its own."""
        super().first_failure(error)
        atexit.register(_let_go_of_stdout)


def _let_go_of_stdout() -> None:
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, AttributeError):  # closed, or there was none
        pass


def open_log(path: str, flags: int) -> int:
    """An opener for files of logs: does not wait for a reader where the name is a FIFO's."""
    return os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)


class _File(_Lenient, logging.FileHandler):
    """Appends to a file, which need not be there, or be one, when it is opened."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, encoding="utf-8", errors="backslashreplace", delay=True)
        self.place = str(path)

    def _open(self) -> Any:
        return open(self.baseFilename, self.mode, encoding=self.encoding, errors=self.errors, opener=open_log)

    def emit(self, record: logging.LogRecord) -> None:
        """FileHandler opens the file outside of what it catches."""
        try:
            super().emit(record)
        except OSError:
            self.handleError(record)


def get_logger() -> logging.Logger:
    """The package's logger; INFO from rank 0, everything marked `extra={"all_ranks": True}` from all."""
    logger = logging.getLogger(_NAME)
    if not logger.handlers:
        handler = _Console()
        handler.setFormatter(_FORMAT)
        handler.addFilter(_RankZeroOnly())
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        logger.propagate = False
    return logger


def log_to_file(path: Path) -> None:
    """Append everything that reaches the console to `path` too, and no longer to the file named before."""
    logger = get_logger()
    for known in [handler for handler in logger.handlers if isinstance(handler, logging.FileHandler)]:
        if known.baseFilename == str(path.absolute()):
            return
        logger.removeHandler(known)
        with contextlib.suppress(OSError):
            known.close()
    handler = _File(path)
    handler.setFormatter(_FORMAT)
    handler.addFilter(_RankZeroOnly())
    logger.addHandler(handler)
    with contextlib.suppress(OSError):  # emit says what is wrong
        path.parent.mkdir(parents=True, exist_ok=True)


def last_words(line: str) -> None:
    """Write an error to stderr and to the file of the log before the process ends, without a lock: a thread that hangs
    may hold it.
    """
    with contextlib.suppress(OSError):
        os.write(2, f"error: {line}\n".encode(errors="backslashreplace"))
    for handler in get_logger().handlers:
        if isinstance(handler, logging.FileHandler):
            with contextlib.suppress(OSError):
                descriptor = open_log(handler.baseFilename, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
                os.write(descriptor, f"{time.strftime('%H:%M:%S')} error: {line}\n".encode(errors="backslashreplace"))
                os.close(descriptor)
