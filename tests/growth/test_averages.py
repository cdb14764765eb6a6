"""An average of the weights grows as a model of its own: both compute what they did, after any chain of growths."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron.growth.convert import grow_checkpoint
from megatron.growth.plan import TokenCounts
from megatron.inference import load_model
from tests.growth.grown_runs import checkpoint, state, worst
from tests.random_models import make_config, save_random_models

# The model has 24 / 20 / 40 tokens and a width of 32.
CHAINS: dict[str, tuple[str, list[dict[str, Any]]]] = {
    "zero": ("l2_norm_gelu", [{"qkv": 31, "proj": 29, "ffn": 50}, {"ffn": 61, "layers": (1,)}]),
    "rotated": ("l2_norm_gelu", [
        {"qkv": 56, "proj": 50, "ffn": 90, "new_keys": "rotated"}, {"ffn": 140, "new_keys": "rotated"},
    ]),
    "random": ("gelu_l2_norm", [{"qkv": 30, "proj": 25, "ffn": 47, "row_norm": "segment"}, {"qkv": 41, "ffn": 60}]),
    "repeated": ("softmax", [{"qkv": 48, "proj": 40, "ffn": 80}, {"proj": 80}]),
    "mixed": ("l2_norm_gelu", [
        {"qkv": 31, "proj": 29, "ffn": 50}, {"qkv": 60, "proj": 50, "ffn": 72, "row_norm": "segment"},
        {"qkv": 92, "proj": 82, "ffn": 104, "new_keys": "rotated"},
    ]),
}  # fmt: skip


@pytest.mark.parametrize("name", CHAINS)
def test_weights_and_average_compute_what_they_did(tmp_path: Path, name: str) -> None:
    activation, chain = CHAINS[name]
    config = make_config(norm_activation_type=activation, init_method_std=0.2)
    save_random_models(tmp_path / "0", config, (3,), ema=True)
    for number, counts in enumerate(chain):
        grow_checkpoint(tmp_path / str(number), tmp_path / str(number + 1), TokenCounts(**counts))
    grown = tmp_path / str(len(chain))
    ids = torch.randint(640, (2, 48), generator=torch.Generator().manual_seed(0))
    for use_ema in (False, True):
        with torch.no_grad():
            before, after = (load_model(p, dtype=torch.float64, use_ema=use_ema)(ids) for p in (tmp_path / "0", grown))
        # Rotated keys are rounded to fp32.
        assert worst(before, after) <= (1e-5 if name in ("rotated", "mixed") else 1e-6) * before.abs().max(), use_ema
    for entry in state(grown)["lineage"]:
        assert 0 <= entry["ema_logit_difference"] < 1e-4
    saved, keys = checkpoint(grown), "layers.1.mlp.key_tokens_1"
    same = torch.equal(saved.tensor("model", keys), saved.tensor("ema", keys))
    assert same == (name in ("zero", "mixed")), "keys that are made of others are made of the average's own"
