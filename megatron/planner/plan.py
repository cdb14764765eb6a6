"""Which layouts a number of GPUs allows, and how each would do."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from megatron.config.checks import axis_mistakes
from megatron.config.schema import RunConfig
from megatron.planner.choice import Choice, configured_choice
from megatron.planner.counts import flops_per_token
from megatron.planner.machine import Machine
from megatron.planner.memory import Memory, memory_of
from megatron.planner.step_time import StepTime, step_time

LARGEST_MICRO_BATCH = 64


@dataclass(frozen=True)
class Candidate:
    """A choice with its predictions.

    Attributes:
        choice: the layout.
        memory: bytes of the fullest GPU.
        time: seconds of an update.
        tokens_per_second: of all GPUs together.
        mfu: predicted model FLOPs utilisation.
        fits: the memory is there.
    """

    choice: Choice
    memory: Memory
    time: StepTime
    tokens_per_second: float
    mfu: float
    fits: bool


def plan(config: RunConfig, machine: Machine, gpus: int) -> list[Candidate]:
    """The layouts that fit `gpus` GPUs and keep the samples of an update, fastest first.

    Args:
        config: a configuration whose padded_vocab_size is known.
        machine: the cluster.
        gpus: number of GPUs, one process each.

    Returns: candidates in the order of `candidates`; empty when none fits.
    """
    return [candidate for candidate in candidates(config, machine, gpus) if candidate.fits]


def candidates(config: RunConfig, machine: Machine, gpus: int) -> list[Candidate]:
    """All layouts that the model and the batch allow, whether they fit or not, fastest first.

    Times are compared in steps of 1 %: what is as fast as that comes in the order of the simpler layout (shorter
    tensor and pipeline axes, lower ZeRO stage) and of less memory.
    """
    return sorted((predict(config, machine, choice) for choice in _choices(config, gpus)), key=_rank)


def _rank(candidate: Candidate) -> tuple[float, ...]:
    c, step = candidate.choice, round(100 * math.log(candidate.time.total))
    return step, c.tensor, c.pipeline, c.zero_stage, c.sequence_parallel, candidate.memory.total


def predict(config: RunConfig, machine: Machine, choice: Choice) -> Candidate:
    """What memory and time one choice would take."""
    memory, time = memory_of(config, choice), step_time(config, choice, machine)
    speed = choice.samples * config.model.seq_length / time.total
    mfu = speed * flops_per_token(config.model) / (choice.gpus * machine.peak_flops)
    return Candidate(choice, memory, time, speed, mfu, memory.total <= machine.usable_bytes)


def samples_per_update(config: RunConfig, gpus: int) -> int:
    """Samples of an update: train_batch_size, else what the configured layout would take on `gpus` GPUs."""
    training, parallel = config.training, config.parallel
    if training.train_batch_size is not None:
        return training.train_batch_size
    return config.update_size(1).samples * max(1, gpus // (parallel.pipeline_stages * parallel.model_parallel_size))


def configured(config: RunConfig, machine: Machine, gpus: int) -> Candidate:
    """The prediction for the configuration as it is; UserError when it cannot run on `gpus` GPUs."""
    return predict(config, machine, configured_choice(config, gpus))


def _choices(config: RunConfig, gpus: int) -> Iterator[Choice]:
    samples = samples_per_update(config, gpus)
    for tensor in _divisors(gpus):
        for pipeline in _divisors(gpus // tensor):
            data = gpus // (tensor * pipeline)
            if pipeline > config.model.num_layers or samples % data:
                continue
            for zero_stage, sequence_parallel in _variants(config, tensor, pipeline, data):
                for micro in _micro_batches(config, samples // data):
                    for recompute in (False, True):
                        steps = samples // data // micro
                        yield Choice(tensor, pipeline, data, sequence_parallel, zero_stage, micro, steps, recompute)


def _variants(config: RunConfig, tensor: int, pipeline: int, data: int) -> Iterator[tuple[int, bool]]:
    """The (ZeRO stage, sequence parallelism) that the configuration may be given on these axes."""
    asked = config.parallel.zero_optimization.stage
    # In 16 bits stage 0 runs as stage 1; partitions of one are no partitions; Muon has rules of its own.
    lowest = 0 if config.precision.dtype == "fp32" else 1
    zero_stages = (lowest,) if data == 1 else tuple(range(lowest, 4))
    if config.optimization.optimizer.type == "Muon":
        zero_stages = (asked,)
    for zero_stage in zero_stages:
        for sequence_parallel in (False, True) if tensor > 1 else (False,):
            if not any(axis_mistakes(config.model, tensor, pipeline, sequence_parallel, zero_stage)):
                yield zero_stage, sequence_parallel


def _micro_batches(config: RunConfig, samples: int) -> list[int]:
    """Micro-batches that divide a data rank's samples: powers of two, and the configured one."""
    asked = config.training.train_micro_batch_size_per_gpu or 1
    sizes = {asked, *(2**k for k in range(LARGEST_MICRO_BATCH.bit_length()))}
    return sorted(size for size in sizes if samples % size == 0)


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]
