"""What the benchmarks share: contestants that take turns, the memory they take, and how results are shown and kept.

    times = take_turns({"ours": clocked(step, device), "theirs": clocked(other_step, device)}, rounds=5)
    results = compare(times, baseline="theirs")
    print(table(results))

A machine that slows down for a while slows all contestants of a round, so what counts is the ratio within a round.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron.errors import UserError
from megatron.files import write_output
from megatron.text import align

Timed = Callable[[], float]
"""Does its work once; returns the seconds that counted."""


@dataclass
class Result:
    """What was measured of one contestant. Ratios are to the baseline of its table."""

    name: str
    seconds: list[float]
    """Of each round."""
    ratio: float
    """Median over the rounds of its seconds as a multiple of the baseline's in the same round."""
    ratio_of_minima: float
    """Its fastest round as a multiple of the baseline's fastest: what is left where others load the machine."""
    peak_bytes: int | None = None
    """The most that it allocated at once, beyond what it held before."""
    kept_bytes: int | None = None
    """What autograd holds between forward and backward, parameters and inputs left out."""
    facts: dict[str, Any] = field(default_factory=dict)
    """Whatever else is worth a column."""

    @property
    def median(self) -> float:
        """Seconds of a usual round."""
        return statistics.median(self.seconds)

    @property
    def minimum(self) -> float:
        """Seconds of the fastest round."""
        return min(self.seconds)

    @property
    def spread(self) -> float:
        """How far the usual round is above the fastest: 0.1 is 10 %. Above that, believe minima only."""
        return self.median / self.minimum - 1

    def as_json(self) -> dict[str, Any]:
        """All of it."""
        return asdict(self) | {"median": self.median, "minimum": self.minimum, "spread": self.spread}


def synchronize(device: torch.device) -> None:
    """Wait for what a GPU has still to do; a CPU has done it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def clocked(work: Callable[[], object], device: torch.device, after: Callable[[], object] | None = None) -> Timed:
    """`work` timed to its end on `device`; `after` tidies up when the clock has stopped."""

    def run() -> float:
        synchronize(device)
        start = time.perf_counter()
        work()
        synchronize(device)
        elapsed = time.perf_counter() - start
        if after is not None:
            after()
        return elapsed

    return run


def processor_clocked(work: Callable[[], object]) -> Timed:
    """`work` timed by this process's processor time, which other work on the machine disturbs less than the clock."""

    def run() -> float:
        start = time.process_time()
        work()
        return time.process_time() - start

    return run


def take_turns(contestants: Mapping[str, Timed], rounds: int, warmup: int = 1) -> dict[str, list[float]]:
    """Seconds of each contestant in each round; every round begins with another one, and `warmup` rounds are dropped.

    Raises: UserError for fewer than one round.
    """
    if rounds < 1:
        raise UserError(f"--rounds: {rounds} measures nothing; give 1 or more")
    names = list(contestants)
    times: dict[str, list[float]] = {name: [] for name in names}
    for number in range(-warmup, rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            seconds = contestants[name]()
            if number >= 0:
                times[name].append(seconds)
    return times


def compare(times: Mapping[str, Sequence[float]], baseline: str) -> dict[str, Result]:
    """Results by name, with ratios to `baseline`."""
    base = times[baseline]
    found = {}
    for name, seconds in times.items():
        ratio = statistics.median(own / other for own, other in zip(seconds, base, strict=True))
        found[name] = Result(name, list(seconds), ratio, min(seconds) / min(base))
    return found


# ---- memory ----


def peak_bytes(work: Callable[[], object], device: torch.device) -> int:
    """The most that torch's allocator held at once while `work` ran, beyond what it held before.

    On a CPU the allocations are added up from a profile: what the process has resident would also count what the
    C library keeps for later. Scratch space that kernels take past torch is not seen.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        work()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        work()
    return _highest_sum(profile)


def _highest_sum(profile: Any) -> int:
    results = profile.profiler.kineto_results
    changes = sorted((e.start_ns(), e.nbytes()) for e in results.events() if e.name() == "[memory]")
    total = highest = 0
    for _, change in changes:
        total += change
        highest = max(highest, total)
    return highest


def kept_bytes(forward: Callable[[], object], own: Iterable[Tensor]) -> int:
    """Bytes that autograd holds once `forward` has run, besides the storages of `own` (inputs and parameters)."""
    known = {tensor.untyped_storage().data_ptr() for tensor in own}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = forward()  # held, so that no storage is used a second time
    total = sum(kept.values())
    del output
    return total


# ---- showing and keeping ----


def default_device() -> torch.device:
    """The GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def where(device: torch.device) -> str:
    """The device in words, with the number of threads of a CPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"


def table(results: Mapping[str, Result], columns: Sequence[str] = ()) -> str:
    """A line a contestant: seconds, ratios, memory where it was measured, and the `columns` of its facts."""
    found = list(results.values())
    head = ["", "median", "fastest", "ratio", "of minima", "spread"]
    memory = [name for name in ("peak_bytes", "kept_bytes") if any(getattr(r, name) is not None for r in found)]
    head += [{"peak_bytes": "peak", "kept_bytes": "kept"}[name] for name in memory]
    rows = [(*head, *columns)]
    for result in found:
        cells = [result.name, _seconds(result.median), _seconds(result.minimum)]
        cells += [f"{result.ratio:.3f}", f"{result.ratio_of_minima:.3f}", f"{result.spread:.0%}"]
        cells += [_mebibytes(getattr(result, name)) for name in memory]
        rows.append((*cells, *(str(result.facts.get(column, "")) for column in columns)))
    return "\n".join(align(rows, [0]))


def _seconds(value: float) -> str:
    return f"{value:.3f} s" if value >= 1 else f"{value * 1e3:.3g} ms"


def _mebibytes(value: int | None) -> str:
    return "" if value is None else f"{value / 2**20:,.1f} MiB"


def parser(doc: str | None, rounds: int) -> argparse.ArgumentParser:
    """A parser whose help is a module's docstring, with the flags that every benchmark has."""
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--rounds", type=int, default=rounds, help=f"measurements of each (default {rounds})")
    made.add_argument("--json", metavar="FILE", help="write all figures to this file too")
    return made


def machine_facts(device: torch.device) -> dict[str, Any]:
    """What a figure depends on besides the code."""
    return {
        "device": where(device), "cores": os.cpu_count(), "torch": torch.__version__,
        "python": platform.python_version(), "load_average": round(os.getloadavg()[0], 2),
        "time": time.strftime("%Y-%m-%d %H:%M:%S"),
    }  # fmt: skip


def as_document(
    bench: str, tables: Mapping[str, Mapping[str, Result]], settings: Mapping[str, Any], device: torch.device
) -> dict[str, Any]:
    """All figures of a benchmark: {bench, machine, settings, tables: {title: {contestant: figures}}}."""
    figures = {title: {name: r.as_json() for name, r in results.items()} for title, results in tables.items()}
    return {"bench": bench, "machine": machine_facts(device), "settings": dict(settings), "tables": figures}


def write_json(path: str | Path | None, document: Mapping[str, Any]) -> None:
    """Write a document of figures, where a file is named. Raises UserError where it cannot be written."""
    if path:
        write_output(path, json.dumps(document, indent=1, default=str) + "\n", "--json")
