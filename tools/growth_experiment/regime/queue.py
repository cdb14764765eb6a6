"""Which trial is next, and going through them unattended: several processes share the work, one a core."""

from __future__ import annotations

import math
import re
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from megatron.config.schema import RunConfig
from megatron.files import lock
from megatron.log import get_logger
from megatron.signals import StopRequest
from megatron.training.state import TrainState
from tools.growth_experiment.regime.runs import Experiment, Stopped, parent_checkpoint, run_trial
from tools.growth_experiment.regime.trials import Trial

PAUSE = "pause"
"""While a file of this name is in the output folder no trial is started; running ones go on."""
_WAIT = 5.0
"""Seconds between two looks while there is nothing to start."""


def state_of(experiment: Experiment, trial: Trial) -> str:
    """done, failed, running, ready, or waiting for others."""
    if experiment.result(trial.name) is not None:
        return "done"
    if experiment.has_failed(trial.name):
        return "failed"
    with _claim(experiment, trial) as is_mine:
        if not is_mine:
            return "running"
    return "ready" if _is_ready(experiment, trial) else "waiting"


def _is_ready(experiment: Experiment, trial: Trial) -> bool:
    has_start = trial.parent is None or parent_checkpoint(experiment, trial).is_dir()
    return has_start and all(experiment.is_decided(name) for name in trial.needs)


def _is_next(experiment: Experiment, trial: Trial) -> bool:
    return _is_ready(experiment, trial) and not experiment.has_failed(trial.name)


def wanted(experiment: Experiment) -> list[Trial]:
    """Trials without a result, each after those whose checkpoints it lacks: these run again if the folder is new."""
    found: dict[str, Trial] = {}
    for trial in experiment.trials.values():
        is_asked_for = re.search(experiment.only, trial.name) is not None
        if is_asked_for and experiment.result(trial.name) is None and not experiment.has_failed(trial.name):
            for each in _with_parents(experiment, trial):
                found.setdefault(each.name, each)
    return list(found.values())


def _with_parents(experiment: Experiment, trial: Trial) -> list[Trial]:
    if trial.parent is None or parent_checkpoint(experiment, trial).is_dir():
        return [trial]
    return [*_with_parents(experiment, experiment.trials[trial.parent]), trial]


class _Budget:
    """How many trials may still be started, by several threads."""

    def __init__(self, limit: int | None) -> None:
        self.left, self._lock = math.inf if limit is None else limit, threading.Lock()

    def take(self) -> bool:
        """May one more be started?"""
        with self._lock:
            if self.left <= 0:
                return False
            self.left -= 1
            return True

    def give_back(self) -> None:
        """None was there."""
        with self._lock:
            self.left += 1


def run_all(experiment: Experiment, limit: int | None = None, together: int = 4, compiled: bool = True) -> None:
    """Run trials in order until none is left that could run; a failed one is noted and passed over.

    Args:
        limit: start no more than so many.
        together: most trials of one shape whose updates are computed at once.
        compiled: fuse the arithmetic of their updates.

    Raises: Stopped when a trial was told to stop.
    """
    budget = _Budget(limit)
    while budget.left > 0:
        if (experiment.output / PAUSE).exists():
            time.sleep(_WAIT)
            continue
        shapes = [_shape_of(experiment, trial) for trial in wanted(experiment) if _is_free(experiment, trial)]
        if shapes:
            _run_alike(experiment, shapes[0], min(together, shapes.count(shapes[0])), compiled, budget)
        elif not _are_any_running(experiment):
            return
        else:
            time.sleep(_WAIT)


def _shape_of(experiment: Experiment, trial: Trial) -> tuple[str, str]:
    """What trials have in common whose models can be stacked."""
    if trial.start != "grow":
        return trial.size.name, ""
    options = experiment.options(trial)
    return trial.size.name, options.get("row_norm") or options.get("new_keys", "zero")


def _is_free(experiment: Experiment, trial: Trial) -> bool:
    with _claim(experiment, trial) as is_mine:
        return is_mine and _is_next(experiment, trial)


def _are_any_running(experiment: Experiment) -> bool:
    for trial in wanted(experiment):
        with _claim(experiment, trial) as is_mine:
            if not is_mine:
                return True
    return False


def _run_alike(experiment: Experiment, shape: tuple[str, str], places: int, compiled: bool, budget: _Budget) -> None:
    """Run trials of a shape on so many places until none of it is ready."""
    from tools.growth_experiment.regime.together import Together

    stopped: list[Stopped] = []
    with StopRequest() as stop:
        stop.hold()
        stack = Together(places, stop, compiled)

        def work() -> None:
            try:
                while not (stop.requested or stopped) and budget.take():
                    if not _run_next(experiment, shape, stack.train):
                        budget.give_back()
                        return
            except Stopped as error:
                stopped.append(error)

        workers = [threading.Thread(target=work, name=f"trial-{i}") for i in range(places)]
        for worker in workers:
            worker.start()
        try:
            stack.compute(workers)
        finally:
            for worker in workers:
                worker.join()
    if stopped:
        raise stopped[0]
    if stop.requested:
        raise Stopped(f"stopped between two trials of {experiment.output}; the same command goes on from there")


def _run_next(experiment: Experiment, shape: tuple[str, str], train: Callable[[RunConfig], TrainState]) -> bool:
    """Was there one?"""
    if (experiment.output / PAUSE).exists():
        return False
    for trial in wanted(experiment):
        with _claim(experiment, trial) as is_mine:
            is_next = is_mine and _is_next(experiment, trial) and trial in wanted(experiment)
            if is_next and _shape_of(experiment, trial) == shape:
                _run_noted(experiment, trial, train)
                return True
    return False


def _run_noted(experiment: Experiment, trial: Trial, train: Callable[[RunConfig], TrainState]) -> None:
    get_logger().info("trial %s: %d updates, about %.2f core-hours", trial.name, trial.updates, trial.core_hours)
    try:
        run_trial(experiment, trial, train)
    except Stopped:
        raise
    except Exception as error:  # a trial that diverges must not keep the others from running
        folder = experiment.folder(trial)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "failed.txt").write_text("".join(traceback.format_exception(error)))
        get_logger().warning("trial %s failed: %s", trial.name, error)


@contextmanager
def _claim(experiment: Experiment, trial: Trial) -> Iterator[bool]:
    """Hold a trial while it runs; false where another process does. The system lets go when a process dies."""
    folder = experiment.output / "claims"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / trial.file.removesuffix(".json")).open("a") as file:
        try:
            lock(file)
        except BlockingIOError:
            yield False
        else:
            yield True


def plan(experiment: Experiment) -> str:
    """All trials with their state, estimated core-hours, and those until each is done."""
    states = {name: state_of(experiment, trial) for name, trial in experiment.trials.items()}
    until, left = {}, 0.0
    for trial in wanted(experiment):
        left += trial.core_hours
        until[trial.name] = left
    lines = [f"{'trial':44} {'updates':>8} {'hours':>6} {'until':>6}  state"]
    for name, trial in experiment.trials.items():
        state = states[name] + (", again for its checkpoint" if states[name] == "done" and name in until else "")
        by = f"{until[name]:6.2f}" if name in until else " " * 6
        lines.append(f"{name:44} {trial.updates:8,} {trial.core_hours:6.2f} {by}  {state}")
    done = sum(state == "done" for state in states.values())
    total = sum(trial.core_hours for trial in experiment.trials.values())
    lines.append(f"{len(states)} trials, about {total:.1f} core-hours; {done} done, about {left:.1f} core-hours left")
    return "\n".join(lines)
