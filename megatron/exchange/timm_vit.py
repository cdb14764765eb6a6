"""Vision Transformers of timm: a folder as on its hub (config.json, model.safetensors), or a file of weights alone.

timm                                            canonical name
    cls_token [1, 1, d], pos_embed [1, T, d]        embedding.{class_token [1, d], positions [T, d]}
    patch_embed.proj, a convolution [d, c, p, p]    embedding.patches [d, c p p]
    blocks.{i}.norm1, norm2                         layers.{i}.{input,post_attention}_layernorm
    blocks.{i}.attn.qkv, rows [3, d]                layers.{i}.attention.{query,key,value}
    blocks.{i}.attn.proj, mlp.fc1, mlp.fc2          layers.{i}.attention.proj, mlp.fc_in, mlp.fc_out
    norm_pre                                        pre_norm
    norm (of the class token), fc_norm (of a mean)  final_norm
    head                                            head.linear

timm's mean is normalised after it is taken, as here, where its name is fc_norm.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron.checkpoint.new_folder import new_folder
from megatron.checkpoint.tensors import Tensors
from megatron.config.schema import RunConfig
from megatron.config.sections.images import ImagesConfig
from megatron.config.sections.model import ModelSection
from megatron.config.sections.vision import ImageConfig
from megatron.errors import UserError
from megatron.exchange import timm_config
from megatron.exchange.checkpoint import CheckedTensors, Checkpoint
from megatron.exchange.huggingface_folder import CONFIG, require_fit
from megatron.exchange.huggingface_weights import Weights, read_json, write_json, write_weights
from megatron.exchange.images import class_names_in, image_section, image_settings, samples_of
from megatron.model.compatibility import described_model
from megatron.text import shortened

_PARTS = {
    "norm1": "input_layernorm", "norm2": "post_attention_layernorm", "attn.proj": "attention.proj",
    "mlp.fc1": "mlp.fc_in", "mlp.fc2": "mlp.fc_out",
}  # fmt: skip
_ENDS = {
    "patch_embed.proj": "embedding.patches", "norm_pre": "pre_norm", "norm": "final_norm", "fc_norm": "final_norm",
    "head": "head.linear",
}  # fmt: skip
_WHOLE = {"cls_token": "embedding.class_token", "pos_embed": "embedding.positions"}
_BLOCK = re.compile(r"blocks\.(\d{1,9})\.(.+)\.(weight|bias)")
_FUSED, _QKV = "attn.qkv", ("query", "key", "value")
_SPLIT = re.compile(r"(layers\.\d+\.)attention\.(query|key|value)\.(weight|bias)")

_ONE_FILE = 1 << 62
"""Bytes of weights in a file: timm reads no others."""

_FOREIGN = {
    r"dist_token|head_dist\..*": "a distilled model (DeiT): a second class token and head",
    r"reg_token": "register tokens",
    r".*\.(ls\d?|gamma_?\d?)(\..*)?": "LayerScale",
    r".*\.(q_norm|k_norm|attn\.norm|mlp\.norm)\..*": "further norms in a block",
    r".*\.mlp\.(fc1_g|fc1_x|w12|w1|w2|w3)\..*": "SwiGLU, a feed-forward with gates",
    r"attn_pool\..*": "pooling by attention",
    r".*\.(attns|ffns)\..*": "blocks side by side",
}  # fmt: skip
"""What there is in other models of timm, by the names of its tensors."""


def matches(path: Path, iteration: int | None = None, key: str = "load") -> Path | None:
    """`path` if it is a folder whose config.json names one of timm's architectures, or a .safetensors file."""
    if os.path.isfile(path):
        return path if path.suffix == ".safetensors" else None
    if not os.path.isfile(path / CONFIG):
        return None
    found = read_json(path / CONFIG)
    return path if isinstance(found.get("architecture"), str) and "architectures" not in found else None


def open(path: Path, config: RunConfig | ModelSection | None = None, key: str = "load") -> Checkpoint:
    """A Vision Transformer of timm: a folder, which says for itself what it is, or a file of weights, which does not.

    Args and errors: those of `read`.
    """
    return read(path, config if path.is_file() else None, key)


def read(path: Path, config: RunConfig | ModelSection | None, key: str) -> Checkpoint:
    """A Vision Transformer of timm. Fused tensors are split as they are read.

    Args:
        config: what the model is, in the place of config.json.

    Raises: UserError for a model that is damaged, or has what the Vision Transformer here has not.
    """
    if config is None and path.is_file():
        raise UserError(f"{key}: {path} holds tensors only; give the YAML configuration of its model too (--config)")
    weights = Weights(path)
    tensors = _TimmTensors(weights, str(path))
    if config is not None:
        model = image_section(config)
        require_fit(model, tensors, path, path)
        return Checkpoint(path, model, tensors, _settings(config, model))
    source = path / CONFIG
    found = read_json(source)
    model, images = timm_config.read_model(found, weights, source), timm_config.read_preprocessing(found, source)
    require_fit(model, tensors, path, source)
    names = class_names_in(timm_config.read_labels(found), model.num_classes, source)
    return Checkpoint(path, model, tensors, image_settings(model, images), find_class_names=lambda: names)


def _settings(config: RunConfig | ModelSection, model: ImageConfig) -> dict[str, Any]:
    return config.flat() if isinstance(config, RunConfig) else image_settings(model, ImagesConfig())


def write(target: str | Path, checkpoint: Checkpoint, dtype: torch.dtype | None = None) -> None:
    """Write a folder as timm's hub has it, which `timm.create_model("local-dir:FOLDER", pretrained=True)` loads.

    Args:
        target: must not exist or be empty.
        checkpoint: of an image model of Transformer blocks.
        dtype: of the parameters in the files; default the checkpoint's.

    Raises: UserError for what timm's Vision Transformer cannot say, naming the key.
    """
    config = image_section(checkpoint.model_config)
    timm_config.require_expressible(config)
    described = timm_config.described(config, samples_of(checkpoint), checkpoint.class_names)
    tensors = timm_tensors(checkpoint.tensors, config)
    with new_folder(target) as folder:
        cast = ((name, tensor.to(dtype or tensor.dtype)) for name, tensor in tensors)
        write_weights(folder, cast, _ONE_FILE, metadata=None)  # as timm writes it, to the byte
        write_json(folder / CONFIG, described)


def canonical_names(name: str) -> list[str]:
    """Canonical names of what a tensor of timm holds: three of a fused one, none of what there is no place for."""
    stem, _, last = name.rpartition(".")
    if name in _WHOLE:
        return [_WHOLE[name]]
    if stem in _ENDS and last in ("weight", "bias"):
        return [f"{_ENDS[stem]}.{last}"]
    if (match := _BLOCK.fullmatch(name)) is None:
        return []
    layer, part = f"layers.{int(match[1])}", match[2]
    if part == _FUSED:
        return [f"{layer}.attention.{one}.{last}" for one in _QKV]
    return [f"{layer}.{_PARTS[part]}.{last}"] if part in _PARTS else []


class _TimmTensors(CheckedTensors):
    """A model of timm under canonical names, each tensor in our shape, in the order of the file."""

    def __init__(self, weights: Weights, where: str) -> None:
        super().__init__(where)
        self._weights, self._origins = weights, dict[str, str]()
        for theirs in weights.files:
            names = canonical_names(theirs)
            if not names:
                raise UserError(f"{where}: {shortened(theirs)}: {_foreign(theirs)}, which there is no place for here")
            for name in names:
                if name in self._origins:
                    raise UserError(f"{where}: has two tensors for {name}: {self._origins[name]} and {theirs}")
                self._origins[name] = theirs

    def names(self, kind: str) -> list[str]:
        """Canonical names of the model's tensors."""
        return list(self._origins) if kind == "model" else []

    def shape(self, kind: str, name: str) -> tuple[int, ...]:
        """Full shape of a tensor."""
        shape = self._weights.shape(self._origins[name])
        if _SPLIT.fullmatch(name) and shape and shape[0] % 3 == 0:
            return (shape[0] // 3, *shape[1:])
        if name == "embedding.patches.weight" and len(shape) == 4:
            return shape[0], math.prod(shape[1:])
        return shape[1:] if name in _WHOLE.values() and shape[:1] == (1,) else shape

    def _stored(self, name: str) -> Tensor:
        stored = self._weights.tensor(self._origins[name])
        if split := _SPLIT.fullmatch(name):
            return stored.chunk(3)[_QKV.index(split[2])].clone()
        return stored.reshape(self.shape("model", name))


def _foreign(name: str) -> str:
    return next((what for pattern, what in _FOREIGN.items() if re.fullmatch(pattern, name)), "no part of a plain ViT")


def timm_tensors(tensors: Tensors, config: ImageConfig) -> Iterator[tuple[str, Tensor]]:
    """Canonical tensors under timm's names and in its shapes, query, key and value fused."""
    parts = {ours: theirs for theirs, ours in _PARTS.items()}
    ends = {ours: theirs for theirs, ours in _ENDS.items()}
    ends["final_norm"] = "norm" if config.global_pool == "token" else "fc_norm"
    whole = {ours: theirs for theirs, ours in _WHOLE.items()}
    for name in described_model(config).state_dict():
        stem, _, last = name.rpartition(".")
        if (split := _SPLIT.fullmatch(name)) is not None:
            if split[2] == "query":
                fused = [tensors.tensor("model", f"{split[1]}attention.{one}.{last}") for one in _QKV]
                yield f"{split[1].replace('layers', 'blocks')}{_FUSED}.{last}", torch.cat(fused)
        elif name in whole:
            yield whole[name], tensors.tensor("model", name)[None]
        elif name == "embedding.patches.weight":
            convolution = (config.in_channels, config.patch_size, config.patch_size)
            yield f"{ends[stem]}.weight", tensors.tensor("model", name).unflatten(1, convolution)
        elif stem in ends:
            yield f"{ends[stem]}.{last}", tensors.tensor("model", name)
        else:
            _, number, part = stem.split(".", 2)
            yield f"blocks.{number}.{parts[part]}.{last}", tensors.tensor("model", name)
