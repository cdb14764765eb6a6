"""Which trial is next, and going through them unattended: several processes share the work, one a core."""

from __future__ import annotations

import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from megatron.files import lock
from megatron.log import get_logger
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
        if experiment.result(trial.name) is None and not experiment.has_failed(trial.name):
            for each in _with_parents(experiment, trial):
                found.setdefault(each.name, each)
    return list(found.values())


def _with_parents(experiment: Experiment, trial: Trial) -> list[Trial]:
    if trial.parent is None or parent_checkpoint(experiment, trial).is_dir():
        return [trial]
    return [*_with_parents(experiment, experiment.trials[trial.parent]), trial]


def run_all(experiment: Experiment, limit: int | None = None) -> None:
    """Run trials in order until none is left that could run; a failed one is noted and passed over.

    Args:
        limit: end after so many.

    Raises: Stopped when a trial was told to stop.
    """
    count = 0
    while limit is None or count < limit:
        if (experiment.output / PAUSE).exists():
            time.sleep(_WAIT)
            continue
        ran = _run_next(experiment)
        if ran is None:
            time.sleep(_WAIT)
        elif not ran:
            return
        count += bool(ran)


def _run_next(experiment: Experiment) -> bool | None:
    """True when a trial was run, False when there is none left, None when others have to finish first."""
    is_busy = False
    for trial in wanted(experiment):
        with _claim(experiment, trial) as is_mine:
            is_busy |= not is_mine
            if is_mine and _is_next(experiment, trial) and trial in wanted(experiment):
                _run_noted(experiment, trial)
                return True
    return None if is_busy else False


def _run_noted(experiment: Experiment, trial: Trial) -> None:
    get_logger().info("trial %s: %d updates, about %.2f core-hours", trial.name, trial.updates, trial.core_hours)
    try:
        run_trial(experiment, trial)
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
