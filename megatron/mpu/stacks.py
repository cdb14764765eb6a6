"""What a process is doing: its stacks, whether its main thread waits for other ranks, the collectives it has entered.

Takes no lock and asks no other thread, for any of them may hang.
"""

from __future__ import annotations

import faulthandler
import linecache
import os
import sys
import sysconfig
import threading
import time
from collections.abc import Callable, MutableMapping
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

_LIBRARIES = tuple({sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")})
_MAIL = "/megatron/mpu/mail.py"
_WAITS = (".wait(", "synchronize(", ".item(", ".tolist(", ".cpu(")
# Newer name first: where both are set, it is the one that torch reads.
_BUFFER = ("TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_TRACE_BUFFER_SIZE")
_RECORDED = 2000
_SECONDS = 2.0
"""For each file that is written: a disk may hang, and a busy machine be slow."""


def record_collectives(env: MutableMapping[str, str] = os.environ) -> None:
    """Have NCCL's flight recorder keep the last collectives, before the process group is made; what is set stays.

    torch writes them itself, below /tmp, when a collective runs out of time (TORCH_NCCL_DUMP_ON_TIMEOUT).
    """
    if not any(name in env for name in _BUFFER):
        env.update(dict.fromkeys(_BUFFER, str(_RECORDED)))
    env.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")


def waits_for_others() -> bool:
    """Is the main thread in a collective, or waiting for one, or for a thread that waits for other ranks?"""
    frames = sys._current_frames()
    frame = frames.get(threading.main_thread().ident or 0)
    if frame is None:
        return False
    if frame.f_code.co_filename.endswith("/torch/autograd/graph.py"):
        # On a GPU, the backward pass runs in threads of the device.
        return any(_is_wait(inner) for inner in frames.values())
    if frame.f_back is not None and "/concurrent/futures/" in frame.f_back.f_code.co_filename:
        return any(inner.f_code.co_filename.endswith(_MAIL) for inner in frames.values())  # of a save in a thread
    return _is_wait(frame)


def _is_wait(frame: FrameType) -> bool:
    """Whether the innermost frame of a thread is a call of the libraries, or a line of ours, that waits for ranks."""
    file = frame.f_code.co_filename
    if "/torch/distributed/" in file or "/torch/cuda/" in file or "/deepspeed/comm/" in file or file.endswith(_MAIL):
        return True
    if "/deepspeed/" not in file and "/megatron/" not in file:
        return False
    line = linecache.getline(file, frame.f_lineno)
    return any(word in line for word in _WAITS)


def main_place() -> str:
    """`file:line function` of the innermost frame of the main thread that is no library's."""
    innermost = frame = sys._current_frames().get(threading.main_thread().ident or 0)
    while frame is not None and frame.f_code.co_filename.startswith((*_LIBRARIES, "<")):
        frame = frame.f_back
    frame = frame or innermost
    if frame is None:
        return "nowhere"
    name = "/".join(Path(frame.f_code.co_filename).parts[-3:])
    return f"{name}:{frame.f_lineno} {frame.f_code.co_name}"


def collectives_entered() -> dict[str, int]:
    """By name of each process group, the collectives that this process has entered; {} where that is not counted."""
    found = dict[str, int]()
    groups: list[tuple[Any, str]] = list(distributed_c10d._world.pg_names.items())
    for group, name in groups:
        try:
            if group.size() > 1:
                found[name] = group._get_sequence_number_for_group()
        except (RuntimeError, AttributeError):
            continue
    return found


def write_stacks(folder: Path | None, rank: int, title: str) -> None:
    """Append the stacks of all threads to `folder`/rank{rank}.txt, or to stderr; what cannot be written is lost."""
    _within(_SECONDS, lambda: _write(folder, rank, title))
    if folder is not None:
        _within(_SECONDS, lambda: _write_collectives(folder, rank))  # not in what is left of the time for stacks


def _write(folder: Path | None, rank: int, title: str) -> None:
    head = f"== {time.strftime('%Y-%m-%d %H:%M:%S')} rank {rank}: {title} ==\n".encode()
    try:
        descriptor = 2 if folder is None else _open(folder / f"rank{rank}.txt", os.O_APPEND)
        os.write(descriptor, head)
        faulthandler.dump_traceback(descriptor, all_threads=True)
        if folder is not None:
            os.close(descriptor)
    except OSError:
        return


def _write_collectives(folder: Path, rank: int) -> None:
    """What torch's flight recorder has: of NCCL in the form that `torchfrtrace` reads, else as JSON."""
    if not dist.is_initialized():
        return
    backend = dist.get_backend()
    call, suffix = ("_dump_nccl_trace", "") if backend == "nccl" else ("_dump_fr_trace_json", ".json")
    dump = getattr(torch._C._distributed_c10d, call, None)
    if dump is not None:
        found = dump()  # first: a process that ends meanwhile leaves no empty file
        with suppress(OSError):
            descriptor = _open(folder / f"{backend}_trace_rank_{rank}{suffix}", os.O_TRUNC)
            os.write(descriptor, found)
            os.close(descriptor)


def _open(path: Path, flag: int) -> int:
    path.parent.mkdir(parents=True, exist_ok=True)
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK | flag, 0o666)


def _within(seconds: float, action: Callable[[], None]) -> None:
    """Do something that may hang, as a disk or a GPU may, and wait for it no longer than that."""
    thread = threading.Thread(target=action, daemon=True, name="watchdog-dump")
    with suppress(RuntimeError):  # no more threads
        thread.start()
        thread.join(seconds)
