"""The official code's models: a flat `pytorch_model.bin`, or a training folder (megatron.exchange.official_folder).

Official name, sequential or pipeline spelling                            canonical name
    [sequential.]0.word_embeddings.weight                                 embedding.word_embeddings.weight
    tied_modules.embed.word_embeddings.weight                             the same
    [sequential.]{i + 2}.attention.query.key_param_tokens                 layers.{i}.attention.query.key_tokens_0
    [sequential.]{i + 2}.{input,post_attention}_layernorm.weight          layers.{i}.(the same)
    [sequential.]{L + 3}.norm.weight                                      final_norm.weight
    [sequential.]{L + 4}.final_linear.weight                              head.final_linear.weight

Files hold tensors only: the architecture comes from a configuration. tau is always the root of the number of tokens.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from megatron.checkpoint.new_folder import new_folder
from megatron.config.schema import RunConfig
from megatron.config.sections.model import ModelConfig, ModelSection, language_section
from megatron.errors import UserError
from megatron.exchange.checkpoint import CheckedTensors, Checkpoint, weight_fault
from megatron.exchange.joined import JoinedTensors, joined_config
from megatron.exchange.names import EMBEDDING, TAU, is_parameter, projection_of
from megatron.exchange.official_folder import FLAT_FILE, find_official_folder, read_official_folder
from megatron.exchange.torch_file import read_flat_file
from megatron.model.compatibility import check_fit, described_model

# Positions in the official list of layers: 0 embedding, 1 a reshaping lambda, then the blocks.
_FIRST_BLOCK = 2
_OFFICIAL_TOKENS, _CANONICAL_TOKENS = re.compile(r"(key|value)_param_tokens$"), re.compile(r"(key|value)_tokens_0$")
# Rotary frequencies follow from the configuration; the official code saves them where it is told to.
_DERIVED = ".rotary_emb.inv_freq"
# Queries, keys and values in one: what GPT-NeoX's own Transformer has, and no model of the official code.
_NEOX_ONLY = "attention.query_key_value"


def matches(path: Path, iteration: int | None = None, key: str = "load") -> Path | None:
    """`path` if it is a file, which then has to be a flat one, or the official folder meant by it; None if none is."""
    return path if os.path.isfile(path) else find_official_folder(path, iteration)


def open(path: Path, config: RunConfig | ModelSection | None = None, key: str = "load") -> Checkpoint:
    """An official model, in the dtype of its file.

    Args:
        config: its architecture; how many tokens its layers have is read from the tensors.

    Raises: UserError, which starts with `key`, without a configuration, and where file and configuration do not fit.
    """
    if config is None:
        raise UserError(
            f"{key}: {path} holds tensors only; give the YAML configuration of its model too (--config YAML)"
        )
    described = language_section(config.model if isinstance(config, RunConfig) else config)
    flat = read_flat_file(path, key) if path.is_file() else read_official_folder(path, key)
    if any(_NEOX_ONLY in name for name in flat):
        raise UserError(
            f"{key}: {path} is a model of GPT-NeoX itself (it has {_NEOX_ONLY}); convert it with its "
            "tools/ckpts/convert_neox_to_hf.py, and name the folder that this writes"
        )
    tensors = _OfficialTensors(to_canonical(flat, described.num_layers, path, key), f"{key}: {path}")
    model_config = _with_counts_of(described, tensors, f"{key}: {path}")
    check_fit(described_model(model_config), tensors, f"{key}: {path}")
    if not isinstance(config, RunConfig):
        return Checkpoint(path, model_config, tensors)
    settings = {**config.flat(), **model_config.model_dump(mode="json")}
    return Checkpoint(path, model_config, tensors, settings, find_tokenizer=lambda: config.tokenizer)


class _OfficialTensors(CheckedTensors):
    """Tensors under canonical names, and the tau_tokens that the official code would take."""

    def __init__(self, tensors: Mapping[str, Tensor], where: str) -> None:
        super().__init__(where)
        keys = [name for name in tensors if name.endswith(".key_tokens_0")]
        taus = {name.replace("key_tokens_0", TAU): torch.tensor(len(tensors[name])) for name in keys}
        self._tensors = {**tensors, **taus}

    def names(self, kind: str) -> list[str]:
        """Names of the model's tensors, as the file lists them."""
        return list(self._tensors) if kind == "model" else []

    def shape(self, kind: str, name: str) -> tuple[int, ...]:
        """Full shape of a tensor."""
        return tuple(self._tensors[name].shape)

    def _stored(self, name: str) -> Tensor:
        return self._tensors[name]


def _with_counts_of(config: ModelConfig, tensors: _OfficialTensors, where: str) -> ModelConfig:
    """The configuration with the numbers of tokens, and where it has none of embedding rows, that the tensors have."""
    names = tensors.names("model")
    rows = tensors.shape("model", EMBEDDING)[0] if EMBEDDING in names else 0
    if not rows:
        raise UserError(f"{where} has no tensor {EMBEDDING} with values; give the file of a whole model")
    found: dict[str, int] = {}
    for layer, count in JoinedTensors(tensors).token_counts().items():
        found.setdefault(f"{projection_of(layer)}_slot_num", count)
    if 0 in found.values():
        raise UserError(f"{where} has a layer without tokens; give a model that is whole")
    return config.replaced(padded_vocab_size=config.padded_vocab_size or rows, token_segments=None, **found)


def write(target: str | Path, checkpoint: Checkpoint) -> Path:
    """Write the official code's flat file, `target`/pytorch_model.bin, in fp32; complete or not at all.

    Raises: UserError for what that file cannot say: Transformer blocks, several row norms in a layer, and a tau other
        than the root of the number of tokens, which the official code always takes.
    """
    tensors = official_tensors(checkpoint)
    with new_folder(target) as temporary:
        torch.save({name: tensor.float() for name, tensor in tensors.items()}, temporary / FLAT_FILE)
    return Path(target) / FLAT_FILE


def official_tensors(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """The official code's flat dictionary, in the checkpoint's dtype; UserError where it cannot hold the model."""
    tensors = JoinedTensors(checkpoint.tensors)
    if checkpoint.language.segment_norms is not None:
        raise UserError(
            "row_norm: tokens of this model have row norms of their own; the official flat file cannot say so, and its "
            "code would compute another function; use to-hf"
        )
    config = joined_config(checkpoint.language, tensors)
    if set(config.layer_kinds) != {"tokenformer"}:
        raise UserError("attention_config: the official flat file holds TokenFormer blocks only; use to-hf")
    for layer, count in tensors.token_counts().items():
        tau = int(tensors.tensor("model", f"{layer}.{TAU}"))
        if tau != count:
            raise UserError(
                f"{layer}: has {count} tokens and tau^2 = {tau}; the official flat file cannot say so, and "
                "its code would compute another function; use to-hf"
            )
    names = filter(is_parameter, tensors.names("model"))
    return {official_name(name, config.num_layers): tensors.tensor("model", name).contiguous() for name in names}


def canonical_name(official: str, num_layers: int) -> str | None:
    """The canonical name of an official one; None for a name that no model of this depth has."""
    name = official.removeprefix("sequential.")
    if name.startswith("tied_modules.embed."):
        return "embedding." + name.removeprefix("tied_modules.embed.")
    position, _, rest = name.partition(".")
    if not position.isdecimal() or not rest:
        return None
    index = int(position)
    if index == 0:
        return f"embedding.{rest}"
    if _FIRST_BLOCK <= index < _FIRST_BLOCK + num_layers:
        return f"layers.{index - _FIRST_BLOCK}." + _OFFICIAL_TOKENS.sub(r"\1_tokens_0", rest)
    if index == num_layers + 3 and rest.startswith("norm."):
        return "final_norm." + rest.removeprefix("norm.")
    if index == num_layers + 4:
        return f"head.{rest}"
    return None


def official_name(canonical: str, num_layers: int) -> str:
    """The official name of a canonical one; the inverse of `canonical_name`."""
    part, _, rest = canonical.partition(".")
    if part == "layers":
        number, _, rest = rest.partition(".")
        return f"sequential.{int(number) + _FIRST_BLOCK}." + _CANONICAL_TOKENS.sub(r"\1_param_tokens", rest)
    prefixes = {"embedding": "0.", "final_norm": f"{num_layers + 3}.norm.", "head": f"{num_layers + 4}."}
    return f"sequential.{prefixes[part]}{rest}"


def to_canonical(flat: Mapping[str, Tensor], num_layers: int, path: str | Path, key: str) -> dict[str, Tensor]:
    """Rename an official flat dictionary; UserError names a tensor that is no weight of a model of this depth."""
    renamed: dict[str, Tensor] = {}
    for official, tensor in flat.items():
        if official.endswith(_DERIVED):
            continue
        name = canonical_name(official, num_layers)
        if name is None:
            raise UserError(f"{key}: {path} has a tensor '{official}' that a model with num_layers {num_layers} lacks")
        if fault := weight_fault(tensor):
            raise UserError(f"{key}: {path}: the tensor '{official}' {fault}")
        if name in renamed and not (renamed[name].dtype == tensor.dtype and torch.equal(renamed[name], tensor)):
            raise UserError(f"{key}: {path} has two different tensors for {name}, one of them '{official}'")
        if not tensor.ndim:
            raise UserError(f"{key}: {path}: the tensor '{official}' is a single number; weights have dimensions")
        renamed[name] = tensor
    return renamed
