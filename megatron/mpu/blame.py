"""Which ranks the others wait for, from what each of them says of itself."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from megatron.mpu.neighbours import GONE, STOPPED

HOW = {GONE: "has been killed or has crashed", STOPPED: "is stopped, by a SIGSTOP or a debugger"}
"""What a line says of a process that the kernel says this of."""


@dataclass(frozen=True)
class Report:
    """What a rank says of itself when it is asked."""

    rank: int
    host: str
    phase: str
    iteration: int
    count: int
    """Phases entered so far."""
    seconds: float
    """In this phase."""
    waits: bool
    """Its main thread waits for other ranks."""
    place: str
    """Where its main thread is."""
    collectives: Mapping[str, int] = field(default_factory=dict)
    """Entered so far, by name of the process group."""
    neighbours: Mapping[str, str] = field(default_factory=dict)
    """Ranks on the same machine that are gone or stopped, and which of it."""

    def __str__(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def parse(cls, line: str) -> Report:
        """What another rank wrote."""
        return cls(**json.loads(line))

    @property
    def where(self) -> str:
        """Phase, iteration, time and line."""
        return f"in {self.phase} of iteration {self.iteration} for {self.seconds:.0f} s, at {self.place}"


@dataclass(frozen=True)
class Verdict:
    """Who is missing, and the line that says it."""

    line: str
    missing: tuple[int, ...] = ()
    host: str | None = None
    """Of the first of them."""
    silent: tuple[int, ...] = ()
    """Those of them that can neither speak nor end by themselves."""
    ended: bool = False
    """It ended with an error, and others may be about to end with the same one."""

    def __str__(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def parse(cls, values: Mapping[str, Any]) -> Verdict:
        """What the first rank wrote."""
        return cls(values["line"], tuple(values["missing"]), values["host"], tuple(values["silent"]), values["ended"])


def judge(why: str, reports: Sequence[Report], silent: Mapping[int, tuple[str, str]]) -> Verdict | None:
    """Name the ranks that the others wait for; None where all answer and none is to blame for `why` == "".

    Args:
        why: the limit that has passed, or "" where a connection was lost.
        reports: of the ranks that answered.
        silent: of those that did not, the host and the place known last.
    """
    if silent:
        return _silent(reports, silent)
    if not why:
        return None
    missing = behind(reports)
    if not missing:
        where = "; ".join(f"rank {report.rank} {report.where}" for report in reports[:4])
        return Verdict(f"no rank is behind the others, {why}: {where}")
    first, others = missing[0], len(reports) - len(missing)
    names = f"rank {first.rank} on {first.host}"
    if more := missing[1:]:
        names += f", and {', '.join(f'rank {report.rank} on {report.host}' for report in more[:8])},"
    waiting = "" if not others else "the other waits for it; " if others == 1 else f"{others} others wait for it; "
    line = f"{names} {'hang' if more else 'hangs'} {first.where}; {waiting}{why}"
    return Verdict(line, tuple(report.rank for report in missing), first.host)


def _silent(reports: Sequence[Report], silent: Mapping[int, tuple[str, str]]) -> Verdict:
    seen = {int(rank): state for report in reports for rank, state in report.neighbours.items()}
    # Whoever is gone may be why others on its machine do not answer any more, but not the other way round.
    ranks = sorted(silent, key=lambda rank: (seen.get(rank) != GONE, seen.get(rank) != STOPPED, rank))
    told = []
    for rank in ranks[:8]:
        host, place = silent[rank]
        told.append(f"rank {rank} on {host} {HOW.get(seen.get(rank, ''), 'does not answer')} (last seen {place})")
    return Verdict("; ".join(told), tuple(ranks), silent[ranks[0]][0], silent=tuple(ranks))


def behind(reports: Sequence[Report]) -> list[Report]:
    """Those that the others wait for: not in a collective while others are, else behind in one, else the slowest.

    Empty where all are equally far.
    """
    working = [report for report in reports if not report.waits]
    if working and len(working) < len(reports):
        return _least_advanced(working)
    if not working and (roots := _roots(reports)):
        return roots
    slowest = _least_advanced(reports)
    return slowest if len(slowest) < len(reports) or len(reports) == 1 else []


def _least_advanced(reports: Sequence[Report]) -> list[Report]:
    least = min(report.count for report in reports)
    return [report for report in reports if report.count == least]


def _roots(reports: Sequence[Report]) -> list[Report]:
    """Ranks that have entered fewer collectives than another one of a group, and more in no group."""
    most, least = dict[str, int](), dict[str, int]()
    for report in reports:
        for name, number in report.collectives.items():
            most[name], least[name] = max(most.get(name, number), number), min(least.get(name, number), number)
    uneven = {name for name in most if most[name] > least[name]}
    return [
        report
        for report in reports
        if (own := uneven & report.collectives.keys()) and all(report.collectives[name] < most[name] for name in own)
    ]
