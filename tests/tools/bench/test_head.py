"""The benchmark of head and loss measures both ways, and extrapolates the peak by a line."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import torch

from megatron.ops import linear_cross_entropy as module
from tools.bench import head
from tools.bench.measure import peak_bytes

SIZES = {"width": 16, "vocabulary": 500}


def test_it_writes_ratios_errors_and_peaks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(module.CHUNK_BYTES, "cpu", 128 * 500 * 4)
    flags = ["--tokens=600", "--rounds=2", "--target-tokens=2000", f"--json={tmp_path / 'head.json'}"]
    monkeypatch.setattr("sys.argv", ["head", *flags, *(f"--{name}={value}" for name, value in SIZES.items())])
    assert head.main() == 0
    found = json.loads((tmp_path / "head.json").read_text())
    eager, chunked = (found["tables"]["training"][name] for name in ("eager", "chunked"))
    assert eager["ratio"] == 1.0 and len(chunked["seconds"]) == 2
    assert eager["peak_bytes"] > 2 * 600 * 500 * 4 > 2 * chunked["peak_bytes"]
    assert max(float(way["facts"]["error"]) for way in (eager, chunked)) < 1e-5
    assert set(found["tables"]["evaluation"]) == {"eager", "chunked"}
    assert "chunks of 128 rows; their peak extrapolated to 2000 tokens" in capsys.readouterr().out


def test_the_extrapolated_peak_is_the_one_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(module.CHUNK_BYTES, "cpu", 128 * 500 * 4)
    device = torch.device("cpu")
    make = partial(head.Inputs, dtype=torch.float32, device=device, **SIZES)
    found = head.extrapolated_peak(make, 128, 1500, device)
    at_once = make(1500)
    measured = peak_bytes(partial(at_once.train, head.CONTESTANTS["chunked"]), device)
    assert found == pytest.approx(measured, rel=0.02)
