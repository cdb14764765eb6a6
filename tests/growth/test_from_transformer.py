"""A TokenFormer from a Transformer: what is exact, what is fitted, and that it is worth it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron.errors import UserError
from megatron.growth.from_transformer import fit_tokens, tokenformer_config
from megatron.inference import load_model
from megatron.model import LanguageModel
from tests.growth.grown_runs import MakeConfig, run
from tests.random_models import make_config, make_model, save_random_models
from tools.ckpts.convert import main as convert

SLOTS: dict[str, Any] = {"qkv_slot_num": None, "proj_slot_num": None, "ffn_slot_num": None}
IDS = torch.randint(500, (16, 48), generator=torch.Generator().manual_seed(1))


def transformer(**keys: Any) -> LanguageModel:
    return make_model("transformer", norm="layernorm_nonparam", hidden_dropout=0.0, init_method_std=0.3, **keys)


def errors(teacher: LanguageModel, qkv: int, proj: int, ffn: int) -> tuple[dict[str, float], float]:
    """The error of each layer, and the largest difference of logits as a part of the largest logit."""
    config = tokenformer_config(teacher.config, qkv, proj, ffn)
    student, fits = fit_tokens(teacher, config, IDS)
    with torch.no_grad():
        expected, logits = teacher(IDS).double(), student(IDS).double()
    return {fit.name: fit.error for fit in fits}, ((logits - expected).abs().max() / expected.abs().max()).item()


def test_pairs_of_tokens_are_a_linear_map() -> None:
    """2 d tokens behind a LayerNorm give queries, keys and values; what is left is its epsilon and the ridge."""
    found, _ = errors(transformer(), 64, 64, 128)
    exact = ("layers.0.attention.query", "layers.0.attention.key", "layers.0.attention.value")
    assert all(found[name] < 1e-3 for name in exact)
    assert set(found) == {
        f"layers.{i}.{name}"
        for i in range(2)
        for name in ("attention.query", "attention.key", "attention.value", "attention.proj", "mlp")
    }


def test_more_tokens_come_nearer() -> None:
    teacher = transformer()
    by_size = [errors(teacher, *sizes) for sizes in ((8, 8, 24), (24, 24, 72), (64, 64, 144))]
    assert by_size[0][1] > by_size[1][1] > by_size[2][1]
    for name in by_size[0][0]:
        assert by_size[0][0][name] > by_size[2][0][name], name


@pytest.mark.parametrize("keys", [{"gpt_j_residual": True}, {"norm": "layernorm"}, {"activation": "relu"}], ids=str)
def test_other_blocks_are_fitted_too(keys: dict[str, Any]) -> None:
    teacher = make_model("transformer", **{"norm": "layernorm_nonparam", "init_method_std": 0.3, **keys})
    found, _ = errors(teacher, 64, 64, 128)
    assert max(found.values()) < 0.25


def test_mistakes_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="IN: the model has tokenformer blocks; give a Transformer"):
        tokenformer_config(make_config().model, 8, 8, 8)  # type: ignore[arg-type]
    teacher = transformer()
    with pytest.raises(UserError, match="--text: 768 tokens of text are few to fit 1,000 parameter tokens; give 4,000"):
        fit_tokens(teacher, tokenformer_config(teacher.config, 8, 8, 1000), IDS)
    flags = ["from-transformer", str(tmp_path / "run"), str(tmp_path / "out"), "--proj", "8", "--ffn", "8"]
    for count in ("0", "16777217"):
        with pytest.raises(UserError, match="--qkv, .* give numbers from 1 to 16,777,216"):
            convert([*flags, "--qkv", count, "--text", "a.txt"])
    save_random_models(tmp_path / "run", make_config(**SLOTS), (1,))
    with pytest.raises(UserError, match="^--text: a.txt is neither the prefix of a .bin/.idx pair nor a text file"):
        convert([*flags, "--qkv", "8", "--text", "a.txt"])
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    with pytest.raises(UserError, match="out: exists already; give a new or an empty folder"):  # before it is fitted
        convert([*flags, "--qkv", "8", "--text", "a.txt"])


@pytest.mark.usefixtures("single_process")
def test_a_trained_transformer_is_a_better_start_than_chance(
    tiny_config: MakeConfig, corpus_prefix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command: fitted on a text, its losses printed, and training goes on from what it wrote."""
    keys = {**SLOTS, "train_iters": 120, "optimizer": {"type": "Adam", "params": {"lr": 1e-2}}}
    run(tiny_config, tmp_path / "old", **keys)
    capsys.readouterr()
    sizes = ["--qkv", "64", "--proj", "64", "--ffn", "160", "--samples", "64"]
    convert(["from-transformer", str(tmp_path / "old"), str(tmp_path / "new"), "--text", corpus_prefix, *sizes])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("loss of")]
    teacher, fitted, random = (float(line.split(": ")[1].split()[0]) for line in lines)
    assert fitted - teacher < 0.25 * (random - teacher), lines
    model = load_model(tmp_path / "new")
    assert model.config.qkv_slot_num == 64 and model.layers[0].mlp.num_tokens == 160  # type: ignore[union-attr]
    counts = {"qkv_slot_num": 64, "proj_slot_num": 64, "ffn_slot_num": 160}
    run(tiny_config, tmp_path / "on", **counts, load=str(tmp_path / "new"), finetune=True, train_iters=2)
    text = capsys.readouterr().out
    assert "took the weights of" in text
