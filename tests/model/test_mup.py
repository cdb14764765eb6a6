"""muP: initial sizes and learning rates as the table says, and a model of the base sizes as it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron.config import load_config
from megatron.config.sections.model import ModelConfig
from megatron.engine.optimizer import parameter_groups
from megatron.engine.settings import EngineSettings
from megatron.growth import grow
from megatron.model import LanguageModel
from megatron.model.mup import mup_scale
from megatron.mpu.roles import role_of

BASE: dict[str, Any] = {
    "num_layers": 2, "hidden_size": 16, "num_attention_heads": 2, "seq_length": 8, "qkv_slot_num": 12,
    "proj_slot_num": 12, "ffn_slot_num": 40, "norm": "layernorm", "padded_vocab_size": 64, "rotary_pct": 0.5,
    "output_layer_init_method": "wang_init",
}  # fmt: skip
LARGE = {
    "num_layers": 8, "hidden_size": 64, "qkv_slot_num": 108, "proj_slot_num": 192, "ffn_slot_num": 1000,
}  # fmt: skip
MUP = {
    "use_mup": True,
    **{f"mup_base_{key}": BASE[key] for key in (*LARGE, "num_attention_heads")},
}
# Ratios: depth 4, width and head size 4, tokens 9, 16 and 25.
TOKENFORMER = {
    "embedding.word_embeddings.weight": (1, 1),
    "layers.0.input_layernorm.weight": (1, 1 / 2),
    "layers.0.post_attention_layernorm.bias": (1, 1 / 2),
    "layers.0.attention.query.key_tokens_0": (1 / 2, 1 / 8),
    "layers.0.attention.query.value_tokens_0": (1 / 6, 1 / 36),  # with 1 / sqrt(4) of the head size
    "layers.0.attention.key.value_tokens_0": (1 / 3, 1 / 18),
    "layers.0.attention.value.value_tokens_0": (1 / 3, 1 / 18),
    "layers.0.attention.proj.key_tokens_0": (1 / 2, 1 / 8),
    "layers.0.attention.proj.value_tokens_0": (1 / 8, 1 / 64),
    "layers.0.mlp.value_tokens_0": (1 / 10, 1 / 100),
    "final_norm.weight": (1 / 4, 1 / 4),
    "final_norm.bias": (1 / 4, 1 / 4),
}
TRANSFORMER = {
    "layers.0.attention.query.weight": (1 / 4, 1 / 16),
    "layers.0.attention.query.bias": (1 / 2, 1 / 4),
    "layers.0.attention.key.weight": (1 / 2, 1 / 8),
    "layers.0.attention.value.bias": (1, 1 / 2),
    "layers.0.attention.proj.weight": (1 / 4, 1 / 16),
    "layers.0.attention.proj.bias": (1 / 2, 1 / 4),
    "layers.0.mlp.fc_in.weight": (1 / 2, 1 / 8),
    "layers.0.mlp.fc_out.weight": (1 / 6, 1 / 36),  # the inner width is 9 times the base model's
    "final_norm.weight": (1, 1),
    "head.final_linear.weight": (1 / 4, 1 / 4),
}
OF_TRANSFORMERS = {
    "attention_config": [[["global"], "all"]], "no_weight_tying": True, "intermediate_size": 576,
    "mup_base_intermediate_size": 64,
}  # fmt: skip


@pytest.mark.parametrize(
    ("keys", "expected"), [({}, TOKENFORMER), (OF_TRANSFORMERS, TRANSFORMER)], ids=["tokenformer", "transformer"]
)
def test_factors_are_those_of_the_table(keys: dict[str, Any], expected: dict[str, tuple[float, float]]) -> None:
    config = ModelConfig(**{**BASE, **LARGE, **MUP, **keys})
    parameters = dict(LanguageModel(config, device="meta").named_parameters())
    for name, factors in expected.items():
        assert mup_scale(role_of(parameters[name]), config) == pytest.approx(factors), name
    plain = config.replaced(use_mup=False)
    assert {mup_scale(role_of(p), plain) for p in parameters.values()} == {(1.0, 1.0)}


METHODS = ("scaled_normal", "single_residual_scaled_normal", "wang_init", "small_init", "xavier_normal", "zero")


@pytest.mark.parametrize("method", METHODS)
def test_initial_values_are_the_base_models_by_the_factor(method: str) -> None:
    keys = {**BASE, "init_method": method, "output_layer_init_method": method, "padded_vocab_size": 640}
    base, config = ModelConfig(**keys), ModelConfig(**{**keys, **LARGE, **MUP})
    small, large = (dict(LanguageModel(c, seed=2).named_parameters()) for c in (base, config))
    for name in TOKENFORMER:
        factor = 0.0 if name.endswith("bias") else mup_scale(role_of(large[name]), config).initial
        found, expected = (p.square().mean().sqrt().item() for p in (large[name], small[name]))
        assert found == pytest.approx(expected * factor, rel=0.25), name  # as sure as so few numbers make it


def test_a_model_of_the_base_sizes_is_what_it_was() -> None:
    config = ModelConfig(**{**BASE, **MUP})
    found, expected = (dict(LanguageModel(c, seed=1).named_parameters()) for c in (config, ModelConfig(**BASE)))
    assert all(torch.equal(found[name], parameter) for name, parameter in expected.items())
    assert {mup_scale(role_of(p), config) for p in found.values()} == {(1.0, 1.0)}


def test_values_of_a_growth_are_those_of_the_larger_layer() -> None:
    config = ModelConfig(**{**BASE, **MUP, "ffn_slot_num": 4 * BASE["ffn_slot_num"]})
    model = LanguageModel(config, seed=1)
    grow(model, ffn=16 * BASE["ffn_slot_num"])
    old, new = (model.get_parameter(f"layers.0.mlp.value_tokens_{i}") for i in (0, 1))
    assert old.std().item() == pytest.approx(2 / 2 / 16**0.5 / 2, rel=0.05)  # wang_init, and 4 times the tokens
    assert new.std().item() == pytest.approx(2 / 2 / 16**0.5 / 4, rel=0.05)
    assert (
        mup_scale(role_of(old), model.config) == mup_scale(role_of(new), model.config) == pytest.approx((1 / 4, 1 / 16))
    )


def test_temperatures_are_factors_of_what_makes_the_logits() -> None:
    temps = {"mup_init_scale": 3.0, "mup_attn_temp": 2.0, "mup_output_temp": 4.0, "mup_embedding_mult": 5.0}
    config = ModelConfig(**{**BASE, **MUP, **temps})
    parameters = dict(LanguageModel(config, device="meta").named_parameters())
    expected = {
        "embedding.word_embeddings.weight": (15, 5),
        "final_norm.weight": (1 / 20, 1 / 20),
        "layers.1.attention.query.value_tokens_0": (3 / 2, 1 / 2),
        "layers.1.attention.key.value_tokens_0": (3, 1),
        "layers.1.mlp.key_tokens_0": (3, 1),
        "layers.1.input_layernorm.weight": (1, 1),
    }
    for name, factors in expected.items():
        assert mup_scale(role_of(parameters[name]), config) == pytest.approx(factors), name


def test_groups_have_the_rates_and_an_update_decays_as_much_as_ever() -> None:
    config = load_config([], {**BASE, **LARGE, **MUP, "weight_decay": 0.3, "train_micro_batch_size_per_gpu": 1})
    model = LanguageModel(config.language, device="meta")
    groups = parameter_groups(model, EngineSettings(config, config.update_size(1)))
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    for group in groups:
        roles = [role_of(parameter) for parameter in group["params"]]
        assert {mup_scale(role, config.model).rate for role in roles} == {group["lr_scale"]}
        decayed = group["lr_scale"] * group["weight_decay"]
        assert all(decayed == pytest.approx(0.0 if role.is_vector else 0.3) for role in roles)
