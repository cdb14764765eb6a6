"""timm's config.json, to a model section and back.

Only part of what a model of timm is can be told from it: the architecture is a name, behind which timm has arguments
of its own, and model_args are those that differ. So sizes are read from the tensors, and names are known here of those
architectures that are plain Vision Transformers.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from megatron.config.mistakes import config_error
from megatron.config.sections.images import ImagesConfig
from megatron.config.sections.model import TOKENFORMER
from megatron.config.sections.vision import ImageConfig
from megatron.errors import UserError
from megatron.exchange.huggingface_weights import Weights
from megatron.log import get_logger
from megatron.text import shortened

_EPSILON = 1e-6
"""Of the layer norms in timm's Vision Transformers."""
_SIZES = {
    "tiny": (192, 3), "small": (384, 6), "base": (768, 12), "large": (1024, 16), "huge": (1280, 16),
    "giant": (1408, 16), "gigantic": (1664, 16),
}  # fmt: skip
"""Width and heads of the plain architectures."""
_PLAIN = re.compile(rf"(?:vit|deit)_({'|'.join(_SIZES)})_patch\d+_\d+")
# Arguments that the tensors tell too, that are read below, or that only matter to training.
_TOLD = {
    "img_size", "patch_size", "in_chans", "num_classes", "embed_dim", "depth", "num_heads", "mlp_ratio", "qkv_bias",
    "proj_bias", "class_token", "global_pool", "fc_norm", "final_norm", "pos_embed", "act_layer", "dynamic_img_size",
    "strict_img_size", "pre_norm", "drop_rate", "pos_drop_rate", "patch_drop_rate", "proj_drop_rate", "attn_drop_rate",
    "drop_path_rate", "weight_init", "fix_init",
}  # fmt: skip
_ACTIVATIONS = {"gelu": "gelu", "relu": "relu", "silu": "silu", "swish": "silu"}


def read_model(found: Mapping[str, Any], weights: Weights, source: Path) -> ImageConfig:
    """The model section of a config.json and its tensors. Raises UserError for what it cannot say.

    source: the file, for messages.
    """
    arguments = _table(found, "model_args")
    for name, value in arguments.items():
        if name not in _TOLD and value:
            raise UserError(f"{source}: model_args: there is no place here for {shortened(name)}: {shortened(value)}")
    pool = arguments.get("global_pool") or found.get("global_pool") or "token"
    if pool not in ("token", "avg"):
        raise UserError(f"{source}: global_pool: {shortened(pool)} is not supported; token and avg are")
    if pool == "avg" and "norm.weight" in weights.files:
        raise UserError(f"{source}: global_pool: avg of tokens that are normalised before it is not supported")
    activation = arguments.get("act_layer") or "gelu"
    if not isinstance(activation, str) or activation not in _ACTIVATIONS:
        raise UserError(f"{source}: act_layer: {shortened(activation)} is not supported; gelu, relu and silu are")
    sizes = _sizes(weights, source.parent)
    keys = {**sizes, "num_attention_heads": _heads(found, sizes["hidden_size"], source), "global_pool": pool}
    try:
        return ImageConfig(**{**keys, "activation": _ACTIVATIONS[activation], "layernorm_epsilon": _EPSILON})
    except ValidationError as error:
        raise config_error(error, str(source)) from None


def _table(found: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    told = found.get(key)
    return told if isinstance(told, dict) else {}


def _sizes(weights: Weights, folder: Path) -> dict[str, Any]:
    """What the shapes of the tensors tell. Raises UserError for a model without them, or of another kind."""

    def shape(name: str, dimensions: int) -> tuple[int, ...]:
        if name not in weights.files:
            raise UserError(f"{folder}: has no tensor {name}; give a Vision Transformer with its classifier")
        if len(found := weights.shape(name)) != dimensions or 0 in found:
            raise UserError(f"{folder}: {name} has shape {list(found)}; give a plain Vision Transformer")
        return found

    width, channels, patch, other = shape("patch_embed.proj.weight", 4)
    tokens, class_token = shape("pos_embed", 3)[1], "cls_token" in weights.files
    side = math.isqrt(tokens - class_token)
    if side * side != tokens - class_token or patch != other:
        what = f"{tokens} positions {'with' if class_token else 'without'} a class token, patches of {patch} x {other}"
        raise UserError(f"{folder}: pos_embed: {what}: not of a square image, or the class token has no position")
    inner, columns = shape("blocks.0.mlp.fc1.weight", 2)[0], shape("blocks.0.mlp.fc2.weight", 2)[1]
    if inner == 2 * columns:
        raise UserError(f"{folder}: blocks.0.mlp.fc1: SwiGLU, a feed-forward with gates, has no place here")
    shape("blocks.0.attn.qkv.bias", 1)
    blocks = {name.split(".")[1] for name in weights.files if name.startswith("blocks.")}
    return {
        "num_layers": len(blocks), "hidden_size": width, "image_size": side * patch, "patch_size": patch,
        "in_channels": channels, "num_classes": shape("head.weight", 2)[0], "class_token": class_token,
        "patch_bias": "patch_embed.proj.bias" in weights.files, "pre_norm": "norm_pre.weight" in weights.files,
        "intermediate_size": None if inner == 4 * width else inner,
    }  # fmt: skip


def _heads(found: Mapping[str, Any], width: int, source: Path) -> int:
    """Number of heads, which no tensor tells. Raises UserError where nothing does."""
    told, name = _table(found, "model_args").get("num_heads"), found.get("architecture")
    match = _PLAIN.fullmatch(str(name))
    if match and isinstance(told, int):
        return told
    if match is None or _SIZES[match[1]][0] != width:
        reason = f"{shortened(name)} of width {width} is no plain Vision Transformer that is known"
        raise UserError(f"{source}: architecture: {reason}; say what it is in a YAML file (--config)")
    return _SIZES[match[1]][1]


def read_preprocessing(found: Mapping[str, Any], source: Path) -> ImagesConfig:
    """How images are made ready for the model. What there is no key for here is told by a line in the log."""
    told = _table(found, "pretrained_cfg")
    for key, ours in (("interpolation", "bicubic"), ("crop_mode", "center")):
        if told.get(key, ours) != ours:
            get_logger().warning("%s: %s: %s; it is %s here", source, key, shortened(told[key]), ours)
    keys = {"crop_pct": told.get("crop_pct"), "image_mean": told.get("mean"), "image_std": told.get("std")}
    try:
        return ImagesConfig(**{key: value for key, value in keys.items() if value is not None})
    except ValidationError as error:
        raise config_error(error, f"{source}: pretrained_cfg") from None


def read_labels(found: Mapping[str, Any]) -> list[object]:
    """Names of the classes; [] where there are none."""
    told = found.get("label_names") or _table(found, "pretrained_cfg").get("label_names")
    if isinstance(told, dict):
        told = [told.get(str(number)) for number in range(len(told))]
    return told if isinstance(told, list) else []


def require_expressible(config: ImageConfig) -> None:
    """Raise a UserError that names the key for which timm's Vision Transformer has no place."""
    norms = sorted({config.norm, config.final_norm_kind})
    reasons = {
        "attention_config: timm has no parameter tokens, only Transformer blocks": TOKENFORMER in config.layer_kinds,
        f"norm: timm's are layernorm, these {' and '.join(norms)}": norms != ["layernorm"],
        f"layernorm_epsilon: timm's is {_EPSILON:g}": config.layernorm_epsilon != _EPSILON,
        "gpt_j_residual: timm's blocks have the feed-forward after attention": config.gpt_j_residual,
        "use_bias_in_attn_linear: timm's projections have biases": not config.use_bias_in_attn_linear,
        "patch_bias: timm's patches have a bias without pre_norm, and none with it": config.patch_bias
        == config.pre_norm,
    }
    for reason, holds in reasons.items():
        if holds:
            raise UserError(f"{reason}; use to-hf")


def described(config: ImageConfig, images: ImagesConfig, names: list[str] | None) -> dict[str, Any]:
    """config.json: an architecture that timm knows, and in model_args all in which this model may differ from it."""
    width, inner = config.hidden_size, config.intermediate_size or 4 * config.hidden_size
    word = next((word for word, (known, _) in _SIZES.items() if known == width and known <= 1024), "base")
    ratio = inner / width
    mean, std = images.normalisation(config.in_channels)
    return {
        "architecture": f"vit_{word}_patch16_224",
        "num_classes": config.num_classes,
        "num_features": width,
        "global_pool": config.global_pool,
        **({"label_names": names} if names else {}),
        "model_args": {
            "img_size": config.image_size, "patch_size": config.patch_size, "in_chans": config.in_channels,
            "embed_dim": width, "depth": config.num_layers, "num_heads": config.num_attention_heads,
            "mlp_ratio": ratio if int(width * ratio) == inner else (inner + 0.5) / width,  # timm rounds down
            "class_token": config.class_token, "global_pool": config.global_pool, "act_layer": config.activation,
            "pre_norm": config.pre_norm,
        },
        "pretrained_cfg": {
            "input_size": [config.in_channels, config.image_size, config.image_size], "fixed_input_size": True,
            "interpolation": "bicubic", "crop_pct": images.crop_pct, "crop_mode": "center", "mean": list(mean),
            "std": list(std), "num_classes": config.num_classes, "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
    }  # fmt: skip
