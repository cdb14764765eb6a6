"""Runs DeepSpeed's launcher until its workers have ended; signals, and launchers that are lost."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

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
    written: str | None = None
    """The hostfile written for this launch, removed after it."""

    @property
    def is_local(self) -> bool:
        """Do the workers run on this machine, as grandchildren of the launcher?"""
        return self.signal_depth == 2


def run_call(call: LauncherCall) -> int:
    """Run the launcher until it and its workers have ended; returns their exit code.

    The first of STOP_SIGNALS asks the workers to save and stop, once; SIGINT or SIGTERM again ends everything, and the
    exit code is 128 and the signal's number. The launcher has a session of its own, which a Ctrl-C does not reach, and
    a local one is deaf to signals: DeepSpeed would kill the workers 30 seconds after it heard one.
    """
    environment = {**call.environment, LAUNCHER_PID: str(os.getpid()), LAUNCHER_HOST: socket.gethostname()}
    stopper = _Stopper(call)
    numbers = [number for number in STOP_SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
    previous = {number: signal.signal(number, stopper.receive) for number in numbers}
    try:
        with blocked() if call.is_local else nullcontext():
            process = subprocess.Popen(call.command, env=environment, start_new_session=True)
            stopper.session = process.pid
        if stopper.received:  # before there was anything to stop
            stopper.act(process.pid)
        code = _shell_code(process.wait())
        stopper.wait_for_workers(process.pid)
        if code > 128 and not stopper.received and not stopper.code:
            get_logger().error("a worker was killed by signal %d (9: often out of memory)", code - 128)
        return stopper.code or code
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        if call.written:
            Path(call.written).unlink(missing_ok=True)


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


def _shell_code(code: int) -> int:
    """A worker killed by signal n comes out of DeepSpeed's launcher as 256 - n; shells say 128 + n."""
    if code < 0:
        return 128 - code
    return 128 + 256 - code if code > 192 else code


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
