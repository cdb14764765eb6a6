"""From a run's config to its data sets, and from a data set to one process's micro-batches."""

from __future__ import annotations

import functools
import math
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from typing import Any, TypedDict

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler
from torch.utils.data._utils import signal_handling

from megatron.config.schema import RunConfig
from megatron.data.blend import BlendedDataset, normalized, weights_by_documents
from megatron.data.indexed import IndexedDataset
from megatron.data.samples import WHOLE_ORDER_SAMPLES, GPTDataset, split_documents
from megatron.errors import UserError
from megatron.log import get_logger
from megatron.mpu.device import uses_gpu
from megatron.signals import blocked, follow_parent

SPLIT_NAMES = ("train", "valid", "test")
BLEND_MARGIN = 1.005
"""Each part of a blend is sized for 0.5 % more than its share, as GPT-NeoX does; it decides the epochs."""

BLEND_PERIOD = 1 << 24
"""Steps after which a blend of more than WHOLE_ORDER_SAMPLES samples repeats its choices."""

_ATTEMPTS = 3

AnyDataset = GPTDataset | BlendedDataset


class MicroBatch(TypedDict):
    """tokens: int64 [micro_batch_size, seq_length + 1]; inputs are [:, :-1], labels [:, 1:]."""

    tokens: Tensor


@dataclass(frozen=True)
class Datasets:
    """The run's data sets; None where no samples were asked for."""

    train: AnyDataset | None
    valid: AnyDataset | None
    test: AnyDataset | None
    epoch_blocks: dict[str, list[int]] = field(default_factory=dict)
    """By "train/0", "train/1", "valid/0" ...: to be saved with the run and handed back when it resumes. Of very long
    runs also "train/0/later", the epochs of each block that follows, and "train/period", that of the blend."""


def build_datasets(
    config: RunConfig,
    train_samples: int,
    valid_samples: int,
    test_samples: int,
    epoch_blocks: Mapping[str, Sequence[int]] | None = None,
) -> Datasets:
    """The data sets that `config.data` names, each long enough for so many samples (0: not built).

    The test set is optional: without test_data_paths, or without documents in its split, it is None.
    Raises UserError when data is missing, damaged or too small.
    """
    saved, blocks = epoch_blocks or {}, dict[str, list[int]]()
    built: dict[str, AnyDataset | None] = {}
    for name, count in zip(SPLIT_NAMES, (train_samples, valid_samples, test_samples), strict=True):
        parts = _parts(config, name) if count else []
        built[name] = _build(config, name, parts, count, saved) if parts else None
        # A set that is not built now, as the validation set of a run without evaluation, keeps its order for later.
        kept = {key: list(value) for key, value in saved.items() if key.startswith(f"{name}/") and not parts}
        blocks.update(_order_of(name, built[name]) or kept)
    return Datasets(**built, epoch_blocks=blocks)


@dataclass(frozen=True)
class _Part:
    indexed: IndexedDataset
    documents: tuple[int, int]


def _parts(config: RunConfig, name: str) -> list[_Part]:
    """What the split `name` is made of; empty when an optional one has nothing."""
    data = config.data
    if data.data_path:
        return _parts_of_split(data.data_path, data.split, name)
    paths: list[str] | None = getattr(data, f"{name}_data_paths")
    if paths:
        opened = [IndexedDataset(path) for path in paths]
        return [_Part(indexed, (0, len(indexed))) for indexed in opened]
    if name == "test":
        return []
    if not data.train_data_paths:
        raise UserError("data_path: missing; give the prefix of a .bin/.idx pair, or train_data_paths")
    raise UserError(f"{name}_data_paths: missing; give {name}_data_paths, or eval_iters: 0 for no validation")


def _parts_of_split(prefix: str, split: str, name: str) -> list[_Part]:
    indexed = IndexedDataset(prefix)
    first, end = split_documents(split, len(indexed))[SPLIT_NAMES.index(name)]
    if end > first:
        return [_Part(indexed, (first, end))]
    if name == "test":
        get_logger().info(f"split: '{split}' of {len(indexed)} documents leaves no test documents; no test set")
        return []
    hint = ", or set eval_iters: 0 for no validation" if name == "valid" else ""
    raise UserError(
        f"split: '{split}' gives {name} none of the {len(indexed)} documents of {prefix}; raise its share{hint}"
    )


def _build(
    config: RunConfig, name: str, parts: list[_Part], count: int, saved: Mapping[str, Sequence[int]]
) -> AnyDataset:
    weights = _weights(config, name, parts)
    period = _period(name, count, saved) if len(parts) > 1 else None
    # A period's choices are rounded; what that adds grows with the number of periods.
    rounding = -(-count // period) if period else 0
    datasets = []
    for number, (part, weight) in enumerate(zip(parts, weights, strict=True)):
        needed = count if config.data.data_path else math.ceil(count * weight * BLEND_MARGIN) + rounding
        later_block = _saved_numbers(saved, f"{name}/{number}/later") or [0]
        datasets.append(
            GPTDataset(
                part.indexed,
                config.model.seq_length,
                config.training.seed,
                needed,
                documents=part.documents,
                epoch_blocks=_saved_numbers(saved, f"{name}/{number}"),
                cache_dir=config.data.data_cache_dir,
                later_block=later_block[0],
            )
        )
    return datasets[0] if len(datasets) == 1 else BlendedDataset(datasets, weights.tolist(), count, period)


def _period(name: str, count: int, saved: Mapping[str, Sequence[int]]) -> int | None:
    """Steps after which a blend repeats its choices; None where it never does."""
    if period := _saved_numbers(saved, f"{name}/period"):
        return period[0]
    if count <= WHOLE_ORDER_SAMPLES:
        return None
    # A run that goes on may have consumed as many, and keeps their order.
    return WHOLE_ORDER_SAMPLES if f"{name}/0" in saved else BLEND_PERIOD


def _saved_numbers(saved: Mapping[str, Sequence[int]], key: str) -> list[int]:
    """What a run recorded under `key`, if it did. Raises UserError unless it is a list of positive numbers."""
    values = saved.get(key, [])
    if not isinstance(values, (list, tuple)) or not all(type(value) is int and value > 0 for value in values):
        raise UserError(f"epoch_blocks: the checkpoint's '{key}' is no list of positive numbers; load an earlier one")
    return list(values)


def _order_of(name: str, dataset: AnyDataset | None) -> dict[str, list[int]]:
    """What decides a data set's order besides the configuration, see Datasets.epoch_blocks."""
    order: dict[str, list[int]] = {}
    for number, leaf in enumerate(_leaves(dataset)):
        order[f"{name}/{number}"] = leaf.epoch_blocks
        if leaf.later_block:
            order[f"{name}/{number}/later"] = [leaf.later_block]
    if isinstance(dataset, BlendedDataset) and dataset.period:
        order[f"{name}/period"] = [dataset.period]
    return order


def _weights(config: RunConfig, name: str, parts: list[_Part]) -> npt.NDArray[np.float64]:
    if config.data.weight_by_num_documents:
        return weights_by_documents([len(part.indexed) for part in parts], config.data.weighted_sampler_alpha)
    given = getattr(config.data, f"{name}_data_weights") if not config.data.data_path else None
    return normalized(given or [1.0] * len(parts))


def _leaves(dataset: AnyDataset | None) -> list[GPTDataset]:
    if isinstance(dataset, BlendedDataset):
        return [part for part in dataset.datasets if isinstance(part, GPTDataset)]
    return [] if dataset is None else [dataset]


class MicroBatchSampler(Sampler[list[int]]):
    """Sample numbers of one data-parallel rank's micro-batches, from sample `start` to the last whole update.

    An update takes the next micro * steps * ranks samples of the data set; micro-step a gives rank r the samples
    [a * micro * ranks + r * micro, ... + micro). What an update consumes is thus independent of the layout.
    The first `given` of the micro-batches are left out.
    """

    def __init__(
        self, num_samples: int, micro: int, steps: int, rank: int, ranks: int, start: int, given: int = 0
    ) -> None:
        if not 0 <= rank < ranks:
            raise ValueError(f"data rank {rank} is outside 0 .. {ranks - 1}")
        self._micro, self._first, self._stride = micro, start + rank * micro, micro * ranks
        self._given = given
        self._length = max(0, num_samples - start) // (self._stride * steps) * steps

    def __iter__(self) -> Iterator[list[int]]:
        for number in range(self._given, self._length):
            first = self._first + number * self._stride
            yield list(range(first, first + self._micro))

    def __len__(self) -> int:
        return self._length - self._given


def batches(
    dataset: AnyDataset,
    micro_batch_size: int,
    accumulation_steps: int = 1,
    data_rank: int = 0,
    data_size: int = 1,
    start_sample: int = 0,
    num_workers: int = 0,
) -> Iterator[MicroBatch]:
    """One rank's micro-batches, from consumed sample `start_sample` until no whole update is left.

    Resume training with the number of samples consumed so far, over all ranks; leave it 0 for validation, which
    then always sees the same batches. num_workers: loader processes; 0 loads in this one.
    """
    order = functools.partial(
        MicroBatchSampler, len(dataset), micro_batch_size, accumulation_steps, data_rank, data_size, start_sample
    )
    if num_workers == 0:
        return iter(_loader(dataset, order(), 0))
    return _from_workers(lambda given, workers: _loader(dataset, order(given), workers), num_workers)


def _loader(dataset: AnyDataset, sampler: MicroBatchSampler, num_workers: int) -> DataLoader[Any]:
    return DataLoader(
        dataset,
        batch_sampler=sampler,
        num_workers=num_workers,
        collate_fn=_collate,
        pin_memory=uses_gpu(),
        generator=torch.Generator(),  # else starting a loader would draw from the training's random numbers
        # Of no other process, such as a fork server, that would hear signals and could stay behind.
        multiprocessing_context="fork" if num_workers else None,
        worker_init_fn=functools.partial(_init_worker, os.getpid()) if num_workers else None,
    )


def _init_worker(parent: int, _worker: int) -> None:
    follow_parent(parent)


def _from_workers(loader: Callable[[int, int], DataLoader[Any]], num_workers: int) -> Iterator[MicroBatch]:
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


def _until_lost(stream: Any) -> Iterator[MicroBatch]:
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


def _collate(samples: list[npt.NDArray[np.int64]]) -> MicroBatch:
    return {"tokens": torch.from_numpy(np.stack(samples))}
