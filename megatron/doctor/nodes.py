"""Starts a command on each node, side by side, and listens to what it says; a node that is silent holds up no other."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import threading
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron.doctor.frames import BYE, DONE, FAILED, HELLO, HUNG, STARTED, heard

_PASSED_ON = ("NCCL", "PYTHON", "MV2", "UCX")  # what DeepSpeed hands to the nodes, and NCCL's own


@dataclass
class Report:
    """What one node said."""

    checks: dict[str, dict[str, Any]] = field(default_factory=dict)
    """{name: {"state": ..., "value": ...}}; no check is left as started once the node is done."""
    ended: bool = False
    """Did it come to its end?"""
    delay: float | None = None
    """The least time in seconds between a line being written and being heard, by the clocks of both machines."""
    error: str = ""
    """The last line that it wrote to standard error."""

    @property
    def answered(self) -> bool:
        """Was a word heard?"""
        return self.delay is not None

    def found(self, check: str) -> Any:
        """The value of a check; None where it has none."""
        entry = self.checks.get(check, {})
        return entry.get("value") if entry.get("state") == DONE else None

    def hear(self, line: str) -> None:
        """Take in a line of standard output."""
        frame = heard(line)
        if frame is None:
            return
        delay = time.time() - float(frame["time"])
        self.delay = delay if self.delay is None else min(self.delay, delay)
        if frame["check"] == BYE:
            self.ended = True
        elif frame["check"] != HELLO:
            known = self.checks.get(frame["check"], {}).get("state", STARTED)
            if known == STARTED:  # the answer of a check that had been given up changes nothing
                self.checks[frame["check"]] = {"state": frame["state"], "value": frame["value"]}

    def close(self) -> None:
        """No more will be heard."""
        for check in self.checks.values():
            if check["state"] == STARTED:
                check |= {"state": HUNG, "value": "it ended, or was ended, without an answer"}


def gather(
    commands: Mapping[str, list[str]],
    env: Mapping[str, str],
    first_word: float,
    whole: float,
    stop: threading.Event | None = None,
) -> dict[str, Report]:
    """Run all commands at once and listen to each until it ends.

    Args:
        first_word: seconds after which a command that has said nothing is ended.
        whole: seconds after which all are.
        stop: ends all at once when it is set.

    Raises: KeyboardInterrupt after that.
    """
    reports = {name: Report() for name in commands}
    running: dict[str, tuple[subprocess.Popen[str], list[threading.Thread]]] = {}
    start = time.monotonic()
    try:
        for name, command in commands.items():
            running[name] = _start(command, env, reports[name])
        while any(thread.is_alive() for _, threads in running.values() for thread in threads):
            if stop is not None and stop.is_set():
                raise KeyboardInterrupt
            passed = time.monotonic() - start
            late = [n for n in running if passed > (whole if reports[n].answered else first_word)]
            _end([running[name][0] for name in late])
            if passed > whole + 10:  # something that the command left behind holds its output open
                break
            time.sleep(0.05)
    finally:
        _end([process for process, _ in running.values()])
    for report in reports.values():
        report.close()
    return reports


def _start(
    command: list[str], env: Mapping[str, str], report: Report
) -> tuple[subprocess.Popen[str], list[threading.Thread]]:
    try:
        process = subprocess.Popen(
            command, env=dict(env), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            text=True, errors="replace", start_new_session=True,
        )  # fmt: skip
    except OSError as error:
        report.checks["start"] = {"state": FAILED, "value": f"{command[0]}: {error.strerror}"}
        return subprocess.Popen(["true"], text=True), []

    def words() -> None:
        for line in process.stdout or ():
            report.hear(line)

    def errors() -> None:
        for line in process.stderr or ():
            report.error = " ".join(line.split())[:300] or report.error

    threads = [threading.Thread(target=listen, daemon=True) for listen in (words, errors)]
    for thread in threads:
        thread.start()
    return process, threads


def _end(processes: Iterable[subprocess.Popen[str]]) -> None:
    """Ask those that still run to end, so that srun ends its tasks, and kill them a little later."""
    alive = [process for process in processes if process.poll() is None]
    for number in (signal.SIGTERM, signal.SIGKILL):
        for process in alive:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, number)
        end = time.monotonic() + 5
        while alive and time.monotonic() < end:
            time.sleep(0.05)
            alive = [process for process in alive if process.poll() is None]


def on_node(launcher: str, node: str, arguments: str, words: list[str], env: Mapping[str, str]) -> list[str]:
    """The command that runs `words` once on `node`, through the launcher that would start the run there.

    arguments: the configuration's launcher_args.
    """
    extra = shlex.split(arguments)
    if launcher == "slurm":
        own = ["--nodes=1", "--ntasks=1", "--ntasks-per-node=1", f"--nodelist={node}", "--overlap", "--cpu-bind=none"]
        return ["srun", *extra, *own, *words]
    if launcher == "openmpi":
        return ["mpirun", *extra, "-n", "1", "--host", node, *words]
    settings = [f"{name}={value}" for name, value in env.items() if name.startswith(_PASSED_ON)]
    remote = f"cd {shlex.quote(str(Path.cwd()))} && {shlex.join(['env', *settings, *words])}"
    if launcher == "pdsh":
        return ["pdsh", "-S", "-R", "ssh", "-w", node, *extra, remote]
    return ["ssh", "-o", "BatchMode=yes", node, remote]
