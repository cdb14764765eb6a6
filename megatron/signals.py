"""Signals that ask a run to save and stop, and processes that end with their parent.

A thread of its own hears the signals, for the main thread may be waiting in a collective that no handler interrupts.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any, NoReturn

from megatron.errors import EXIT_LOST_RANK, UserError
from megatron.log import get_logger

STOP_SIGNALS = (
    signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU,
)  # fmt: skip
"""All of them ask to save and stop. A limit on CPU time sends SIGXCPU every second from then on."""

INSISTENT = (signal.SIGTERM, signal.SIGINT)
"""Those that, sent again, stop at once."""

# Variables that deepy.py, DeepSpeed's launcher, torchrun and mpirun give their processes.
_LAUNCHERS = ("DEEPY_LAUNCHER_PID", "CROSS_RANK", "TORCHELASTIC_RUN_ID", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")
_PR_SET_PDEATHSIG = 1
# What gloo and NCCL say when the process at the other end has ended.
_LOST_CONNECTION = ("closed by peer", "reset by peer", "Broken pipe", "remote process exited")
# What they say when it has not come in time.
_NO_ANSWER = ("Timed out waiting", "Timed out after")


def is_lost_connection(error: BaseException) -> bool:
    """Has a collective failed because the process at the other end is gone?"""
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _LOST_CONNECTION)


def is_timeout(error: BaseException) -> bool:
    """Has a collective failed because the process at the other end did not come?"""
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _NO_ANSWER)


def has_launcher(env: Mapping[str, str] = os.environ) -> bool:
    """Has a launcher started this process, which passes signals on and is to outlive it?"""
    return any(name in env for name in _LAUNCHERS)


class StopRequest:
    """Hears STOP_SIGNALS from `listen` on. The first sets `requested`; SIGTERM or SIGINT again ends the process.

    As a context it restores what was there before. A SIGHUP that is ignored, as nohup has it, stays ignored.

    Args:
        ends_at_once: until `hold` is called the first signal ends the process too: there is nothing to save yet.
    """

    def __init__(self, ends_at_once: bool = False) -> None:
        self.requested = False
        self.name = ""
        self._began, self._timer = time.monotonic(), threading.Timer(0, self._request)
        self._ends_at_once = ends_at_once
        # Where all processes get a signal, a worker hears it again from DeepSpeed's launcher and from deepy.py.
        self._limit = 4 if has_launcher() else 2
        self._insisted = 0
        self._previous: dict[int, Any] = {}
        self._write, self._wakeup = -1, -1

    def __enter__(self) -> StopRequest:
        self.listen()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._timer.cancel()
        signal.set_wakeup_fd(self._wakeup)
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        os.close(self._write)

    def listen(self) -> None:
        """Hear signals from now on. To be called in the main thread."""
        read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        threading.Thread(target=self._read, args=(read,), daemon=True, name="stop-signals").start()
        self._wakeup = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        self._previous = {number: signal.signal(number, _to_the_thread) for number in STOP_SIGNALS if _is_heard(number)}

    def end_after(self, minutes: float | None, key: str) -> None:
        """Make the request, in the name of `key`, so many minutes after this object was made; None: do not.

        train.py makes it first of all. An earlier such limit is forgotten.
        """
        self._timer.cancel()
        if minutes is None:
            return
        left = self._began + 60 * minutes - time.monotonic()
        if left <= 0:
            self._request(key)
            return
        self._timer = threading.Timer(left, self._request, (key,))
        self._timer.daemon = True
        self._timer.start()

    def hold(self) -> None:
        """From now on there is something to save: the first signal no longer ends the process."""
        self._ends_at_once = False

    def finish(self) -> None:
        """All is saved, and the process about to end: a signal changes nothing any more."""
        for number in self._previous:
            signal.signal(number, signal.SIG_IGN)

    @contextmanager
    def other_ranks_may_be_gone(self) -> Iterator[None]:
        """A collective that fails because other ranks have ended is one line, not a traceback."""
        try:
            yield
        except UserError:
            raise
        except RuntimeError as error:
            first = (str(error).splitlines() or [""])[0].partition(". ")[0]
            if os.environ.get("WORLD_SIZE", "1") == "1":
                raise
            if self.requested and self.name in signal.Signals.__members__:
                _leave(self.name, f"another process was gone before this one could save ({first})")
            if not any(words in str(error) for words in _LOST_CONNECTION):
                raise
            _say(f"error: another process of this run is gone, its own lines may say why ({first})")
            os._exit(EXIT_LOST_RANK)

    def _read(self, read: int) -> None:
        while numbers := os.read(read, 64):
            for number in numbers:
                if number in self._previous:
                    self._receive(number)
        os.close(read)

    def _receive(self, number: int) -> None:
        name = signal.Signals(number).name
        self._insisted += number in INSISTENT
        if self._ends_at_once:
            _leave(name, "stopped during the start, nothing to save")
        if number in INSISTENT and self._insisted >= self._limit:
            _leave(name, "again: stopped at once, without what was not saved yet")
        self._request(name)

    def _request(self, name: str) -> None:
        if not self.requested:
            self.requested, self.name = True, name
            get_logger().info("%s: saving and stopping as soon as possible", name)


def _is_heard(number: int) -> bool:
    return number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN


def _to_the_thread(number: int, frame: FrameType | None) -> None:
    """Does nothing: the signal's number is in the pipe."""


def _leave(name: str, reason: str) -> NoReturn:
    """End this process with the exit code that shells give a process ended by the signal `name`."""
    _say(f"{name}: {reason}")
    os._exit(128 + signal.Signals[name])


def _say(line: str) -> None:
    rank = os.environ.get("RANK", "0")
    sys.stderr.write(f"{line}{f' (rank {rank})' if rank != '0' else ''}\n")
    sys.stderr.flush()


@contextmanager
def blocked() -> Iterator[None]:
    """Inside, this thread does not get STOP_SIGNALS, nor do the processes it starts, which keep them blocked."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def follow_parent(parent: int) -> None:
    """Of STOP_SIGNALS obey SIGTERM of process `parent` alone, and end when it ends. For a process it forked."""
    signal.set_wakeup_fd(-1)  # the parent's
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    if prctl is not None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    threading.Thread(target=_wait_for_the_end, args=(parent,), daemon=True, name="parent-watch").start()


def _wait_for_the_end(parent: int) -> None:
    while os.getppid() == parent:
        heard = signal.sigtimedwait(STOP_SIGNALS, 1.0)
        if heard is not None and heard.si_signo == signal.SIGTERM and heard.si_pid == parent:
            break
    os._exit(0)
