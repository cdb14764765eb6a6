"""From a data set to one process's micro-batches."""

from __future__ import annotations

import functools
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import wait
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler
from torch.utils.data._utils import signal_handling

from megatron.errors import UserError
from megatron.log import get_logger
from megatron.mpu.device import uses_gpu
from megatron.signals import blocked, follow_parent

_ATTEMPTS = 3

Collate = Callable[[list[Any], int], Any]
"""(samples, size) -> a micro-batch of that size; see megatron.tasks.Task.collate."""


class MicroBatchSampler(Sampler[list[int]]):
    """Sample numbers of one data-parallel rank's micro-batches, from sample `start` to the last whole update.

    An update takes the next micro * steps * ranks samples of the data set; micro-step a gives rank r the samples
    [a * micro * ranks + r * micro, ... + micro). What an update consumes is thus independent of the layout.
    The first `given` of the micro-batches are left out. With steps 0 the set is read to its last sample: all ranks have
    as many micro-batches, the last ones of which may be short or empty.
    """

    def __init__(
        self, num_samples: int, micro: int, steps: int, rank: int, ranks: int, start: int, given: int = 0
    ) -> None:
        if not 0 <= rank < ranks:
            raise ValueError(f"data rank {rank} is outside 0 .. {ranks - 1}")
        self._micro, self._first, self._stride = micro, start + rank * micro, micro * ranks
        self._given, self._end = given, num_samples
        left = max(0, num_samples - start)
        self._length = left // (self._stride * steps) * steps if steps else -(-left // self._stride)

    def __iter__(self) -> Iterator[list[int]]:
        for number in range(self._given, self._length):
            first = self._first + number * self._stride
            yield list(range(first, min(first + self._micro, self._end)))

    def __len__(self) -> int:
        return self._length - self._given


def tokens_of(samples: list[Any], size: int) -> dict[str, torch.Tensor]:
    """{tokens: int64 [size, seq_length + 1]} of a GPTDataset's samples; inputs are [:, :-1], labels [:, 1:]."""
    return {"tokens": torch.from_numpy(np.stack(samples))}


def batches(
    dataset: Any,
    micro_batch_size: int,
    accumulation_steps: int = 1,
    data_rank: int = 0,
    data_size: int = 1,
    start_sample: int = 0,
    num_workers: int = 0,
    collate: Collate = tokens_of,
) -> Iterator[Any]:
    """One rank's micro-batches, from consumed sample `start_sample` until no whole update is left.

    Resume training with the number of samples consumed so far, over all ranks; leave it 0 for validation, which
    then always sees the same batches.

    Args:
        accumulation_steps: micro-batches a rank has in an update; 0 reads the whole set, see MicroBatchSampler.
        num_workers: loader processes; 0 loads in this one.
        collate: makes a micro-batch of samples.
    """
    whole = functools.partial(_collated, collate, micro_batch_size)
    order = functools.partial(
        MicroBatchSampler, len(dataset), micro_batch_size, accumulation_steps, data_rank, data_size, start_sample
    )
    if num_workers == 0:
        return iter(_loader(dataset, order(), 0, whole))
    return _from_workers(lambda given, workers: _loader(dataset, order(given), workers, whole), num_workers)


def _collated(collate: Collate, size: int, samples: list[Any]) -> Any:
    mistakes = [sample for sample in samples if isinstance(sample, UserError)]
    return mistakes[0] if mistakes else collate(samples, size)


class _Reporting(Dataset[Any]):
    """A data set in a worker: a user's mistake takes the place of the sample, since torch would make a traceback of it.

    `_until_lost` raises it in the process that trains.
    """

    def __init__(self, dataset: Any) -> None:
        self._dataset = dataset

    def __getitem__(self, index: int) -> Any:
        try:
            return self._dataset[index]
        except UserError as error:
            return error


def _loader(
    dataset: Any, sampler: MicroBatchSampler, num_workers: int, collate: Callable[[list[Any]], Any]
) -> DataLoader[Any]:
    return DataLoader(
        _Reporting(dataset) if num_workers else dataset,
        batch_sampler=sampler,
        num_workers=num_workers,
        collate_fn=collate,
        pin_memory=uses_gpu(),
        generator=torch.Generator(),  # else starting a loader would draw from the training's random numbers
        # Of no other process, such as a fork server, that would hear signals and could stay behind.
        multiprocessing_context="fork" if num_workers else None,
        worker_init_fn=functools.partial(_init_worker, os.getpid()) if num_workers else None,
    )


def _init_worker(parent: int, _worker: int) -> None:
    follow_parent(parent)


def _from_workers(loader: Callable[[int, int], DataLoader[Any]], num_workers: int) -> Iterator[Any]:
    """What loader(0, num_workers) gives, with new workers where one was killed, as by a lack of memory.

    Workers that are killed again before the next micro-batch, _ATTEMPTS times, are not replaced: this process loads.
    """
    given, lost = 0, 0
    while True:
        stream = _start(loader(given, num_workers if lost < _ATTEMPTS else 0))
        try:
            for batch in _until_lost(stream):
                yield batch
                given, lost = given + 1, 0
            return
        except _WorkerLost as error:
            lost += 1
            instead = "new ones" if lost < _ATTEMPTS else "this process"
            get_logger().warning(
                "num_workers: %s, often for want of memory; %s will load the data",
                error,
                instead,
                extra={"all_ranks": True},
            )


class _WorkerLost(Exception):
    """A worker of a loader has ended before its time."""


def _until_lost(stream: Any) -> Iterator[Any]:
    """The micro-batches of a loader's iterator; raises _WorkerLost where a worker has ended."""
    while True:
        try:
            batch = next(stream)
        except StopIteration:
            return
        except (RuntimeError, OSError, EOFError):  # torch's own, or of the connection to a worker that holds a tensor
            ends = _ended(getattr(stream, "_workers", ()))
            if not ends:
                raise
            _abandon(stream)
            raise _WorkerLost(f"a loader worker has ended (exit code {ends[0]})") from None
        if isinstance(batch, UserError):
            _abandon(stream)  # torch would wait for them, ten seconds or so, whenever the exception is gone
            raise batch
        yield batch


def _ended(workers: Sequence[Any], seconds: float = 1.0) -> list[int]:
    """Exit codes of the workers that end within this time: their connections go before they do."""
    gone = wait([worker.sentinel for worker in workers], timeout=seconds)
    for worker in workers:
        if worker.sentinel in gone:
            worker.join()
    return [worker.exitcode for worker in workers if worker.exitcode is not None]


def _start(loader: DataLoader[Any]) -> Any:
    """The loader's iterator. Its workers are born deaf to signals: all processes of a run may get one."""
    before = signal.getsignal(signal.SIGCHLD)
    with blocked():
        stream = iter(loader)
    if threading.current_thread() is threading.main_thread():
        # torch would raise a worker's death wherever the main thread is then, in the middle of an update or a save.
        signal.signal(signal.SIGCHLD, before)
    return stream


def _abandon(stream: Any) -> None:
    """Kill the workers that are left. torch's own way may wait for ever for a lock that the lost one held."""
    stream._shutdown = True
    signal_handling._remove_worker_pids(id(stream))  # another iterator may get the same id
    for worker in stream._workers:
        worker.kill()
        worker.join()
    if stream._pin_memory:
        stream._pin_memory_thread_done_event.set()
