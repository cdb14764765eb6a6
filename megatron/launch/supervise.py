"""Runs DeepSpeed's launcher until its workers have ended; signals, and launchers that are lost."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from megatron.errors import EXIT_LOST_RANK, EXIT_NO_READER, EXIT_USER_ERROR
from megatron.failures import node_name
from megatron.launch.culprit import Culprit, Listener, shell_code
from megatron.log import get_logger
from megatron.mpu.environment import LAUNCHER_HOST, LAUNCHER_PID
from megatron.signals import INSISTENT, STOP_SIGNALS, blocked

WORKER = str(Path(__file__).with_name("worker.py"))
"""What DeepSpeed's launcher starts on this machine; runs the script that follows it."""


@dataclass(frozen=True)
class LauncherCall:
    """One call of DeepSpeed's launcher."""

    command: list[str]
    environment: dict[str, str]
    signal_depth: int = 0
    """Where a signal goes in the process tree below the launcher: 2 is a local worker, 1 is srun or mpirun."""
    stop_signal: signal.Signals = signal.SIGTERM
    """What is sent there to have the workers save and stop. srun and mpirun pass SIGUSR1 on, and kill on SIGTERM."""
    stop_command: list[str] | None = None
    """Run instead of sending a signal, where the workers are no descendants of the launcher."""
    kill_command: list[str] | None = None
    """Kills all workers, where the launcher leaves those of other nodes alone when some have failed."""
    written: str | None = None
    """The hostfile written for this launch, removed after it."""
    hosts: Mapping[str, int] = field(default_factory=dict)
    """{node: processes} of several nodes, in the order of the ranks."""

    @property
    def is_local(self) -> bool:
        """Do the workers run on this machine, as grandchildren of the launcher?"""
        return self.signal_depth == 2


_GRACE_SECONDS = 60.0
_NO_FAILURE = {0, EXIT_USER_ERROR, EXIT_NO_READER, *(128 + number for number in STOP_SIGNALS)}


@dataclass(frozen=True)
class Outcome:
    """How a call of the launcher ended."""

    code: int
    """Its exit code, as shells have it."""
    was_stopped: bool = False
    """Did a signal ask for the end?"""
    culprit: Culprit | None = None
    """The first process that ended by itself, where a launcher of several nodes has told."""
    is_local: bool = False
    """Did the workers run on this machine?"""

    @property
    def is_failure(self) -> bool:
        """Has it failed by nobody's mistake or wish, so that another attempt may do better?"""
        cause = self.culprit.exit_code if self.culprit else self.code
        return not self.was_stopped and self.code != 0 and cause not in _NO_FAILURE

    def blame(self) -> tuple[str | None, int | None, str]:
        """(node, rank, what happened), None where that is not known."""
        if self.culprit is not None and self.culprit.exit_code != EXIT_LOST_RANK:  # else it only names a victim
            return self.culprit.node, self.culprit.rank, _in_words(self.culprit.exit_code)
        return node_name() if self.is_local else None, None, _in_words(self.code)


def _in_words(code: int) -> str:
    if code == EXIT_LOST_RANK:
        return "a process was lost"
    return f"a process was killed by signal {code - 128}" if code > 128 else f"a process ended with exit code {code}"


@contextmanager
def signals_to(receive: Callable[[int, FrameType | None], object]) -> Iterator[None]:
    """Inside, STOP_SIGNALS are given to `receive`; those that are ignored stay ignored."""
    numbers = [number for number in STOP_SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
    previous = {number: signal.signal(number, receive) for number in numbers}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def run_call(call: LauncherCall) -> Outcome:
    """Run the launcher until it and its workers have ended; returns how they did.

    The first of STOP_SIGNALS asks the workers to save and stop, once; SIGINT or SIGTERM again ends everything, and the
    exit code is 128 and the signal's number. The launcher has a session of its own, which a Ctrl-C does not reach, and
    a local one is deaf to signals: DeepSpeed would kill the workers 30 seconds after it heard one.
    """
    environment = {**call.environment, LAUNCHER_PID: str(os.getpid()), LAUNCHER_HOST: socket.gethostname()}
    stopper = _Stopper(call)
    try:
        with signals_to(stopper.receive):
            return _run(call, environment, stopper)
    finally:
        if call.written:
            Path(call.written).unlink(missing_ok=True)


def _run(call: LauncherCall, environment: dict[str, str], stopper: _Stopper) -> Outcome:
    stderr = None if call.is_local else subprocess.PIPE
    with blocked() if call.is_local else nullcontext():
        process = subprocess.Popen(call.command, env=environment, start_new_session=True, stderr=stderr)
        stopper.session = process.pid
    rest = threading.Timer(_GRACE_SECONDS, _end_the_rest, (call, process, stopper))
    rest.daemon = True
    listener = Listener(process.stderr, call.hosts, rest.start) if process.stderr else None
    if stopper.received:  # before there was anything to stop
        stopper.act(process.pid)
    code = shell_code(process.wait())
    rest.cancel()
    stopper.wait_for_workers(process.pid)
    if code > 128 and not stopper.received and not stopper.code:
        get_logger().error("a worker was killed by signal %d (9: often out of memory)", code - 128)
    culprit = listener.culprit() if listener else None
    return Outcome(stopper.code or code, bool(stopper.received), culprit, call.is_local)


def _end_the_rest(call: LauncherCall, process: subprocess.Popen[bytes], stopper: _Stopper) -> None:
    """Kill workers that go on, or stand still, although others have failed; then a launcher that waits for them."""
    if call.kill_command is None or stopper.received:
        return
    get_logger().error("processes of other nodes are left after a failure: killing them")
    with suppress(subprocess.TimeoutExpired):
        subprocess.run(call.kill_command, env=call.environment, timeout=_GRACE_SECONDS, check=False)
        process.wait(_GRACE_SECONDS)
    with suppress(ProcessLookupError):
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


class _Stopper:
    """Stops the workers of a call, whose launcher leads `session` once it has been started."""

    def __init__(self, call: LauncherCall) -> None:
        self.call, self.received, self.code = call, list[int](), 0
        self.session: int | None = None
        self._asked = False

    def receive(self, number: int, _frame: FrameType | None = None) -> None:
        """Handle a signal; one that comes before there is anything to stop, later."""
        self.received.append(number)
        if self.session is not None:
            self.act(self.session)

    def act(self, session: int) -> None:
        """Ask the workers to save and stop; end them where SIGINT or SIGTERM has come again."""
        number, insisted = self.received[-1], sum(number in INSISTENT for number in self.received)
        name = signal.Signals(number).name
        if insisted > 1:
            get_logger().info("%s again: stopped at once, without what was not saved yet", name)
            # Those of other nodes are reached through the launcher only, which has to stay for that.
            self._end(session, number, signal.SIGKILL if self.call.is_local or insisted > 2 else signal.SIGTERM)
        elif not self._asked:
            self._asked = True
            get_logger().info("%s: asking the workers to save and stop", name)
            if not _stop_workers(self.call, session):
                self._end(session, number, signal.SIGKILL)

    def _end(self, session: int, number: int, kind: signal.Signals) -> None:
        self.code = 128 + number
        with suppress(ProcessLookupError):
            os.killpg(session, kind)

    def wait_for_workers(self, session: int, interval: float = 0.2) -> None:
        """Wait for workers that have lost their launcher, after they have been asked to save and stop."""
        workers = _left_behind(session) if self.call.is_local else []
        if workers and not self.received:
            self.code = 128 + signal.SIGKILL
            get_logger().error("the launcher was killed: asking the workers to save and stop")
            for process in workers:
                with suppress(ProcessLookupError):
                    os.kill(process, signal.SIGTERM)
        while workers:
            time.sleep(interval)
            workers = _left_behind(session)


def _left_behind(session: int) -> list[int]:
    """Ids of the processes of `session` that run a worker, or start it."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has just ended
            if os.getsid(int(entry.name)) == session and WORKER.encode() in (entry / "cmdline").read_bytes():
                found.append(int(entry.name))
    return found


def _stop_workers(call: LauncherCall, pid: int) -> bool:
    """Ask the workers of the launcher `pid` to save and stop; false where it has started none yet."""
    import psutil  # comes with deepspeed

    if call.stop_command:
        subprocess.Popen(call.stop_command, env=call.environment, start_new_session=True)
        return True
    with suppress(psutil.NoSuchProcess):
        level = [psutil.Process(pid)]
        for _ in range(call.signal_depth):
            level = [child for parent in level for child in parent.children()] or ([] if call.is_local else level)
        for process in level:
            with suppress(psutil.NoSuchProcess):
                process.send_signal(call.stop_signal)
        return bool(level)
    return False
