"""Where a process of a run is, and how long it may stay there."""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field

IDLE = "idle"
"""Nothing is under way: a process in this phase may end, and is not missed."""

_REMEMBERED = 100
_ENOUGH = 5


@dataclass(frozen=True)
class Limits:
    """How many seconds a process may stay in a phase, and how long it may be silent."""

    given: Mapping[str, float] = field(default_factory=dict)
    """By phase; what is given here counts from the first time on."""
    follow_median: frozenset[str] = frozenset()
    """Phases without a given limit whose limit follows from how long they took so far."""
    factor: float = 20.0
    minimum: float = 300.0
    most: float = float("inf")
    """What a limit that follows does not exceed, unless `minimum` does: collectives end by themselves then."""
    heartbeat: float = 120.0
    """Seconds without a sign of life after which a process counts as lost."""

    @property
    def shortest(self) -> float:
        """No limit is shorter."""
        return min([self.minimum, *self.given.values()])

    def of(self, phase: str, durations: deque[float]) -> float | None:
        """The limit of a phase that took `durations`; None where there is none (yet).

        `factor` medians, twice the longest of them, or `minimum`, whichever is longest.
        """
        if phase in self.given:
            return self.given[phase]
        known = list(durations) if phase in self.follow_median else []
        if len(known) < _ENOUGH:
            return None
        return max(self.minimum, min(self.most, max(self.factor * statistics.median(known), 2 * max(known))))


class Progress:
    """Where this process is. Entering a phase costs a microsecond and waits for nothing.

    Written by the main thread and read by others, one attribute at a time.
    """

    def __init__(self) -> None:
        self.phase, self.iteration = IDLE, 0
        self.count = 0
        """Phases entered so far; the same on ranks that are equally far."""
        self._since = time.monotonic()
        self._durations: dict[str, deque[float]] = {}

    def enter(self, phase: str, iteration: int | None = None) -> None:
        """The next phase begins, of this iteration or of that named last; entering a phase again begins it anew."""
        now = time.monotonic()
        self.durations(self.phase).append(now - self._since)
        self._since, self.phase = now, phase
        if iteration is not None:
            self.iteration = iteration
        self.count += 1

    def durations(self, phase: str) -> deque[float]:
        """Seconds that the phase took, the latest ones."""
        known = self._durations.get(phase)
        if known is None:
            known = self._durations[phase] = deque(maxlen=_REMEMBERED)
        return known

    def forget(self) -> None:
        """What phases took so far says nothing about what is to come: the model grows, or another run begins."""
        self._durations = {}
