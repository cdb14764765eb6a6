"""Costs of the order of samples: the fit finds them, and what is measured is whole."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tools.bench import samples
from tools.bench.samples import TARGETS, Order, extrapolated, fitted


def test_costs_are_found_and_extrapolated() -> None:
    counts = [(10, 3), (10, 12), (50, 15), (50, 60)]
    orders = [Order(d, s, 2.0 * d + 5.0 * s, 24 * d + 40 * s, 4 * d + 12 * s) for d, s in counts]
    assert fitted(orders, "seconds") == pytest.approx((2.0, 5.0)) and fitted(orders, "files") == pytest.approx((4, 12))
    pile = extrapolated(orders, 2048)[0]
    documents, tokens = TARGETS["the Pile, one epoch"]
    assert pile.seconds == pytest.approx(2.0 * documents + 5.0 * (tokens / 2048), rel=1e-6)


def test_orders_are_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--documents", "1000", "3000", "--length", "64", "--rounds", "1"]
    monkeypatch.setattr(sys, "argv", ["samples", *arguments, "--json", str(tmp_path / "x.json")])
    assert samples.main() == 0
    found = json.loads((tmp_path / "x.json").read_text())
    assert len(found["tables"]["measured"]) == 4
    pile = found["settings"]["extrapolated"]["the Pile, one epoch"]
    assert pile["seconds"] > 0 and pile["files"] > 4 * 210e6
    assert "2T tokens" in capsys.readouterr().out
