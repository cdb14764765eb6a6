"""Activations of models of three widths, numbers of tokens and depths: with muP they keep their size, without not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron.config import RunConfig
from megatron.training.coord_check import check_coordinates

MakeConfig = Callable[..., RunConfig]
pytestmark = pytest.mark.usefixtures("single_process")

RUN: dict[str, Any] = {
    "coord_check": True, "output_layer_init_method": "scaled_normal", "init_method_std": 0.1,
    "qkv_slot_num": 32, "proj_slot_num": 32, "ffn_slot_num": 64, "optimizer": {"type": "Adam", "params": {"lr": 4e-3}},
}  # fmt: skip
MUP = {"use_mup": True, "mup_base_hidden_size": 32}
OF_TRANSFORMERS = {"attention_config": [[["global"], 2]], "norm": "layernorm", "qkv_slot_num": None}


def spreads(config: RunConfig) -> dict[str, float]:
    """By axis, the largest quotient between two of its models of how far the last block or the logits have moved."""
    check_coordinates(config)
    found = json.loads((Path(str(config.logging.log_dir)) / "coord_check.json").read_text())
    assert found.pop("use_mup") == config.language.use_mup
    result = {}
    for axis, sizes in found.items():
        assert len(sizes) == 3
        moved = [[a[name]["changes"][-1] for a in sizes.values()] for name in ("last block", "logits")]
        result[axis] = max(max(values) / min(values) for values in moved)
    return result


@pytest.mark.parametrize("activation", ["l2_norm_gelu", "gelu_l2_norm", "softmax"])
def test_activations_move_as_far_at_every_size_with_mup(
    tiny_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, activation: str
) -> None:
    monkeypatch.setattr("megatron.training.coord_check._draw", lambda *_: None)
    found = spreads(tiny_config(**RUN, **MUP, norm_activation_type=activation, log_dir=str(tmp_path)))
    assert set(found) == {"width", "tokens", "depth"} and max(found.values()) < 1.6


def test_without_mup_they_do_not(tiny_config: MakeConfig, tmp_path: Path) -> None:
    found = spreads(tiny_config(**RUN, log_dir=str(tmp_path)))
    assert min(found.values()) > 1.6
    pytest.importorskip("matplotlib", reason="matplotlib draws the figure, and is not installed")
    assert (tmp_path / "coord_check.png").read_bytes().startswith(b"\x89PNG")


def test_of_transformers(tiny_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron.training.coord_check._draw", lambda *_: None)
    found = spreads(tiny_config(**{**RUN, **MUP, **OF_TRANSFORMERS}, log_dir=str(tmp_path)))
    assert set(found) == {"width", "depth"} and max(found.values()) < 1.6
