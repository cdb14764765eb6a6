"""The curve of loss against the share of tokens: one command, from a checkpoint to a table, a figure and its points."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
import yaml

from megatron.errors import UserError
from megatron.inference.sparse import heaviest
from tests.random_models import make_config, make_model, save_random_models
from tools.sparse_curve import MASKED, main, masked


def test_one_command_measures_and_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = make_config(load=str(tmp_path / "run"), eval_batch_size=4)
    save_random_models(tmp_path / "run", config, (1,))
    (tmp_path / "config.yml").write_text(yaml.safe_dump(config.flat()))
    (tmp_path / "text.txt").write_text("The ferry leaves at noon. " * 3)
    figure, points = tmp_path / "new" / "curve.png", tmp_path / "points.json"
    arguments = [str(tmp_path / "config.yml"), "--perplexity", str(tmp_path / "text.txt"), "--shares", "0.2", "1"]
    assert main([*arguments, "--thresholds", "0.5", "--output", str(figure), "--json", str(points)]) == 0
    assert figure.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    found = json.loads(points.read_text())
    whole = found[0]["loss"]
    assert [(p["curve"], p["setting"]) for p in found] == [
        ("all", 1), *((name, share) for name in ("all", "qkv", "proj", "ffn") for share in (0.2, 1)),
        ("threshold", 0.5), (MASKED, 0.2), (MASKED, 1),
    ]  # fmt: skip
    for point in found:
        assert math.isfinite(point["loss"]) and (point["loss"] == whole) == (point["setting"] == 1)
    assert all(0.19 < p["share"] < 0.21 for p in found if p["setting"] == 0.2) and 0 < found[9]["share"] < 1
    lines = capsys.readouterr().out.splitlines()
    assert len([line for line in lines if line.endswith("+0.0000")]) == 6


@torch.no_grad()
def test_masked_scores_have_the_row_norm_of_the_kept_tokens() -> None:
    model, x = make_model(), torch.randn(3, 32, dtype=torch.float64)
    layer = model.layers[0].mlp
    scores = x @ layer.key_param_tokens.T
    weights = torch.nn.functional.gelu(40**0.5 * scores / scores.norm(dim=-1, keepdim=True))
    scores = scores * (weights.abs() >= weights.abs().topk(8).values[:, -1:])
    expected = torch.nn.functional.gelu(40**0.5 * scores / scores.norm(dim=-1, keepdim=True)) @ layer.value_param_tokens
    torch.testing.assert_close(masked(model, 0.2).layers[0].mlp(x), expected)
    assert heaviest(layer, 1.0) is None and masked(model, 1.0).layers[0].mlp is layer


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        *((["--shares", share], rf"--shares: {share} is no share of the tokens; give") for share in ("0", "1.5", "-1")),
        *((["--thresholds", size], rf"--thresholds: {size} is no size of a weight; give") for size in ("0", "nan")),
        (["--json", "."], r"--json: \."),
    ],
)
def test_mistakes_are_found_before_anything_is_measured(tmp_path: Path, flags: list[str], message: str) -> None:
    with pytest.raises(UserError, match=f"^{message}"):
        main(["config.yml", "--output", str(tmp_path / "curve.png"), *flags])
