"""A machine file that is measured is one that the planner reads; predictions stand beside measurements."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from megatron.planner import read_machine
from megatron.planner.step_time import FP32_SLOWDOWN
from tools.bench import machine, planner


def test_the_planner_reads_what_was_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "machine.yml"
    monkeypatch.setattr(machine, "measured", lambda device, quick: real(device, True))
    real_seconds = machine.fastest
    monkeypatch.setattr(machine, "fastest", lambda work, device, seconds, calls: real_seconds(work, device, 0.0, 1))
    monkeypatch.setattr(sys, "argv", ["machine", str(file)])
    assert machine.main() == 0
    found = read_machine(str(file))
    assert found.compute_fraction == found.bandwidth_fraction == 1.0 and found.memory_bytes > 2**30
    assert 1e8 < found.peak_flops / FP32_SLOWDOWN < 1e14 and 1e7 < found.memory_bandwidth < 1e13


real = machine.measured


def test_a_known_gpu_gets_fractions_of_its_data_sheet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_data_sheet", lambda device: "H200-141GB")
    monkeypatch.setattr(machine, "product_flops", lambda *arguments: 0.7 * 989.5e12)
    monkeypatch.setattr(machine, "memory_bandwidth", lambda *arguments: 4.0e12)
    monkeypatch.setattr(machine, "launch_seconds", lambda *arguments: 4.321e-6)
    found = machine.measured(torch.device("cuda"), quick=True)
    assert found["base"] == "H200-141GB" and found["launch_seconds"] == 4.32e-6
    assert found["compute_fraction"] == 0.7 and found["bandwidth_fraction"] == 0.833


def test_predictions_stand_beside_measurements(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--machine", "H200-141GB", "--sizes", "toy", "--samples", "1", "--rounds", "1"]
    monkeypatch.setattr(sys, "argv", ["planner", *arguments, "--json", str(tmp_path / "x.json")])
    assert planner.main() == 0
    found = json.loads((tmp_path / "x.json").read_text())["tables"]["toy"]
    assert set(found) == {"TokenFormer", "Transformer"}
    assert all(row["facts"]["predicted"] > 0 and 0 < row["facts"]["predicted MFU"] < 1 for row in found.values())
    assert "predicted / measured" in capsys.readouterr().out
