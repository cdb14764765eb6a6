"""Which layouts a number of GPUs allows, and how each would do."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from megatron.config.checks import axis_mistakes
from megatron.config.sections.images import ImagesConfig
from megatron.planner.choice import Choice
from megatron.planner.machine import Machine
from megatron.planner.memory import Memory, memory_of
from megatron.planner.networks import flops_per_token
from megatron.planner.step_time import StepTime, step_time
from megatron.planner.workload import Workload

LARGEST_MICRO_BATCH, LARGEST_IMAGE_BATCH, LARGEST_JOINT_BATCH = 64, 512, 4096


@dataclass(frozen=True)
class Candidate:
    """A choice with its predictions."""

    choice: Choice
    """The layout."""
    memory: Memory
    """Bytes of the fullest GPU."""
    time: StepTime
    """Seconds of an update."""
    tokens_per_second: float
    """Tokens a second of all GPUs together; of images, their patches and class tokens."""
    mfu: float
    """Predicted model FLOPs utilisation."""
    fits: bool
    """Whether the memory is there."""


def plan(work: Workload, machine: Machine, gpus: int) -> list[Candidate]:
    """The layouts that fit `gpus` GPUs and keep the samples of an update, fastest first.

    Args:
        work: its model's padded_vocab_size is known.
        machine: the cluster.
        gpus: number of GPUs, one process each.

    Returns: candidates in the order of `candidates`; empty when none fits.
    """
    return [candidate for candidate in candidates(work, machine, gpus) if candidate.fits]


def candidates(work: Workload, machine: Machine, gpus: int) -> list[Candidate]:
    """All layouts that the model and the batch allow, whether they fit or not, fastest first.

    Times are compared in steps of 1 %: what is as fast as that comes in the order of the simpler layout (shorter
    tensor and pipeline axes, lower ZeRO stage) and of less memory.
    """
    return sorted((predict(work, machine, choice) for choice in _choices(work, gpus)), key=_rank)


def _rank(candidate: Candidate) -> tuple[float, ...]:
    c, step = candidate.choice, round(100 * math.log(candidate.time.total))
    return step, c.tensor, c.pipeline, c.zero_stage, c.sequence_parallel, candidate.memory.total


def predict(work: Workload, machine: Machine, choice: Choice) -> Candidate:
    """What memory and time one choice would take."""
    memory, time = memory_of(work, choice), step_time(work, choice, machine)
    speed = choice.samples * work.model.tokens_per_sample() / time.total
    mfu = speed * flops_per_token(work.model) / (choice.gpus * machine.peak_flops)
    return Candidate(choice, memory, time, speed, mfu, memory.total <= machine.usable_bytes)


def _choices(work: Workload, gpus: int) -> Iterator[Choice]:
    samples = work.samples(gpus)
    for tensor in _divisors(gpus):
        for pipeline in _divisors(gpus // tensor):
            data = gpus // (tensor * pipeline)
            if pipeline > work.model.num_layers or samples % data:
                continue
            for zero_stage, sequence_parallel in _variants(work, tensor, pipeline, data):
                for micro in _micro_batches(work, samples // data):
                    for recompute in (False, True):
                        steps = samples // data // micro
                        yield Choice(tensor, pipeline, data, sequence_parallel, zero_stage, micro, steps, recompute)


def _variants(work: Workload, tensor: int, pipeline: int, data: int) -> Iterator[tuple[int, bool]]:
    """The (ZeRO stage, sequence parallelism) that the configuration may be given on these axes."""
    # In 16 bits stage 0 runs as stage 1; partitions of one are no partitions; Muon has rules of its own.
    lowest = 0 if work.dtype == "fp32" else 1
    zero_stages = (lowest,) if data == 1 else tuple(range(lowest, 4))
    if work.optimizer.type == "Muon":
        zero_stages = (work.parallel.zero_optimization.stage,)
    for zero_stage in zero_stages:
        for sequence_parallel in (False, True) if tensor > 1 else (False,):
            if not any(axis_mistakes(work.model, tensor, pipeline, sequence_parallel, zero_stage)):
                yield zero_stage, sequence_parallel


def _micro_batches(work: Workload, samples: int) -> list[int]:
    """Micro-batches that divide a data rank's samples: powers of two, and the configured one."""
    largest = LARGEST_IMAGE_BATCH if work.model.samples is ImagesConfig else LARGEST_MICRO_BATCH
    if work.is_joint:  # several micro-batches cost a second forward pass
        largest = LARGEST_JOINT_BATCH
    sizes = {work.training.train_micro_batch_size_per_gpu or 1, *(2**k for k in range(largest.bit_length()))}
    return sorted(size for size in sizes if samples % size == 0 and not (work.in_pairs and size % 2))


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]
