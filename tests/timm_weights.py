"""Vision Transformers of timm, to compare with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from megatron.config.sections.vision import ImageConfig
from tools.bench.with_timm import mend_torchvision


def timm_model(name: str, **options: Any) -> Any:
    """One of timm's models with random weights, biases and norms included; the test is skipped without timm."""
    mend_torchvision()
    timm = pytest.importorskip("timm", reason="timm is not installed (pip install timm==1.0.31)", exc_type=ImportError)
    torch.manual_seed(1)
    model = timm.create_model(name, **options)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def weights_of_timm(
    model: Any, of: Callable[[Any], Tensor] = lambda parameter: parameter.detach()
) -> tuple[ImageConfig, dict[str, Tensor]]:
    """The configuration of a timm model, and its weights (or what `of` makes of them) under the names of ours."""
    blocks, convolution = model.blocks, model.patch_embed.proj
    config = ImageConfig(
        num_layers=len(blocks), hidden_size=model.embed_dim, num_attention_heads=blocks[0].attn.num_heads,
        image_size=model.patch_embed.img_size[0], patch_size=model.patch_embed.patch_size[0],
        in_channels=convolution.in_channels, num_classes=model.num_classes, class_token=model.cls_token is not None,
        global_pool=model.global_pool, layernorm_epsilon=1e-6,
    )  # fmt: skip
    norm = model.norm if config.global_pool == "token" else model.fc_norm
    found = {"embedding.positions": of(model.pos_embed)[0], "embedding.patches.weight": of(convolution.weight)}
    found["embedding.patches.weight"] = found["embedding.patches.weight"].flatten(1)
    found["embedding.patches.bias"] = of(convolution.bias)
    if config.class_token:
        found["embedding.class_token"] = of(model.cls_token)[0]
    modules = {"final_norm": norm, "head.linear": model.head}
    for i, block in enumerate(blocks):
        modules |= {
            f"layers.{i}.input_layernorm": block.norm1, f"layers.{i}.post_attention_layernorm": block.norm2,
            f"layers.{i}.attention.proj": block.attn.proj, f"layers.{i}.mlp.fc_in": block.mlp.fc1,
            f"layers.{i}.mlp.fc_out": block.mlp.fc2,
        }  # fmt: skip
        for part in ("weight", "bias"):
            shares = of(getattr(block.attn.qkv, part)).chunk(3)
            found |= {
                f"layers.{i}.attention.{name}.{part}": share
                for name, share in zip(("query", "key", "value"), shares, strict=True)
            }
    found |= {
        f"{name}.{part}": of(getattr(module, part)) for name, module in modules.items() for part in ("weight", "bias")
    }
    return config, found


GOLDEN = Path(__file__).parent / "fixtures/golden/timm_vit.safetensors"
"""A small ViT of timm in fp64, under our names: weights, an input, and what timm 1.0.31 made of it."""


def write_golden() -> None:
    """Make that file anew: `python -m tests.timm_weights`."""
    model = timm_model("vit_tiny_patch16_224", **SMALL).double()
    images = torch.randn(3, SMALL["in_chans"], SMALL["img_size"], SMALL["img_size"], dtype=torch.float64)
    logits = model(images)
    logits.square().sum().backward()
    _, weights = weights_of_timm(model)
    _, gradients = weights_of_timm(model, lambda parameter: parameter.grad)
    tensors = {f"weights/{name}": tensor for name, tensor in weights.items()}
    tensors |= {f"gradients/{name}": tensor for name, tensor in gradients.items()}
    tensors |= {"images": images, "logits": logits.detach()}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, GOLDEN)


SMALL: dict[str, Any] = {
    "img_size": 8, "patch_size": 4, "in_chans": 2, "num_classes": 5, "embed_dim": 8, "depth": 2, "num_heads": 2,
}  # fmt: skip

if __name__ == "__main__":
    write_golden()
