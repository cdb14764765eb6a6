"""Runs each part of the check in processes of its own, so that one that crashes or hangs takes no other with it.

Needs the standard library only: what is missing on a machine is for the parts to find out.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from typing import Any, Literal

Status = Literal["ok", "failed", "skipped"]
_PRELOAD = ["deepspeed.runtime.engine", "megatron.training.loop", "megatron.inference"]


class Skip(Exception):
    """A check that cannot be made here; the text says why."""


@dataclass(frozen=True)
class Settings:
    """What every part is told."""

    device: str
    """`cuda` or `cpu`."""
    folder: str
    """Scratch folder that all parts share."""
    quick: bool = False
    """Two minutes instead of ten."""
    toy: bool = False
    """Models of a size that a CPU trains in a second."""


@dataclass(frozen=True)
class Row:
    """One line of the table: what was checked, and the figure that decided."""

    part: str
    check: str
    status: Status
    figure: str


@dataclass(frozen=True)
class Part:
    """A function `module.name(settings)` that yields (check, ok, figure), on `world` processes; rank 0 reports."""

    name: str
    module: str
    seconds: float = 180.0
    """Seconds after which it counts as hung."""
    world: int = 1
    on_cpu: bool = False
    """It computes on the CPU whatever the machine has."""


def choose_device(asked: str) -> str:
    """`cuda` or `cpu` as asked for; for `auto`, the GPU where there is one."""
    if asked != "auto":
        return asked
    import torch  # not before: a machine without it gets its line first

    return "cuda" if torch.cuda.is_available() else "cpu"


def run_part(part: Part, settings: Settings) -> Iterator[Row]:
    """The rows of a part as they come, and one more when it breaks off."""
    context = _context(settings)
    receiver, sender = context.Pipe(duplex=False)
    port = _free_port()
    ranks = [
        context.Process(target=_rank, args=(part, settings, rank, port, sender if rank == 0 else None))
        for rank in range(part.world)
    ]
    for process in ranks:
        process.start()
    sender.close()
    begin = time.monotonic()
    ended = False
    try:
        while not ended:
            message = _next_message(receiver, begin + part.seconds - time.monotonic())
            ended = message is None
            if message is not None:
                yield Row(part.name, *message)
        fault = _fault(ranks, part, time.monotonic() - begin)
        if fault:
            yield Row(part.name, "the part itself", "failed", fault)
    finally:
        for process in ranks:
            _kill(process.pid)
            process.join()


def _context(settings: Settings) -> Any:
    # A CUDA context does not survive a fork; on a CPU a server pays for the imports once.
    if settings.device == "cuda":
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)
    return context


def _next_message(receiver: Connection, seconds: float) -> tuple[str, Status, str] | None:
    """What the first rank reports next; None when it has ended or time is up."""
    try:
        return receiver.recv() if receiver.poll(max(0.0, seconds)) else None
    except (EOFError, OSError):
        return None


def _fault(ranks: list[Any], part: Part, seconds: float) -> str:
    """Why the part broke off; empty when it did not."""
    for process in ranks:
        process.join(max(0.0, min(5.0, part.seconds - seconds)))
    if any(process.is_alive() for process in ranks):
        return f"no answer within {part.seconds:.0f} s"
    codes = [process.exitcode for process in ranks]
    return "" if not any(codes) else f"ended with exit code {next(code for code in codes if code)}"


def _rank(part: Part, settings: Settings, rank: int, port: int, sender: Connection | None) -> None:
    os.setsid()  # so that it can be ended together with what it starts
    sys.stdout = open(os.path.join(settings.folder, f"{part.name}.{rank}.log"), "w", encoding="utf-8")  # noqa: SIM115
    os.dup2(sys.stdout.fileno(), 1)
    os.dup2(sys.stdout.fileno(), 2)
    values = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": part.world, "MASTER_ADDR": "127.0.0.1"}
    os.environ.update({name: str(value) for name, value in {**values, "MASTER_PORT": port}.items()})
    if settings.device == "cpu" or part.on_cpu:
        os.environ.update(DS_ACCELERATOR="cpu", CUDA_VISIBLE_DEVICES="")
    code = 0
    try:
        for check, ok, figure in getattr(importlib.import_module(part.module), part.name)(settings):
            _report(sender, check, "ok" if ok else "failed", figure)
    except Skip as reason:
        _report(sender, "", "skipped", str(reason))
    except BaseException as error:
        traceback.print_exc()
        _report(sender, "", "failed", f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
    sys.stdout.flush()
    os._exit(code)  # a gloo thread may outlive the interpreter and abort it


def _report(sender: Connection | None, check: str, status: Status, figure: str) -> None:
    if sender is not None:
        sender.send((check, status, figure))


def _kill(pid: int | None) -> None:
    try:
        if pid:
            os.killpg(pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        pass


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def as_json(rows: list[Row]) -> list[dict[str, str]]:
    """Rows as JSON objects."""
    return [asdict(row) for row in rows]
