"""Batches in memory: what is computed together, and what happens when memory runs out."""

from __future__ import annotations

import logging

import pytest
import torch

from megatron.evaluation.batching import Batches, is_out_of_memory

WORDS = ["a" * n for n in (3, 50, 7, 1, 20, 20, 4, 9, 2)]


class Memory:
    """Computes lengths, as long as a batch (padding counted) takes at most `room`."""

    def __init__(self, room: int, error: type[RuntimeError] = torch.OutOfMemoryError) -> None:
        self.room, self.error, self.batches = room, error, list[list[int]]()

    def __call__(self, batch: list[str]) -> list[int]:
        sizes = [len(word) for word in batch]
        if len(batch) * max(sizes) > self.room:
            raise self.error("CPU out of memory. Tried to allocate")
        self.batches.append(sizes)
        return sizes


@pytest.fixture
def log(package_log: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    package_log.set_level(logging.INFO)
    return package_log


@pytest.mark.parametrize("size", [1, 4, 100, "auto"])
def test_results_come_in_the_order_of_the_items(size: int) -> None:
    memory, finished = Memory(10_000), list[int]()
    assert Batches(size).run(WORDS, len, memory, finished.append) == [len(word) for word in WORDS]
    assert sum(finished) == len(WORDS)
    flat = [n for batch in memory.batches for n in batch]
    assert flat == sorted(flat, reverse=True)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, RuntimeError])
def test_auto_halves_until_a_batch_fits_and_lets_short_texts_share_it(
    error: type[RuntimeError], log: pytest.LogCaptureFixture
) -> None:
    memory, batches = Memory(110, error), Batches("auto")
    assert batches.run(WORDS, len, memory) == [len(word) for word in WORDS]
    assert memory.batches == [[50, 20], [20, 9, 7, 4, 3], [2, 1]]
    assert batches.tokens == 100 and not [r for r in log.records if r.levelno >= logging.WARNING]
    log.clear()
    assert batches.run(WORDS, len, memory) == [len(word) for word in WORDS] and not log.records


def test_a_size_that_does_not_fit_is_halved_with_one_warning_a_time(log: pytest.LogCaptureFixture) -> None:
    memory, batches = Memory(110), Batches(4)
    assert batches.run(WORDS, len, memory) == [len(word) for word in WORDS]
    assert [record.getMessage() for record in log.records] == [
        "eval_batch_size: 4 texts do not fit in memory, going on with 2"
    ]
    assert batches.size == 2 and max(map(len, memory.batches)) == 2


def test_one_text_that_does_not_fit_and_other_errors_are_raised() -> None:
    with pytest.raises(torch.OutOfMemoryError):
        Batches("auto").run(WORDS, len, Memory(49))

    def broken(batch: list[str]) -> list[int]:
        raise RuntimeError("shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        Batches(4).run(WORDS, len, broken)
    with pytest.raises(ValueError, match="batch size 0: must be at least 1"):
        Batches(0)


def test_allocators_are_understood() -> None:
    assert is_out_of_memory(RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"))
    assert is_out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"))
    assert not is_out_of_memory(ValueError("out of memory"))
