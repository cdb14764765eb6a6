"""Joining and leaving the process group; work that one process does for all.

RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT describe the world.
"""

from __future__ import annotations

import inspect
import itertools
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from megatron.errors import LostRank, UserError
from megatron.mpu.device import claim_device, process_device, refuse_shared_gpu, uses_gpu
from megatron.mpu.layout import SINGLE, Layout
from megatron.mpu.peers import Peers
from megatron.mpu.progress import Limits
from megatron.mpu.through_host import take_collectives_through_host
from megatron.mpu.watchdog import Watchdog
from megatron.signals import is_lost_connection, is_timeout

Result = TypeVar("Result")

# Between two collectives of data ranks lies all their work: an evaluation may take hours. The watchdog ends it when
# a process is lost.
_TIMEOUT = timedelta(days=2)

# Seconds: how often the first rank says that it is still at work for all, and how long the others
# believe it without; a watchdog has a limit of its own.
_BEAT_SECONDS, _SILENCE_SECONDS = 5.0, 120.0
_works = itertools.count()
_watchdog: Watchdog | None = None


def connect_world(
    backend: str | None, timeout: timedelta, ranks_per_gpu: int = 1, world_size: int | None = None
) -> None:
    """Take this process's device and join the process group of all processes; nothing where that has been done.

    Args:
        backend: nccl, gloo or mpi; None is nccl where there is a GPU, else gloo, which a machine without one uses
            whatever is asked for.
        timeout: how long a collective waits for a rank.
        ranks_per_gpu: processes that may share a GPU.
        world_size: join the first so many processes only; default all, WORLD_SIZE.

    Raises: UserError when the group cannot be joined, RankError for a GPU that is not there or is another process's.
    """
    if dist.is_initialized():
        return
    claim_device(ranks_per_gpu)
    rank, world = int(os.environ["RANK"]), world_size or int(os.environ["WORLD_SIZE"])
    backend = (backend or "nccl") if uses_gpu() else "gloo"
    if uses_gpu() and ranks_per_gpu > 1:
        take_collectives_through_host()
    try:
        store = _shared_store(rank, world, timeout)
        refuse_shared_gpu(store, ranks_per_gpu)
        dist.init_process_group(
            backend, store=store, rank=rank, world_size=world, timeout=timeout, **_bound_device(backend, world)
        )
    except dist.DistNetworkError as error:
        raise no_process_group(error) from error


def _shared_store(rank: int, world: int, timeout: timedelta) -> dist.Store:
    """The key-value store of all processes. One process needs none that others can reach: it opens no port."""
    if world == 1:
        return dist.HashStore()
    return next(dist.rendezvous("env://", rank, world, timeout=timeout))[0]


def _bound_device(backend: str, world: int) -> dict[str, Any]:
    """Bind NCCL's groups to this process's GPU: barriers then need not guess it, and new groups split off the world's.

    torch between 2.6.0 and 2.7.1 hangs with it (https://github.com/pytorch/pytorch/issues/153960).
    """
    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:3] if part.isdigit())
    takes = "device_id" in inspect.signature(dist.init_process_group).parameters
    if backend != "nccl" or world == 1 or not takes or (2, 6, 0) < version < (2, 7, 1):
        return {}
    return {"device_id": process_device()}


def no_process_group(error: dist.DistNetworkError) -> UserError:
    """What to tell the user when the process group cannot be joined."""
    address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    reason = str(error).splitlines()[0][:150]
    return UserError(f"master_port: no process group at {address} ({reason}); choose another port")


def join(tensor_size: int, backend: str | None, ranks_per_gpu: int = 1) -> Layout:
    """The grid of this world's processes: groups of `tensor_size` that share a model, and as many of them as there are.

    For programs that do not train. One process needs no group.

    Raises: UserError when the world is no multiple of `tensor_size` or cannot be joined.
    """
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    try:
        layout = Layout.for_world(rank, world, tensor_size=tensor_size)
    except ValueError as error:
        raise UserError(f"{error}, or load the model with `--set model_parallel_size=1`") from error
    return _connect(layout, backend, ranks_per_gpu)


def join_one_copy(tensor_size: int, backend: str | None, ranks_per_gpu: int = 1) -> Layout | None:
    """The grid of the first `tensor_size` processes, which hold one copy of a model; None for the others.

    Raises: UserError when there are fewer processes, or they cannot be joined.
    """
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if world < tensor_size:
        raise UserError(
            f"model_parallel_size: {world} processes for {tensor_size} tensor ranks; start {tensor_size}, or load the "
            "model with `--set model_parallel_size=1`"
        )
    return (
        _connect(Layout.for_world(rank, tensor_size, tensor_size=tensor_size), backend, ranks_per_gpu)
        if rank < tensor_size
        else None
    )


def _connect(layout: Layout, backend: str | None, ranks_per_gpu: int) -> Layout:
    if layout.world_size == 1:
        if uses_gpu():
            claim_device(ranks_per_gpu)
        return SINGLE
    connect_world(backend, _TIMEOUT, ranks_per_gpu, layout.world_size)
    watchdog_of(layout).begin("evaluation", Limits())
    return layout.connect(_TIMEOUT)


def watchdog_of(layout: Layout) -> Watchdog:
    """The watchdog of this process, which stays until `stop_watching`. Every rank that has joined is to have one."""
    global _watchdog
    if _watchdog is None:
        _watchdog = Watchdog(Peers(layout.rank, layout.world_size) if layout.world_size > 1 else None)
    return _watchdog


def stop_watching() -> None:
    """The watchdog of this process no longer watches, and the others' do not miss this process."""
    global _watchdog
    if _watchdog is not None:
        _watchdog.stop()
        _watchdog = None


def first_rank_does(action: Callable[[], Result], layout: Layout) -> Result | None:
    """Do something on the first process of the grid only; its UserError is raised on every process. Collective.

    After another error of it, or when it is gone, the others raise LostRank.

    The others wait as long as it takes, for there is no collective to run out of time: the first says that it is still
    at work. They give up when it falls silent.

    Returns: what it came to, on the first process; None on the others.
    """
    if layout.world_size == 1:
        return action()
    store = distributed_c10d._get_default_store()
    key = f"first_rank/{next(_works)}"
    if layout.rank:
        mistake, fault = json.loads(_wait_for(store, key))
        store.add(f"{key}/read", 1)
        if mistake is not None:
            raise UserError(mistake)
        if fault:
            raise LostRank("the first rank ended with an error; see its lines")
        return None
    try:
        with _beating(store, key):
            result = action()
    except BaseException as error:
        store.set(key, json.dumps([str(error) if isinstance(error, UserError) else None, True]))
        _wait_for_readers(store, key, layout.world_size - 1)
        raise
    store.set(key, json.dumps([None, False]))
    return result


@contextmanager
def _beating(store: dist.Store, key: str) -> Iterator[None]:
    """Inside, a thread counts up `key`/beat."""
    done = threading.Event()

    def beat() -> None:
        while not done.wait(_BEAT_SECONDS):
            store.add(f"{key}/beat", 1)

    thread = threading.Thread(target=beat, daemon=True, name="first-rank-beat")
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _wait_for(store: dist.Store, key: str) -> bytes:
    """The value of `key`, once the first rank has set it; LostRank when it falls silent before."""
    beats, heard = -1, time.monotonic()
    while True:
        try:
            store.wait([key], timedelta(seconds=_BEAT_SECONDS))
            return store.get(key)
        except dist.DistNetworkError as error:
            if _watchdog is not None:
                _watchdog.explain(error)
            raise LostRank("the first rank is gone; its own lines, or its node's, say why") from error
        except dist.DistStoreError:  # not yet
            now = store.add(f"{key}/beat", 0)
            if now != beats:
                beats, heard = now, time.monotonic()
        if _watchdog is None and time.monotonic() - heard > _SILENCE_SECONDS:
            raise LostRank(f"the first rank has been silent for {_SILENCE_SECONDS:.0f} s; is its node alive?")


def _wait_for_readers(store: dist.Store, key: str, count: int, seconds: float = 10.0) -> None:
    """Wait until `count` ranks have read `key`: the store goes with the first rank, which is about to end."""
    end = time.monotonic() + seconds
    while store.add(f"{key}/read", 0) < count and time.monotonic() < end:
        time.sleep(0.02)


def leave_world() -> None:
    """Leave the process group once all its processes have come here, so that no communication thread outlives them."""
    if not dist.is_initialized():
        return
    dist.barrier()
    stop_watching()
    time.sleep(0.3)
    dist.destroy_process_group()


@contextmanager
def abandoned_on_error() -> Iterator[None]:
    """End this process's groups when an error leaves the block, without waiting for ranks that cannot come any more.

    NCCL would otherwise keep the others in their collectives until these run out of time. Where it is another process
    that is gone, the watchdog names that one, and ends this one.
    """
    try:
        yield
    except BaseException as error:
        if dist.is_initialized() and dist.get_world_size() > 1:
            _give_up(error)
            abort = getattr(distributed_c10d, "_abort_process_group", dist.destroy_process_group)
            (abort if dist.get_backend() == "nccl" else dist.destroy_process_group)()
        raise


def _give_up(error: BaseException) -> None:
    global _watchdog
    if _watchdog is not None:
        if is_lost_connection(error) or is_timeout(error):
            _watchdog.explain(error)
        _watchdog.give_up()
        _watchdog = None
