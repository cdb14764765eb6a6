"""The model against the official code: parameter counts, logits, losses, every gradient; and its own properties."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megatron.config.sections.model import ModelConfig
from megatron.errors import UserError
from megatron.exchange.official import canonical_name
from megatron.inference import load_model
from megatron.model import LanguageModel, Pattention
from megatron.model.init import initial_value
from megatron.ops.cross_entropy import cross_entropy

GOLDEN = Path(__file__).parents[1] / "fixtures" / "golden"
MODELS = ("model_A", "model_C_untied_gelu_l2")
SMALL: dict[str, Any] = {
    "num_layers": 2, "hidden_size": 16, "num_attention_heads": 2, "seq_length": 8, "padded_vocab_size": 32,
    "rotary_pct": 0.5,
}  # fmt: skip
TOKENS = {"qkv_slot_num": 12, "proj_slot_num": 10, "ffn_slot_num": 20}


def golden_config(name: str) -> ModelConfig:
    arguments = json.loads((GOLDEN / name / "config.json").read_text())["neox_args"]
    return ModelConfig(**{key: value for key, value in arguments.items() if key in ModelConfig.model_fields})


@pytest.mark.parametrize("name", MODELS)
def test_logits_losses_and_gradients_equal_the_official_ones(name: str) -> None:
    model = load_model(GOLDEN / name / "pytorch_model.bin", golden_config(name))
    io = load_file(GOLDEN / name / "io.safetensors")
    facts = json.loads((GOLDEN / name / "config.json").read_text())
    logits = model(io["input_ids"])
    assert (logits - io["logits"]).abs().max() < 1e-5
    for mask, key in (("loss_mask", "loss"), ("loss_mask_eod", "loss_eod_mask")):
        loss = cross_entropy(logits, io["labels"], io[mask])
        assert abs(loss.item() - facts[key]) / (1 + facts[key]) < 2e-5
    cross_entropy(logits, io["labels"], io["loss_mask"]).backward()
    grads = {n: p.grad for n, p in model.named_parameters()}
    official = {n.removeprefix("grad."): t for n, t in io.items() if n.startswith("grad.")}
    assert len(official) == len(grads)
    for official_name, expected in official.items():
        grad = grads[canonical_name(official_name, 2) or ""]
        assert grad is not None
        assert ((grad - expected).abs() / (1 + expected.abs())).max() < 2e-5, official_name


def test_parameter_counts_of_the_official_configs() -> None:
    for name, facts in json.loads((GOLDEN / "param_counts.json").read_text()).items():
        config = ModelConfig(
            num_layers=facts["layers"], hidden_size=facts["hidden"], num_attention_heads=facts["heads"],
            qkv_slot_num=facts["qkv"], proj_slot_num=facts["proj"], ffn_slot_num=facts["ffn"], rotary_pct=0.25,
            seq_length=facts["seq_length"], norm="layernorm_nonparam", final_norm="layernorm",
        ).with_vocabulary(50277)  # fmt: skip
        model = LanguageModel(config, device="meta")
        assert config.padded_vocab_size == facts["padded_vocab_size"]
        assert model.num_parameters() == facts["total"], name
        assert len(list(model.parameters())) == facts["n_tensors"], name


def test_flops_count_every_matrix_and_causal_attention() -> None:
    model = LanguageModel(ModelConfig(**SMALL, **TOKENS, norm="layernorm_nonparam"), device="meta")
    pattentions = 2 * (2 * 16 * (3 * 12 + 10 + 20))
    assert model.flops_per_token(8) == 6 * (pattentions + 32 * 16) + 6 * 2 * 8 * 16
    untied = LanguageModel(
        ModelConfig(**SMALL, **TOKENS, norm="layernorm_nonparam", no_weight_tying=True), device="meta"
    )
    assert untied.flops_per_token(8) == model.flops_per_token(8)


@pytest.mark.parametrize("kind", ["tokenformer", "global"])
@pytest.mark.parametrize("parallel", [False, True])
def test_a_token_never_sees_later_ones(kind: str, parallel: bool) -> None:
    config = ModelConfig(**SMALL, **TOKENS, attention_config=[[[kind], "all"]], gpt_j_residual=parallel)
    model = LanguageModel(config, seed=0, dtype=torch.float64)
    ids = torch.randint(0, 32, (1, 8))
    changed = ids.clone()
    changed[0, 5] = (ids[0, 5] + 1) % 32
    before, after = model(ids), model(changed)
    assert torch.equal(before[:, :5], after[:, :5]) and not torch.equal(before[:, 5], after[:, 5])


def test_kinds_of_blocks_can_be_mixed() -> None:
    config = ModelConfig(**SMALL, **TOKENS, attention_config=[[["tokenformer", "global"], 1]])
    model = LanguageModel(config, seed=0)
    assert isinstance(model.layers[0].mlp, Pattention) and not isinstance(model.layers[1].mlp, Pattention)
    assert model(torch.randint(0, 32, (2, 8))).shape == (2, 8, 32)


def test_initial_values_follow_the_table_and_depend_on_name_and_seed_only() -> None:
    config = ModelConfig(
        num_layers=4, hidden_size=64, num_attention_heads=4, seq_length=8, qkv_slot_num=256, proj_slot_num=256,
        ffn_slot_num=256, padded_vocab_size=512, init_method="normal", output_layer_init_method="wang_init",
    )  # fmt: skip
    model = dict(LanguageModel(config, seed=3).named_parameters())
    key, value = model["layers.1.mlp.key_tokens_0"], model["layers.1.mlp.value_tokens_0"]
    assert key.std().item() == pytest.approx(0.02, rel=0.05)
    assert value.std().item() == pytest.approx(2 / 4 / 64**0.5, rel=0.05)
    assert torch.equal(key, initial_value("layers.1.mlp.key_tokens_0", key, config, 3))
    assert not torch.equal(key, initial_value("layers.1.mlp.key_tokens_0", key, config, 4))
    assert not torch.equal(key, model["layers.2.mlp.key_tokens_0"])


def test_a_pattention_stands_in_for_a_linear_layer() -> None:
    layer = Pattention(24, 40, 64)
    x = torch.randn(3, 7, 24)
    assert layer(x).shape == (3, 7, 40)
    layer(x).sum().backward()
    assert all(p.grad is not None for p in layer.parameters())
    assert 0.1 < layer(x).std() < 3.0
    with pytest.raises(ValueError, match="activation: unknown 'relu'"):
        Pattention(4, 4, 4, activation="relu")
    with pytest.raises(ValueError, match="sizes must be positive"):
        Pattention(4, 4, 0)


def test_tau_survives_a_change_of_dtype_and_is_saved() -> None:
    layer = Pattention(8, 8, 1023).to(torch.bfloat16)
    assert layer.state_dict()["tau_tokens"].item() == 1023 and layer.tau_tokens.dtype == torch.int64


def test_segments_are_one_layer() -> None:
    whole, parts = Pattention(8, 8, 10), Pattention(8, 8, [6, 4])
    state = {"tau_tokens": whole.tau_tokens}
    for kind in ("key", "value"):
        tokens = getattr(whole, f"{kind}_tokens_0")
        state |= {f"{kind}_tokens_0": tokens[:6], f"{kind}_tokens_1": tokens[6:]}
    parts.load_state_dict(state)
    x = torch.randn(5, 8)
    assert torch.equal(whole(x), parts(x)) and parts.num_tokens == 10 and parts.segment_sizes == [6, 4]


def test_rotary_tables_are_not_rounded_with_the_model() -> None:
    model = LanguageModel(ModelConfig(**SMALL, **TOKENS), seed=0).to(torch.bfloat16)
    model(torch.randint(0, 32, (1, 8)))
    cos, _ = model.layers[0].attention.rotary(8, torch.device("cpu"))
    assert cos.dtype == torch.float32


def test_a_model_without_vocabulary_says_what_to_do() -> None:
    with pytest.raises(ValueError, match="with_vocabulary"):
        LanguageModel(ModelConfig(**{**SMALL, "padded_vocab_size": None}, **TOKENS))


def test_a_flat_file_of_another_shape_names_tensor_and_key() -> None:
    config = golden_config("model_A")
    path = GOLDEN / "model_A" / "pytorch_model.bin"
    with pytest.raises(
        UserError, match=r"qkv_slot_num: 32 in the configuration, 64 in checkpoint .*pytorch_model\.bin"
    ):
        load_model(path, config.model_copy(update={"qkv_slot_num": 32}))
    with pytest.raises(UserError, match="lacks"):
        load_model(path, config.model_copy(update={"num_layers": 1}))
    with pytest.raises(UserError, match="head.final_linear.weight.*no_weight_tying"):
        load_model(path, config.model_copy(update={"no_weight_tying": True}))
    with pytest.raises(UserError, match="give the YAML configuration"):
        load_model(path)


def test_what_is_no_checkpoint_is_one_line(tmp_path: Path) -> None:
    broken = tmp_path / "pytorch_model.bin"
    broken.write_bytes(b"not a checkpoint")
    with pytest.raises(UserError, match="not a readable PyTorch file"):
        load_model(broken, golden_config("model_A"))
    torch.save({"weights": [1, 2]}, broken)
    with pytest.raises(UserError, match="not a flat dictionary of tensors"):
        load_model(broken, golden_config("model_A"))
    with pytest.raises(UserError, match="no checkpoint in"):
        load_model(tmp_path / "nothing")


@pytest.mark.launches
def test_importing_the_model_brings_in_neither_deepspeed_nor_wandb_nor_lm_eval() -> None:
    others = ("deepspeed", "wandb", "lm_eval", "transformers", "numpy.testing", "safetensors", "tokenizers")
    code = f"import sys, megatron.model; print([m for m in {others} if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
