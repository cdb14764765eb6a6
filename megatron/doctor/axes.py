"""A process of the run's layout that measures the all-reduce of each axis it is part of; started as training is."""

from __future__ import annotations

import os
import signal
import socket
import time
from datetime import timedelta
from typing import Any

from megatron.doctor.frames import BYE, DONE, say

AXES = ("tensor", "pipeline", "data")
_GPU_BYTES, _CPU_BYTES, _ROUNDS = 256 << 20, 16 << 20, 4


def run_axes(request: dict[str, Any]) -> int:
    """Join the processes of the run, measure, and say what this one found.

    request: pipeline, tensor, backend, ranks_per_gpu, seconds; made by target._axes_launch.
    """
    from megatron.mpu.environment import ensure_process_environment

    signal.alarm(int(request["seconds"]))  # the others may never come
    ensure_process_environment()
    from megatron.mpu.processes import abandoned_on_error, leave_world

    with abandoned_on_error():
        for found in measure(request):
            say(f"{found['axis']} axis, rank {found['rank']}", DONE, found)
    leave_world()
    say(BYE, DONE)
    return 0


def measure(request: dict[str, Any]) -> list[dict[str, Any]]:
    """Per axis of this process: axis, ranks of its group, rank, host, rate (bytes/s of the bus). Collective."""
    import torch.distributed as dist

    from megatron.mpu import Layout
    from megatron.mpu.processes import connect_world

    wait = timedelta(seconds=request["seconds"])
    connect_world(request["backend"], wait, request["ranks_per_gpu"])
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    layout = Layout.for_world(rank, world, request["pipeline"], request["tensor"]).connect(wait)
    host = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
    found = []
    for axis in AXES:
        group = getattr(layout, axis).group
        if group is not None:  # so it is on all ranks, or on none
            dist.barrier()
            ranks = dist.get_process_group_ranks(group)
            found.append({"axis": axis, "ranks": ranks, "rank": rank, "host": host, "rate": _rate(group)})
    return found


def _rate(group: Any) -> float:
    """Bus bandwidth, 2 (n - 1) / n bytes over the time of an all-reduce: the best round but the first."""
    import torch
    import torch.distributed as dist

    from megatron.mpu.device import process_device

    device = process_device()
    size = _GPU_BYTES if device.type == "cuda" else _CPU_BYTES
    values, members, best = torch.zeros(size // 4, device=device), dist.get_world_size(group), 0.0
    for number in range(_ROUNDS):
        start = time.perf_counter()
        dist.all_reduce(values, group=group)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if number:
            best = max(best, 2 * (members - 1) / members * size / (time.perf_counter() - start))
    return best
