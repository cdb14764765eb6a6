"""The table `watchdog`: how long a process may take before the run ends and says which one hangs."""

from __future__ import annotations

from pydantic import Field

from megatron.config.sections.base import MAX_FACTOR, Section

_LONGEST = 3e7  # a year


class WatchdogLimits(Section):
    """Seconds that a phase may take; those that are not given follow from how long the phase took so far."""

    startup: float | None = Field(default=None, gt=0, le=_LONGEST)
    """Until the first batch: data, checkpoint, model, engine. Default: no limit."""
    batch: float | None = Field(default=None, gt=0, le=_LONGEST)
    """Waiting for the micro-batches of an update."""
    forward_backward: float | None = Field(default=None, gt=0, le=_LONGEST)
    """Forward and backward passes of an update."""
    update: float | None = Field(default=None, gt=0, le=_LONGEST)
    """Clipping and the optimizer's step, and what follows it: telling the ranks, logging."""
    save: float | None = Field(default=3600.0, gt=0, le=_LONGEST)
    """A checkpoint, as far as training waits for it: its own snapshot and, where it has to, the writing of this one and
    of the one before. It does not follow from earlier ones: a slow disk is none that hangs."""
    evaluation: float | None = Field(default=None, gt=0, le=_LONGEST)
    """One batch of an evaluation."""


class WatchdogConfig(Section):
    """Processes that hang, are stopped or killed."""

    enabled: bool = True
    """false, or `watchdog: false`: nothing ends a run that hangs but the collectives' own limit,
    distributed_timeout_minutes."""
    factor: float = Field(default=20.0, ge=1, le=MAX_FACTOR)
    """A phase may take so many times the median of its last 100, once it has been timed 5 times; twice the longest of
    them, where that is more. The limit is at most 0.8 of distributed_timeout_minutes with several processes."""
    minimum_seconds: float = Field(default=300.0, gt=0, le=_LONGEST)
    """No limit that follows is shorter."""
    heartbeat_seconds: float = Field(default=300.0, ge=10, le=_LONGEST)
    """A process that has shown no sign of life for so long counts as lost."""
    limits: WatchdogLimits = WatchdogLimits()
    """Limits of single phases in seconds, for example {forward_backward: 120}; they count from the first time on."""

    @property
    def given(self) -> dict[str, float]:
        """The limits that are given, by phase."""
        return {phase: limit for phase, limit in self.limits if limit is not None}
