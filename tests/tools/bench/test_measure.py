"""What the benchmarks share: turns, ratios, memory, documents."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch

from megatron.errors import UserError
from tools.bench.measure import (
    as_document,
    clocked,
    compare,
    kept_bytes,
    peak_bytes,
    processor_clocked,
    table,
    take_turns,
    write_json,
)

CPU = torch.device("cpu")
HEAD = "median fastest ratio of minima spread peak tokens/s"


def test_contestants_take_turns_and_each_begins() -> None:
    calls: list[str] = []

    def contestant(name: str, seconds: float) -> float:
        calls.append(name)
        return seconds

    times = take_turns({name: lambda n=name: contestant(n, 1.0) for name in "abc"}, rounds=3, warmup=1)  # type: ignore[misc]
    assert times == {name: [1.0] * 3 for name in "abc"}
    rounds = ["".join(calls[i : i + 3]) for i in range(0, 12, 3)]
    assert rounds[1:] == ["abc", "bca", "cab"] and sorted(rounds[0]) == ["a", "b", "c"]
    with pytest.raises(UserError, match="--rounds: 0 measures nothing"):
        take_turns({"a": lambda: 1.0}, rounds=0)


def test_processor_time_leaves_out_what_the_process_waits_for() -> None:
    assert processor_clocked(lambda: time.sleep(0.05))() < 0.04 < clocked(lambda: time.sleep(0.05), CPU)()
    assert processor_clocked(lambda: sum(range(100_000)))() > 0


def test_ratios_are_those_of_the_same_round() -> None:
    found = compare({"ours": [1.0, 20.0, 3.0], "theirs": [2.0, 40.0, 3.0]}, "theirs")
    assert found["ours"].ratio == 0.5  # though its own median is 1.5 times that of the others' fastest
    assert found["ours"].ratio_of_minima == 0.5 and found["ours"].median == 3.0
    assert found["theirs"].ratio == 1.0 and found["ours"].spread == 2.0


def test_memory_is_what_was_allocated_at_once_and_what_autograd_holds() -> None:
    x = torch.randn(256, 1024, requires_grad=True)
    unit = x.numel() * 4

    def work() -> None:
        first = x.detach() + 1
        del first
        second = x.detach() + 1
        third = second + 1
        del second, third

    assert peak_bytes(work, CPU) == pytest.approx(2 * unit, abs=100)  # and the number 1
    assert kept_bytes(lambda: x.exp().sigmoid(), [x]) == 2 * unit  # both keep their output
    assert kept_bytes(lambda: x * x, [x]) == 0


def test_the_clock_stops_before_tidying_up() -> None:
    order: list[str] = []
    run = clocked(lambda: order.append("work"), CPU, after=lambda: order.append("after"))
    assert run() >= 0 and order == ["work", "after"]


def test_a_document_has_every_figure(tmp_path: Path) -> None:
    results = compare({"a": [0.5, 0.25], "b": [2.0, 1.0]}, "b")
    results["a"].peak_bytes, results["a"].facts = 2**20, {"tokens/s": 12}
    lines = table(results, ["tokens/s"]).splitlines()
    assert len(lines) == 3 and " ".join(lines[0].split()) == HEAD
    assert "1.0 MiB" in lines[1] and lines[1].endswith("12")
    write_json(tmp_path / "x.json", as_document("name", {"all": results}, {"rounds": 2}, CPU))
    found = json.loads((tmp_path / "x.json").read_text())
    assert found["tables"]["all"]["a"]["ratio"] == 0.25 and found["tables"]["all"]["b"]["seconds"] == [2.0, 1.0]
    assert found["settings"] == {"rounds": 2} and found["machine"]["device"].startswith("CPU")
    with pytest.raises(UserError, match="--json"):
        write_json(tmp_path / "x.json" / "y.json", {})
