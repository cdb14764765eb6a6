"""What the watchdog is told of a run: where it is, its limits, where stacks go and who is to know of a failure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import TypeVar

from megatron.config.schema import RunConfig
from megatron.failures import Failure, record_failure
from megatron.mpu.blame import Verdict
from megatron.mpu.layout import Layout
from megatron.mpu.processes import watchdog_of
from megatron.mpu.progress import Limits, Progress
from megatron.mpu.watchdog import Watchdog
from megatron.training.state import TrainState

Batch = TypeVar("Batch")

STACKS = "stacks"
"""Folder in log_dir, else `save`."""

_FOLLOWING = frozenset({"batch", "forward_backward", "update", "evaluation"})
_OF_TIMEOUT = 0.8


class Watched(AbstractContextManager[Progress]):
    """Inside, this process is missed when it hangs; what it gives is to be told where the process is."""

    def __init__(self, config: RunConfig, layout: Layout) -> None:
        self._config, self._layout = config, layout
        self._watchdog: Watchdog | None = None

    def __enter__(self) -> Progress:
        config = self._config
        if not config.training.watchdog.enabled:
            return Progress()
        folder = config.logging.log_dir or config.checkpoint.save
        stacks, record = Path(folder) / STACKS if folder else None, partial(_record, config.checkpoint.save)
        limits = limits_of(config, self._layout.world_size)
        self._watchdog = watchdog_of(self._layout)
        return self._watchdog.begin("startup", limits, stacks, record)

    def __exit__(self, *error: object) -> None:
        if self._watchdog is not None:
            self._watchdog.rest()


def limits_of(config: RunConfig, world_size: int) -> Limits:
    """The limits of a run's phases."""
    options = config.training.watchdog
    timeout = 60.0 * config.launch.distributed_timeout_minutes
    most = _OF_TIMEOUT * timeout if world_size > 1 else float("inf")
    given, silence = options.given, options.heartbeat_seconds
    return Limits(given, _FOLLOWING, options.factor, options.minimum_seconds, most, silence)


def _record(save: str | None, verdict: Verdict, iteration: int) -> None:
    if save is not None:
        rank = verdict.missing[0] if verdict.missing else None
        record_failure(save, Failure(verdict.host, rank, verdict.line, iteration))


def in_phases(batches: Iterable[Batch], progress: Progress, state: TrainState) -> Iterator[Batch]:
    """The micro-batches of each update; waiting for them is the phase `batch`, what is done with them the next one."""
    stream = iter(batches)
    while True:
        progress.enter("batch", state.iteration + 1)
        try:
            batch = next(stream)
        except StopIteration:
            return
        progress.enter("forward_backward")
        yield batch
