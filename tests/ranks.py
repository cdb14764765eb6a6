"""Runs a function on several real processes joined by gloo; a fork server pays for the imports once."""

from __future__ import annotations

import gc
import multiprocessing
import os
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.context import ForkServerContext, ForkServerProcess
from multiprocessing.queues import SimpleQueue
from typing import Any

from megatron.mpu.environment import free_port

_PRELOAD = ["deepspeed.runtime.engine", "deepspeed.runtime.zero.muon.original_muon", "megatron.training.loop"]
_TIMEOUT_SECONDS = 240.0  # below the limit of a test


def _worker(
    function: Callable[..., Any],
    rank: int,
    world: int,
    port: int,
    arguments: tuple[Any, ...],
    results: SimpleQueue[Any] | None,
) -> None:
    values = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in values.items()})
    import torch

    from megatron.mpu.processes import stop_watching

    torch.set_num_threads(1)
    gc.freeze()  # what the server has imported need not be looked through whenever an engine is closed
    found: tuple[int, Any, str | None]
    try:
        found, code = (rank, function(*arguments), None), 0
    except BaseException:
        found, code = (rank, None, traceback.format_exc()), 1
    if results is not None:
        results.put(found)
    stop_watching()
    _end_together(rank, world)
    # A gloo thread may outlive the interpreter and abort it: leave without its teardown.
    os._exit(code)


def _end_together(rank: int, world: int) -> None:
    """The store ends with rank 0: it waits until the others are done with it."""
    import torch.distributed as dist

    if world > 1 and dist.is_initialized():
        with suppress(RuntimeError):
            store = dist.distributed_c10d._get_default_store()
            done, end = store.add("tests/done", 1), time.monotonic() + 3.0
            while rank == 0 and done < world and time.monotonic() < end:
                time.sleep(0.01)
                done = store.add("tests/done", 0)


def fork_server() -> ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)
    return context


def start_process(function: Callable[..., Any], *arguments: Any) -> ForkServerProcess:
    """`function(*arguments)` in a process of its own, one rank of one, that the caller may kill."""
    return start_rank(0, 1, free_port(), function, *arguments)


def start_rank(rank: int, world: int, port: int, function: Callable[..., Any], *arguments: Any) -> ForkServerProcess:
    """The same as one rank of several, that meet at `port`."""
    process = fork_server().Process(target=_worker, args=(function, rank, world, port, arguments, None))
    process.start()
    return process


def run_ranks(world: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """`function(*arguments)` on `world` ranks; what each returned, by rank. A failure fails with its traceback."""
    context, port = fork_server(), free_port()
    results: SimpleQueue[Any] = context.SimpleQueue()
    processes = [
        context.Process(target=_worker, args=(function, rank, world, port, arguments, results)) for rank in range(world)
    ]
    for process in processes:
        process.start()
    answers = _collect(processes, results)
    for rank, (_, error) in sorted(answers.items()):
        assert error is None, f"rank {rank}:\n{error}"
    assert len(answers) == world, f"only ranks {sorted(answers)} of {world} finished in time"
    return [answers[rank][0] for rank in range(world)]


def _collect(processes: list[Any], results: SimpleQueue[Any]) -> dict[int, tuple[Any, str | None]]:
    """What each rank sent, until all have ended. Read while they run: a long answer fills the pipe and would wait."""
    answers: dict[int, tuple[Any, str | None]] = {}
    deadline = time.monotonic() + _TIMEOUT_SECONDS
    while True:
        running = any(process.is_alive() for process in processes)
        while not results.empty():
            rank, value, error = results.get()
            answers[rank] = value, error
        failed = any(error for _, error in answers.values())
        if not running or failed or time.monotonic() > deadline:
            break
        time.sleep(0.01)
    for process in processes:  # those that wait for a rank that has failed
        process.kill()
    return answers
