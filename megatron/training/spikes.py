"""Losses and gradient norms that stand out, what is done about them, and which documents were behind them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from megatron.config.sections.training import TrainingConfig
from megatron.engine.base import Engine
from megatron.engine.watch import refuse_nonfinite
from megatron.errors import UserError
from megatron.log import get_logger
from megatron.metrics import Records
from megatron.training.data import RunData
from megatron.training.state import TrainState

SPIKES_FILE = "spikes.jsonl"

_TO_SIGMA = 1.4826
"""The standard deviation of a normal distribution by its median absolute deviation."""
_LEAST_DEVIATION = 1e-3
"""Of the median: what varies less is taken to vary by so much."""


class Rewind(Exception):
    """Back to the last checkpoint; `TrainState.skips` says what is to be left out on the way from there."""


def robust_score(value: float, past: Sequence[float]) -> float:
    """By how many standard deviations a value is above the median, both told by medians, which outliers hardly move."""
    middle = median(past)
    deviation = _TO_SIGMA * median(abs(x - middle) for x in past)
    return (value - middle) / max(deviation, _LEAST_DEVIATION * abs(middle), 1e-30)


def is_skipped(iteration: int, spans: Sequence[Sequence[int]]) -> bool:
    """Is the iteration in one of the spans [first, last]?"""
    return any(first <= iteration <= last for first, last in spans)


@dataclass(frozen=True)
class _Spike:
    """What stood out."""

    iteration: int
    values: Mapping[str, float]
    scores: Mapping[str, float | None]

    def __str__(self) -> str:
        parts = []
        for name, value in self.values.items():
            score = self.scores[name]
            parts.append(f"{name} {value:.4g}" + ("" if score is None else f" (z {score:.1f})"))
        return f"spike at iteration {self.iteration}: {', '.join(parts)}"


class SpikeGuard:
    """Judges the loss and the gradient norm of each update against those before it; its memory is the run's state.

    Args:
        training: `spikes` and allow_nonfinite_loss count.
        loss_name: what the loss is called.
        state: where the run is.
        data: tells the documents of an update.
        folder: of spikes.jsonl; None: there is none.
    """

    def __init__(
        self, training: TrainingConfig, loss_name: str, state: TrainState, data: RunData, folder: str | None
    ) -> None:
        self._options, self._allows_nonfinite = training.spikes, training.allow_nonfinite_loss
        self._loss_name = loss_name
        self._state, self._data = state, data
        self._file = Path(folder) / SPIKES_FILE if folder else None

    def attach(self, engine: Engine) -> None:
        """Have the engine ask before each update (skip_update), or tell of it when it is known anyway.

        With action none this does nothing.
        """
        if self._options.action == "none":
            return
        if engine.layout.rank:
            self._file = None
        if self._options.action == "skip_update":
            engine.watch.judge = None
            engine.withhold(self.is_bad)
        else:
            engine.watch.judge = self.judge

    def is_bad(self, loss: float, norm: float | None) -> bool:
        """Is the update of the iteration that is under way to be left out?

        Raises: UserError where `limit` updates in a row have been.
        """
        spike, state = self._look(self._state.iteration + 1, loss, norm), self._state
        if spike is None:
            state.spikes_in_a_row = 0
            return False
        if state.spikes_in_a_row >= self._options.limit:
            self._stop(spike, f"{state.spikes_in_a_row} updates in a row were skipped")
        state.spikes_in_a_row += 1
        self._report(spike, "skip_update", "its update is skipped")
        return True

    def judge(self, iteration: int, loss: float, norm: float | None) -> None:
        """Look at an iteration that has been.

        Raises: Rewind for a spike; UserError where the run has rewound `limit` times, or only logs spikes and this is
        not finite.
        """
        spike, state = self._look(iteration, loss, norm), self._state
        if spike is None:
            return
        if self._options.action == "log":
            self._report(spike, "log", "logged only")
            if not self._allows_nonfinite:
                refuse_nonfinite(self._loss_name, loss, norm)
            return
        if len(state.skips) >= self._options.limit:
            self._stop(spike, f"the run has gone back {len(state.skips)} times")
        span = [iteration, state.iteration]
        consequence = f"going back to the last checkpoint, iterations {span[0]} to {span[1]} are skipped"
        self._report(spike, "rewind", consequence, skip_iterations=span)
        state.skips = [*state.skips, span]
        raise Rewind

    def _look(self, iteration: int, loss: float, norm: float | None) -> _Spike | None:
        """The spike of an iteration; a good one is remembered, and so is a spike that is only logged.

        The run may have come to another level for good: with `log` that becomes what it is measured by.
        """
        values = {self._loss_name: loss} | ({} if norm is None else {"grad_norm": norm})
        finite = {name: value for name, value in values.items() if math.isfinite(value)}
        scores = {name: self._score(name, finite.get(name)) for name in values}
        highest = max((score for score in scores.values() if score is not None), default=0.0)
        is_spike = len(finite) < len(values) or highest > self._options.threshold
        if not is_spike or self._options.action == "log":
            for name, value in finite.items():
                self._state.spike_window[name] = [*self._past(name), value][-self._options.window :]
        return _Spike(iteration, values, scores) if is_spike else None

    def _past(self, name: str) -> list[float]:
        return self._state.spike_window.get(name, [])[-self._options.window :]

    def _score(self, name: str, value: float | None) -> float | None:
        """None for what is not finite, and until the window is full."""
        past = self._past(name)
        return None if value is None or len(past) < self._options.window else robust_score(value, past)

    def _stop(self, spike: _Spike, reason: str) -> None:
        self._report(spike, "stop", reason)
        raise UserError(
            f"spikes.limit: {spike}, and {reason} ({self._options.limit} allowed); stopped before anything was saved: "
            f"look at {self._file or SPIKES_FILE}, then lower lr, raise threshold or limit, or give skip_iterations"
        )

    def _report(self, spike: _Spike, action: str, consequence: str, **more: Any) -> None:
        """A line in the log, and one in the file with the documents of the update."""
        get_logger().warning("%s; %s", spike, consequence)
        if self._file is None:
            return
        update_samples = self._data.update_samples
        # Iterations that were looked at late have others behind them already; each has read as many samples.
        behind = self._state.iteration + 1 - spike.iteration
        record = {
            "iteration": spike.iteration,
            **{name: value if math.isfinite(value) else str(value) for name, value in spike.values.items()},
            "z": dict(spike.scores),
            "action": action,
            **more,
            "documents": self._data.origins(self._state.consumed_samples - behind * update_samples),
        }
        _append(self._file, json.dumps(record))


def _append(path: Path, line: str) -> None:
    """Append a line; a disk that refuses it costs a warning."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        records = Records(path)
        try:
            records.write(line.encode() + b"\n")
        finally:
            records.close()
    except OSError as error:
        get_logger().warning("%s: %s; the spike is in the log only", path, error.strerror)
