"""`python deepy.py doctor [CONFIG.yml] [flags]`: one table, a JSON file, an exit code."""

from __future__ import annotations

import argparse
import os
import signal
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from megatron.doctor.axes import run_axes
from megatron.doctor.disks import held_folder
from megatron.doctor.findings import PROBLEM, Finding
from megatron.doctor.frames import DONE, unpack
from megatron.doctor.nodes import Report, gather
from megatron.doctor.probe import probe, run_in_torch_process
from megatron.doctor.report import as_json, table
from megatron.doctor.target import AXES_SECONDS, Target, find_target, this_machine
from megatron.doctor.verdicts import judge
from megatron.errors import UserError
from megatron.files import find_output

_PROG = "deepy.py doctor"
_FIRST_WORD_SECONDS, _NODE_SECONDS = 60.0, 200.0
_PROCESSES = {"--probe": probe, "--torch": lambda _: run_in_torch_process(), "--axes": run_axes}


def doctor(argv: Sequence[str]) -> int:
    """Check the nodes; 0 when they are fine, 1 when there are problems. Raises UserError for the user's mistakes."""
    if argv[:1] and argv[0] in _PROCESSES:
        return _PROCESSES[argv[0]](unpack(argv[1]))
    file, rest = _own_flags(argv)
    output = find_output(file, "--json") if file else None
    target = _target(rest)
    start = time.monotonic()
    stop = _stop_event()
    try:
        reports, findings = _look(target, stop)
        axes, why_not = _measure(target, reports, stop)
        findings += judge(reports, target.expected, axes)
    except KeyboardInterrupt:
        return 130
    finally:
        if target.axes and target.axes.written:
            Path(target.axes.written).unlink(missing_ok=True)
    print(table(reports, axes, why_not, findings), flush=True)
    if output:
        with output.open() as stream:
            stream.write(as_json(reports, axes, findings, time.monotonic() - start).encode())
    return 1 if any(finding.level == PROBLEM for finding in findings) else 0


def _stop_event() -> threading.Event:
    """Set by Ctrl-C and SIGTERM: an exception in the midst of starting a process would leave that one behind."""
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    return stop


def _own_flags(argv: Sequence[str]) -> tuple[str | None, list[str]]:
    """The file of --json, and the words for the configuration's parser."""
    parser = argparse.ArgumentParser(
        prog=f"python {_PROG}", usage=f"python {_PROG} [conf_file ...] [flags]", allow_abbrev=False,
        exit_on_error=False,
        description="Checks the nodes that a configuration would run on, or this machine without one, in a minute.",
        epilog="The flags of `deepy.py train.py` are taken, too: -d, --set, --hostfile and the others.",
    )  # fmt: skip
    parser.add_argument("--json", metavar="FILE", help="write everything that was found to this file, too")
    try:
        args, rest = parser.parse_known_args(list(argv))
    except argparse.ArgumentError as error:
        raise UserError(f"{_PROG}: {error} (see `python {_PROG} --help`)") from None
    return args.json, rest


def _target(words: list[str]) -> Target:
    if not words:
        return this_machine()
    try:
        from megatron.config.cli import parse_arguments
    except ModuleNotFoundError:
        return find_target(argparse.Namespace(), _PROG)  # says which package is missing
    return find_target(parse_arguments(words, _PROG), _PROG)


def _look(target: Target, stop: threading.Event) -> tuple[dict[str, Report], list[Finding]]:
    """What every node says; and that the shared folder cannot be tried, where this machine cannot write to it."""
    folder = next(iter((target.folders or {}).values()), None) or "."
    shared, findings = None, []
    with ExitStack() as stack:
        try:
            shared = stack.enter_context(held_folder(Path(folder)))
        except OSError as error:
            text = f"{folder} cannot be written to from here, so it was not tried: {error.strerror}"
            findings.append(Finding(PROBLEM, "shared folder", (), text))
        commands = target.commands(shared, os.environ)
        return gather(commands, os.environ, _FIRST_WORD_SECONDS, _NODE_SECONDS, stop), findings


def _measure(target: Target, reports: dict[str, Report], stop: threading.Event) -> tuple[Report | None, str]:
    """What the processes of the layout say; or None and why they were not started: one missing node stops them all."""
    if target.axes is None:
        return None, "not measured: one process, or no configuration"
    unable = [node for node, report in reports.items() if report.checks.get("torch", {}).get("state") != DONE]
    if unable:
        return None, f"not measured: no torch on {', '.join(unable[:6])}"
    command, env, seconds = target.axes.command, target.axes.environment, AXES_SECONDS + 30
    return gather({"axes": command}, env, seconds, seconds, stop)["axes"], ""
