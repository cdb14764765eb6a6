"""Tiny image models with random weights, in memory and on disk, for the tests of their exchange."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from megatron.checkpoint.pieces import whole_pieces
from megatron.checkpoint.state import EMA, CanonicalState
from megatron.checkpoint.store import RunFolder
from megatron.config.schema import RunConfig
from megatron.config.sections.data import DataConfig
from megatron.config.sections.images import ImagesConfig
from megatron.config.sections.vision import ImageConfig
from megatron.exchange import open_checkpoint
from megatron.model.build import build_model
from megatron.model.fill import fill
from megatron.model.layered import LayeredModel

TOKENS: dict[str, Any] = {
    "qkv_slot_num": 24, "proj_slot_num": 20, "ffn_slot_num": 40, "norm": "layernorm_nonparam",
    "final_norm": "layernorm",
}  # fmt: skip
CLASSES = ["cat", "dog", "green frog", "owl", "newt"]


def image_config(**keys: Any) -> ImageConfig:
    """Two blocks of width 16 on images of 8 x 8 in colour; Transformer blocks without token counts."""
    sizes = {"num_layers": 2, "hidden_size": 16, "num_attention_heads": 2, "image_size": 8, "patch_size": 4}
    return ImageConfig(**{**sizes, "num_classes": len(CLASSES), "init_method_std": 0.3, **keys})


def image_model(**keys: Any) -> LayeredModel:
    """A random one in fp32, biases and vectors included, in eval mode."""
    model = build_model(image_config(**keys), seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def save_run(
    root: Path, model: LayeredModel, data: DataConfig | None = None, average: LayeredModel | None = None, **images: Any
) -> Path:
    """A training checkpoint of iteration 3; its images section has these keys.

    average: whose parameters are the average of the weights.
    """
    config = RunConfig(model=model.config, data=data or DataConfig(), images=ImagesConfig(**images))
    averages = () if average is None else average.named_parameters()
    pieces = whole_pieces({"model": model.state_dict().items(), EMA: ((name, p.detach()) for name, p in averages)})
    return RunFolder(root).save(CanonicalState(3, {}, config.flat(), pieces))


def read_back(path: Path) -> LayeredModel:
    """The model at a path, in fp64."""
    checkpoint = open_checkpoint(path)
    model = build_model(checkpoint.model_config).double()
    fill(model, checkpoint.tensors)
    return model.eval()


def noise(config: ImageConfig, count: int = 3) -> torch.Tensor:
    """Images of the size that a model takes, normalised, in fp64."""
    shape = (count, config.in_channels, config.image_size, config.image_size)
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
