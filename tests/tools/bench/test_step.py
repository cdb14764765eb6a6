"""The models whose steps are compared do as many FLOPs, and the one in official words computes the same."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

from tools.bench import step
from tools.bench.step_models import OfficialPattention, Shape, contestants, ours, replaced

TOY = Shape(layers=2, width=32, heads=4, vocabulary=256, length=16)
CPU = torch.device("cpu")


def test_matrices_have_equally_many_entries() -> None:
    counts = {}
    for name, make in contestants(TOY, CPU, "reference").items():
        if name == "GPTNeoX" and importlib.util.find_spec("transformers") is None:
            continue
        counts[name] = sum(p.numel() for p in make().model.parameters() if p.dim() == 2)
    assert len(counts) >= 4 and len(set(counts.values())) == 1, counts


def test_official_words_compute_the_same_loss_and_gradients() -> None:
    section, ids = TOY.tokenformer(), torch.randint(1, 256, (2, 17), generator=torch.Generator().manual_seed(3))
    mine, theirs = ours(section, CPU), replaced(section, CPU, OfficialPattention)
    losses = [contestant.loss(ids) for contestant in (mine, theirs)]
    for loss in losses:
        loss.backward()
    assert torch.allclose(*losses, rtol=1e-5)
    embeddings = [c.model.get_parameter("embedding.word_embeddings.weight").grad for c in (mine, theirs)]
    assert embeddings[0] is not None and embeddings[1] is not None
    assert torch.allclose(embeddings[0], embeddings[1], rtol=1e-3, atol=1e-6)


def test_every_contestant_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = ["--layers", "1", "--width", "32", "--heads", "4", "--vocabulary", "256", "--length", "16", "--rounds", "1"]
    names = ["TokenFormer", "official", "MLPs", "Transformer"]
    arguments = ["step", *sizes, "--json", str(tmp_path / "x.json"), "--contestants", *names]
    monkeypatch.setattr(sys, "argv", arguments)
    assert step.main() == 0
    found = json.loads((tmp_path / "x.json").read_text())["tables"]["step"]
    assert list(found) == names and all(f["kept_bytes"] > 0 and f["peak_bytes"] > 0 for f in found.values())
    assert found["official"]["kept_bytes"] > found["MLPs"]["kept_bytes"]
    assert "official" in capsys.readouterr().out
