"""GPT-NeoX (Pythia) checkpoints against transformers' own GPTNeoXForCausalLM."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

from megatron.errors import UserError
from megatron.exchange.convert import export_huggingface
from megatron.exchange.gpt_neox import canonical_names, neox_name
from megatron.inference import load_model
from tests.random_models import make_model

IDS = torch.randint(0, 96, (2, 24), generator=torch.Generator().manual_seed(0))


def random_neox(**keys: Any) -> transformers.GPTNeoXForCausalLM:
    arguments = {
        "vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
        "intermediate_size": 128, "max_position_embeddings": 64, "initializer_range": 0.3, **keys,
    }  # fmt: skip
    torch.manual_seed(0)
    model = transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**arguments)).eval()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"use_parallel_residual": False, "tie_word_embeddings": True, "hidden_act": "relu"},
        {"attention_bias": False, "intermediate_size": 72, "hidden_act": "silu", "layer_norm_eps": 1e-3},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 1.0}},
    ],
    ids=["pythia", "sequential-tied-relu", "no-bias-silu", "all-dimensions-rotated"],
)
def test_logits_equal_and_tensors_return_bit_by_bit(keys: dict[str, Any], tmp_path: Path) -> None:
    theirs = random_neox(**keys)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_model(tmp_path / "theirs")
    assert (ours(IDS) - theirs(IDS).logits).abs().max() < 1e-5
    export_huggingface(ours, tmp_path / "back")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("theirs", "back"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    assert isinstance(again, transformers.GPTNeoXForCausalLM)
    assert torch.equal(again(IDS).logits, theirs(IDS).logits)


def test_an_old_pythia_folder_loads(tmp_path: Path) -> None:
    """pytorch_model.bin, old spellings of the rotary keys, saved masks."""
    theirs = random_neox()
    tensors = {name.replace("lm_head", "embed_out"): tensor for name, tensor in theirs.state_dict().items()}
    tensors["gpt_neox.layers.0.attention.masked_bias"] = torch.tensor(-1e9)
    tensors["gpt_neox.layers.0.attention.rotary_emb.inv_freq"] = torch.ones(1)
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    config = {
        "architectures": ["GPTNeoXForCausalLM"], "model_type": "gpt_neox", "vocab_size": 96, "hidden_size": 32,
        "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128, "max_position_embeddings": 64,
        "hidden_act": "gelu", "rotary_pct": 0.25, "rotary_emb_base": 10000, "use_parallel_residual": True,
        "tie_word_embeddings": False, "layer_norm_eps": 1e-5, "torch_dtype": "float16",
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert (load_model(tmp_path)(IDS) - theirs(IDS).logits).abs().max() < 1e-5
    for change, message in (
        ({"hidden_act": "gelu_new"}, "hidden_act 'gelu_new' is not supported"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type 'linear' is not supported"),
        ({"hidden_size": 64}, "hidden_size: 64 does not fit"),
        ({"num_attention_heads": 5}, "num_attention_heads: 5 heads do not divide"),
    ):
        (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(UserError, match=message):
            load_model(tmp_path)
    del config["num_hidden_layers"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="key 'num_hidden_layers' is missing"):
        load_model(tmp_path)


def test_a_transformer_baseline_is_exported_as_gpt_neox(tmp_path: Path) -> None:
    model = make_model("transformer", norm="layernorm")
    export_huggingface(model, tmp_path / "export")
    assert not list((tmp_path / "export").glob("*.py"))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "export", dtype=torch.float64)
    # transformers rotates with fp32 frequencies whatever the dtype.
    assert (theirs(IDS).logits - model(IDS)).abs().max() < 1e-5


def test_names_are_each_others_inverse() -> None:
    model = make_model("transformer", norm="layernorm", no_weight_tying=True)
    for name in model.state_dict():
        assert name in canonical_names(neox_name(name))
