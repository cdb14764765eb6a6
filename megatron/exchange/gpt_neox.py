"""Transformer models in the Hugging Face GPT-NeoX format (Pythia and others): a folder that needs no code of its own.

GPTNeoXForCausalLM                                        canonical name
    gpt_neox.embed_in.weight                              embedding.word_embeddings.weight
    gpt_neox.layers.{i}.{input,post_attention}_layernorm  layers.{i}.(the same)
    gpt_neox.layers.{i}.attention.query_key_value         layers.{i}.attention.{query,key,value}
    gpt_neox.layers.{i}.attention.dense                   layers.{i}.attention.proj
    gpt_neox.layers.{i}.mlp.dense_h_to_4h, dense_4h_to_h  layers.{i}.mlp.fc_in, fc_out
    gpt_neox.final_layer_norm                             final_norm
    embed_out.weight (lm_head.weight in transformers 5)   head.final_linear.weight

query_key_value is fused head by head: its rows are [heads, 3, head_dim].
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron.checkpoint.tensors import Tensors
from megatron.config.sections.model import TOKENFORMER, ModelConfig
from megatron.errors import UserError
from megatron.exchange.checkpoint import Checkpoint
from megatron.exchange.huggingface_folder import (
    CONFIG,
    SHARD_BYTES,
    TOKENIZER,
    architectures,
    is_tied,
    language_files,
    open_folder,
    write_folder,
)
from megatron.exchange.huggingface_weights import read_json
from megatron.exchange.model_card import NO_CARD, README, Card, Loading, model_card
from megatron.exchange.names import EMBEDDING, in_model_order

ARCHITECTURE = "GPTNeoXForCausalLM"
_LAYER_PARTS = {
    "attention.proj": "attention.dense", "mlp.fc_in": "mlp.dense_h_to_4h", "mlp.fc_out": "mlp.dense_4h_to_h",
}  # fmt: skip
_OTHER_PARTS = {
    "embedding.word_embeddings": "gpt_neox.embed_in", "final_norm": "gpt_neox.final_layer_norm",
    "head.final_linear": "embed_out",
}  # fmt: skip
_FUSED = "attention.query_key_value"
_QKV = ("query", "key", "value")
_SPLIT = re.compile(r"^(layers\.\d+\.)attention\.(query|key|value)\.(weight|bias)$")
# Masks and rotary tables that older versions saved.
_CONSTANT = re.compile(r"\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)$")


def matches(path: Path, iteration: int | None = None, key: str = "load") -> Path | None:
    """`path` if it is a folder with a config.json that names this architecture."""
    is_ours = os.path.isfile(path / CONFIG) and ARCHITECTURE in architectures(read_json(path / CONFIG))
    return path if is_ours else None


def open(path: Path, config: object = None, key: str = "load") -> Checkpoint:
    """A GPT-NeoX model, which says for itself what it is. Raises UserError for one that is damaged or not expressible.

    Fused tensors are split as they are read.
    """
    keys = _keys(read_json(path / CONFIG), str(path / CONFIG))
    return open_folder(
        path, keys, canonical_names, lambda name, fused: split_fused(name, fused, int(keys["num_attention_heads"]))
    )


def write(
    target: str | Path,
    checkpoint: Checkpoint,
    dtype: torch.dtype | None = None,
    shard_bytes: int = SHARD_BYTES,
    card: Card = NO_CARD,
) -> None:
    """Write a folder that GPTNeoXForCausalLM loads, for a model that `is_expressible`; complete or not at all.

    Args and errors: those of megatron.exchange.huggingface.write.
    """
    config = checkpoint.language
    tensors = neox_tensors(checkpoint.tensors, config.num_attention_heads)
    dtype = dtype or checkpoint.tensors.tensor("model", EMBEDDING).dtype
    files = language_files(checkpoint, neox_config(config), dtype)
    loading = Loading("AutoModelForCausalLM", False, "AutoTokenizer" if TOKENIZER in files else None)
    readme = model_card(checkpoint, config, Path(target).name, dtype, loading, card)
    write_folder(target, tensors, dtype, shard_bytes, {**files, README: readme})


def neox_name(canonical: str) -> str:
    """The GPT-NeoX name of a canonical one; for query, key and value that of the fused tensor."""
    split = _SPLIT.match(canonical)
    if split:
        return f"gpt_neox.{split[1]}{_FUSED}.{split[3]}"
    stem, _, last = canonical.rpartition(".")
    if stem in _OTHER_PARTS:
        return f"{_OTHER_PARTS[stem]}.{last}"
    _, number, part = stem.split(".", 2)
    return f"gpt_neox.layers.{number}.{_LAYER_PARTS.get(part, part)}.{last}"


def canonical_names(name: str) -> list[str]:
    """Canonical names of what a GPT-NeoX tensor holds: three of a fused one, none of a constant."""
    if _CONSTANT.search(name):
        return []
    stem, _, last = name.replace("lm_head.", "embed_out.").rpartition(".")
    for ours, theirs in _OTHER_PARTS.items():
        if stem == theirs:
            return [f"{ours}.{last}"]
    stem = stem.removeprefix("gpt_neox.")
    if stem.endswith(_FUSED):
        return [f"{stem.removesuffix(_FUSED)}attention.{part}.{last}" for part in _QKV]
    for ours, theirs in _LAYER_PARTS.items():
        if stem.endswith(f".{theirs}"):
            stem = stem.removesuffix(theirs) + ours
    return [f"{stem}.{last}"]


def split_fused(name: str, fused: Tensor, num_heads: int) -> Tensor:
    """The part of a fused tensor [3 d, ..] that the canonical `name` means, [d, ..]."""
    split = _SPLIT.match(name)
    assert split is not None, f"{name} is no part of a fused tensor"
    by_head = fused.unflatten(0, (num_heads, 3, -1))  # [h, 3, head_dim, ..]
    return by_head[:, _QKV.index(split[2])].flatten(0, 1).contiguous()


def neox_tensors(tensors: Tensors, num_heads: int) -> Iterator[tuple[str, Tensor]]:
    """Canonical tensors under GPT-NeoX names, query, key and value fused."""
    for name in in_model_order(tensors.names("model")):
        split = _SPLIT.match(name)
        if split is None:
            yield neox_name(name), tensors.tensor("model", name)
        elif split[2] == "query":
            parts = [tensors.tensor("model", f"{split[1]}attention.{part}.{split[3]}") for part in _QKV]
            by_head = torch.stack([part.unflatten(0, (num_heads, -1)) for part in parts], 1)  # [h, 3, head_dim, ..]
            yield neox_name(name), by_head.flatten(0, 2)


def is_expressible(config: ModelConfig) -> bool:
    """Whether GPTNeoXForCausalLM computes this model: Transformer blocks, LayerNorms with weights, rotary positions."""
    norms = {config.norm, config.final_norm_kind}
    return TOKENFORMER not in config.layer_kinds and norms == {"layernorm"} and config.rotary_dim > 0


def neox_config(config: ModelConfig) -> dict[str, Any]:
    """The model's part of config.json, with the spellings of every transformers version."""
    return {
        "architectures": [ARCHITECTURE],
        "model_type": "gpt_neox",
        "vocab_size": config.padded_vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_attention_heads,
        "intermediate_size": config.intermediate_size or 4 * config.hidden_size,
        "hidden_act": config.activation,
        "attention_dropout": config.attention_dropout,
        "hidden_dropout": config.hidden_dropout,
        "max_position_embeddings": config.max_position_embeddings or config.seq_length,
        "initializer_range": config.init_method_std,
        "layer_norm_eps": config.layernorm_epsilon,
        "tie_word_embeddings": not config.no_weight_tying,
        "use_parallel_residual": config.gpt_j_residual,
        "attention_bias": config.use_bias_in_attn_linear,
        "rotary_pct": config.rotary_pct,
        "rotary_emb_base": config.rotary_emb_base,
    }


def _keys(found: Mapping[str, Any], source: str) -> dict[str, Any]:
    """`model_config`, with a UserError for whatever is wrong with the file."""
    try:
        return model_config(found, source)
    except KeyError as error:
        raise UserError(f"{source}: key {error} is missing; the file is not complete") from None
    except (TypeError, ValueError, AttributeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{source}: cannot be used: {error}; give the file of a model") from None


def model_config(found: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Keys of ModelConfig from a GPT-NeoX config.json.

    Raises: UserError for position scaling or an activation that the Transformer blocks lack.
    """
    rope = _plain_rotary(found, source)
    activation = {"swish": "silu"}.get(found.get("hidden_act", "gelu"), found.get("hidden_act", "gelu"))
    if activation not in ("gelu", "relu", "silu"):
        raise UserError(f"{source}: hidden_act '{activation}' is not supported; only gelu (exact), relu and silu are")
    width, inner = found["hidden_size"], found["intermediate_size"]
    get: Callable[..., Any] = found.get
    return {
        "num_layers": found["num_hidden_layers"], "hidden_size": width,
        "num_attention_heads": found["num_attention_heads"], "attention_config": [[["global"], "all"]],
        "seq_length": get("max_position_embeddings", 2048), "padded_vocab_size": found["vocab_size"],
        "intermediate_size": None if inner == 4 * width else inner, "activation": activation, **rope,
        "norm": "layernorm", "layernorm_epsilon": get("layer_norm_eps", 1e-5),
        "no_weight_tying": not is_tied(found, False, source), "gpt_j_residual": get("use_parallel_residual", True),
        "use_bias_in_attn_linear": get("attention_bias", True), "init_method_std": get("initializer_range", 0.02),
        "attention_dropout": get("attention_dropout", 0.0), "hidden_dropout": get("hidden_dropout", 0.0),
    }  # fmt: skip


def _plain_rotary(found: Mapping[str, Any], source: str) -> dict[str, Any]:
    """rotary_pct and rotary_emb_base from the older or the newer spelling."""
    rope = {**(found.get("rope_scaling") or {}), **(found.get("rope_parameters") or {})}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise UserError(f"{source}: rope_type '{kind}' is not supported; only unscaled rotary positions are")
    return {
        "rotary_pct": rope.get("partial_rotary_factor", found.get("rotary_pct", 0.25)),
        "rotary_emb_base": rope.get("rope_theta", found.get("rotary_emb_base", 10000)),
    }
