"""The benchmark of generation, at toy size: every contestant generates the same texts, and is measured."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

import pytest
import torch

from megatron.exchange.convert import export_huggingface
from megatron.model.forward_only import evaluating
from tests.random_models import make_model
from tools.bench.generation import compared


def test_contestants_take_turns_and_say_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    transformers = pytest.importorskip("transformers")
    monkeypatch.setattr("tools.bench.generation.VOCABULARY", 640)
    model = make_model(dtype=torch.float32)
    export_huggingface(model, tmp_path / "export")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "export", trust_remote_code=True).eval()
    options = Namespace(context=7, rounds=2, steps=3, recomputed=True, cpu_seconds=False)
    with evaluating(model):
        results = compared(model, theirs, 2, options)
    assert list(results) == ["ours", "ours, plain", "transformers", "ours, recomputed"]
    assert results["transformers"].ratio == 1
    for result in results.values():
        assert result.facts["texts equal"] == "2/2" and len(result.seconds) == 2 and result.minimum > 0
