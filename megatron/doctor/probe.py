"""The process that looks at a node. It needs the standard library only; torch is tried in a process of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from functools import partial
from typing import Any

from megatron.doctor import disks, machine
from megatron.doctor.frames import BYE, DONE, HELLO, Check, pack, run_checks, say

TORCH_PROCESS = "torch process"
_TORCH_SECONDS, _LIFE_SECONDS = 120, 300


def probe(request: dict[str, Any]) -> int:
    """Run all checks of `request` (made by Target.commands) on this node and say what they found."""
    signal.alarm(_LIFE_SECONDS)  # nobody may be left to end it
    say(HELLO, DONE)
    run_checks(_checks(request))
    say(BYE, DONE)
    sys.stdout.flush()
    os._exit(0)  # not waiting for a check that hangs


def _checks(request: dict[str, Any]) -> list[Check]:
    shared = request["shared"]
    return [
        Check("python", 10, machine.python),
        Check("packages", 20, partial(machine.packages, request["packages"])),
        Check("source", 30, machine.source),
        Check("environment", 10, machine.environment),
        Check("limits", 10, machine.limits),
        Check("gpus", 30, machine.gpus),
        *([Check("shared folder", 20, partial(disks.look_at_shared, **shared))] if shared else []),
        *([Check("data files", 20, partial(disks.file_sizes, request["files"]))] if request["files"] else []),
        *(
            Check(f"{name} folder", 30, partial(disks.look_at_folder, path))
            for name, path in request["folders"].items()
        ),
        Check(TORCH_PROCESS, _TORCH_SECONDS + 5, run_torch_checks),
    ]


def run_torch_checks() -> None:
    """Run torch_checks.checks() in a new process, which says itself what they found. Raises when it dies."""
    command = [sys.executable, *worker_words("--torch", None)]
    env = {"OMP_WAIT_POLICY": "passive", **os.environ}  # threads of processes on one machine else wait for each other
    try:
        result = subprocess.run(command, env=env, stderr=subprocess.PIPE, text=True, timeout=_TORCH_SECONDS)
    except subprocess.TimeoutExpired as error:
        raise RuntimeError(f"ended after {_TORCH_SECONDS} s without an answer") from error
    if result.returncode:
        last = (result.stderr.strip().splitlines() or ["no message"])[-1]
        raise RuntimeError(f"exit code {result.returncode}: {last}")


def run_in_torch_process() -> int:
    """What the new process of run_torch_checks() does."""
    from megatron.doctor.torch_checks import checks

    signal.alarm(_LIFE_SECONDS)
    run_checks(checks())
    os._exit(0)


def worker_words(kind: str, request: Any) -> list[str]:
    """The words after the interpreter that start one of the doctor's own processes."""
    return [str(machine.ROOT / "deepy.py"), "doctor", kind, pack(request)]
