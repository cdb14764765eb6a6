"""What a finding is, where "fine" ends, and how odd and slow ones are told from the others."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from megatron.doctor.nodes import Report

PROBLEM, NOTE = "problem", "note"
Reports = Mapping[str, Report]


@dataclass(frozen=True)
class Limits:
    """Where "fine" ends. docs/doctor.md has the same table."""

    slow_share: float = 0.5
    """Slow is below this share of the median; of two nodes, of the faster."""
    disk_mb_s: float = 30.0
    """MB/s that every written folder takes at least."""
    free_gb: float = 10.0
    """GB free in the folder of checkpoints."""
    free_temporary_gb: float = 1.0
    """GB free in the temporary folder."""
    clock_s: float = 2.0
    """Seconds between a node's clock and that of the machine the doctor was started on."""
    nofile: int = 1024
    """Open files a process may have."""
    memlock_mb: float = 64.0
    """MB a process may lock, on nodes with GPUs: InfiniBand registers memory."""
    shm_gb: float = 1.0
    """GB of /dev/shm: loaders and NCCL share memory there, and a container starts with 0.06."""
    gpu_celsius: int = 85
    """Temperature of a GPU."""
    gpu_peak_share: float = 0.3
    """Share of the data sheet's rate that a GPU reaches in a matrix product."""


LIMITS = Limits()


@dataclass(frozen=True)
class Expected:
    """What the configuration asks of a node."""

    packages: Mapping[str, str] = field(default_factory=dict)
    """{name: pinned version}."""
    gpu_request: str | None = None
    """The setting that needs a GPU, as `key: value`."""
    gpus: Mapping[str, int] = field(default_factory=dict)
    """How many each node has to have; a node is not in it where that is not known."""
    written: tuple[str, ...] = ("save", "temporary")
    """Labels of folders that have to be writable."""


@dataclass(frozen=True)
class Finding:
    """Something that is not as it should be. `level`: PROBLEM or NOTE; `nodes`: the odd ones."""

    level: str
    check: str
    nodes: tuple[str, ...]
    text: str


def values(reports: Reports, check: str, part: str | None = None) -> dict[str, Any]:
    """{node: what `check` found there, or this part of it}, of the nodes where it found something."""
    found = {node: report.found(check) for node, report in reports.items()}
    known = {node: value for node, value in found.items() if value is not None}
    return known if part is None else {node: value[part] for node, value in known.items()}


def odd_ones(found: Mapping[str, Any]) -> dict[str, Any]:
    """Those whose value is not the most common one; all of them when two values are equally common."""
    counts = Counter(map(str, found.values())).most_common()
    if len(counts) < 2:
        return {}
    tie = counts[0][1] == counts[1][1]
    return {node: value for node, value in found.items() if tie or str(value) != counts[0][0]}


def slow_ones(rates: Mapping[str, float], limits: Limits) -> dict[str, str]:
    """{name: how slow} of those below a share of the median."""
    if len(rates) < 2:
        return {}
    median = statistics.median_high(rates.values())
    return {
        name: f"{rate / median:.1%} of the median" for name, rate in rates.items() if rate < limits.slow_share * median
    }


def listed(found: Mapping[str, Any]) -> str:
    """Values with the nodes that have them, the common ones first."""
    nodes: dict[str, list[str]] = {}
    for node, value in found.items():
        nodes.setdefault(str(value), []).append(node)
    ordered = sorted(nodes.items(), key=lambda item: -len(item[1]))
    return "; ".join(f"{value} on {some_of(names)}" for value, names in ordered)


def some_of(names: list[str]) -> str:
    """The names, or the first few of many."""
    return ", ".join(names) if len(names) <= 6 else f"{', '.join(names[:3])} and {len(names) - 3} more"
