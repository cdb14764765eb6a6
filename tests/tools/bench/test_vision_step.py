"""The vision models that are compared are of one shape, and all are measured."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

from tools.bench import vision_step
from tools.bench.vision_step import TIMM, Shape

TOY = Shape("toy", 2, 32, 2, image_size=32)
CPU = torch.device("cpu")


def test_contestants_have_as_many_parameters() -> None:
    counts = {name: sum(p.numel() for p in model.parameters()) for name, model in TOY.models(CPU).items()}
    vectors = TOY.layers * 13 * TOY.width  # biases and norms, which a TokenFormer's block does not have
    assert counts["Transformer"] - counts["TokenFormer"] == vectors
    if importlib.util.find_spec(TIMM) is None:
        pytest.skip("timm is not installed: requirements/requirements-vision-dev.txt")
    assert counts[TIMM] == counts["Transformer"]


def test_all_are_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(vision_step.SHAPES, "tiny", TOY)
    words = ["--shapes", "tiny", "--samples", "2", "--rounds", "1", "--json", str(tmp_path / "x.json")]
    monkeypatch.setattr(sys, "argv", ["vision_step", *words])
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    assert vision_step.main() == 0
    tables = json.loads((tmp_path / "x.json").read_text())["tables"]
    assert list(tables) == ["tiny, forward", "tiny, training"]
    for results in tables.values():
        assert {"Transformer", "TokenFormer"} <= set(results)
        assert all(each["minimum"] > 0 and each["facts"]["images/s"] for each in results.values())
    assert tables["tiny, training"]["TokenFormer"]["seconds"] > tables["tiny, forward"]["TokenFormer"]["seconds"]
    assert "TokenFormer" in capsys.readouterr().out


def test_an_update_changes_the_weights() -> None:
    model = TOY.models(CPU)["TokenFormer"]
    before = [parameter.detach().clone() for parameter in model.parameters()]
    vision_step.training(model, torch.randn(2, 3, 32, 32))()
    assert all(not torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))
