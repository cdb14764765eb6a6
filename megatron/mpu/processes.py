"""Joining and leaving the process group, for programs that do not train (training joins through DeepSpeed)."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

from megatron.errors import UserError
from megatron.mpu.device import uses_gpu
from megatron.mpu.layout import SINGLE, Layout

Result = TypeVar("Result")

# Between two collectives of data ranks lies all their work: an evaluation may take hours.
_TIMEOUT = timedelta(days=2)


def claim_device() -> None:
    """Take this process's GPU, or its share of the cores: each would otherwise start one thread a core."""
    if uses_gpu():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        return
    processes = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or "1")
    if "OMP_NUM_THREADS" not in os.environ and processes > 1:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // processes))


def no_process_group(error: dist.DistNetworkError) -> UserError:
    """What to tell the user when the process group cannot be joined."""
    address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    reason = str(error).splitlines()[0][:150]
    return UserError(f"master_port: no process group at {address} ({reason}); choose another port")


def join(tensor_size: int, backend: str) -> Layout:
    """The grid of this world's processes: groups of `tensor_size` that share a model, and as many of them as there are.

    RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT describe the world; one process needs no group.

    Raises: UserError when the world is no multiple of `tensor_size` or cannot be joined.
    """
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    try:
        layout = Layout.for_world(rank, world, tensor_size=tensor_size)
    except ValueError as error:
        raise UserError(f"{error}, or load the model with `--set model_parallel_size=1`") from error
    return _connect(layout, backend)


def join_one_copy(tensor_size: int, backend: str) -> Layout | None:
    """The grid of the first `tensor_size` processes, which hold one copy of a model; None for the others.

    Raises: UserError when there are fewer processes, or they cannot be joined.
    """
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if world < tensor_size:
        raise UserError(
            f"model_parallel_size: {world} processes for {tensor_size} tensor ranks; start {tensor_size}, or load the "
            "model with `--set model_parallel_size=1`"
        )
    return _connect(Layout(rank, 1, 1, tensor_size), backend) if rank < tensor_size else None


def _connect(layout: Layout, backend: str) -> Layout:
    if layout.world_size == 1:
        return SINGLE
    claim_device()
    if not dist.is_initialized():
        size, rank = layout.world_size, layout.rank
        try:
            dist.init_process_group(backend if uses_gpu() else "gloo", timeout=_TIMEOUT, world_size=size, rank=rank)
        except dist.DistNetworkError as error:
            raise no_process_group(error) from error
    return layout.connect(_TIMEOUT)


def first_rank_does(action: Callable[[], Result], layout: Layout) -> Result | None:
    """Do something on the first process of the grid only; its UserError is raised on every process. Collective.

    Returns: what it came to, on the first process; None on the others.
    """
    result, error = None, None
    if layout.rank == 0:
        try:
            result = action()
        except UserError as found:
            error = found
    if layout.world_size > 1:
        box = [None if error is None else str(error)]
        dist.broadcast_object_list(box, src=0)
        error = error or (None if box[0] is None else UserError(box[0]))
    if error is not None:
        raise error
    return result


def leave() -> None:
    """Leave the process group once all its processes have come here, so that no communication thread outlives them."""
    if dist.is_initialized():
        dist.barrier()
        time.sleep(0.3)
        dist.destroy_process_group()
