"""Models of open_clip, to compare with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from megatron.config.sections.clip import ClipConfig
from tests.with_timm import mend_torchvision

_NORMS = {"ln_1": "input_layernorm", "ln_2": "post_attention_layernorm"}
_LINEAR = {"attn.out_proj": "attention.proj", "mlp.c_fc": "mlp.fc_in", "mlp.c_proj": "mlp.fc_out"}


def need_open_clip() -> Any:
    """The package; the test is skipped where it is not installed (requirements/requirements-vision-dev.txt)."""
    mend_torchvision()
    reason = "open_clip is not installed: requirements/requirements-vision-dev.txt"
    return pytest.importorskip("open_clip", reason=reason, exc_type=ImportError)


def open_clip_model(vision: dict[str, Any], text: dict[str, Any], embed_dim: int) -> Any:
    """One of its models with random weights, biases and norms included."""
    need_open_clip()
    from open_clip.model import CLIP

    torch.manual_seed(1)
    model = CLIP(embed_dim, vision, text).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def config_of(model: Any, head_width: int) -> ClipConfig:
    """The configuration of an open_clip model."""
    visual, text = model.visual, model.transformer
    return ClipConfig(
        num_layers=len(visual.transformer.resblocks), hidden_size=visual.conv1.out_channels,
        num_attention_heads=visual.conv1.out_channels // head_width, image_size=visual.image_size[0],
        patch_size=visual.patch_size[0], in_channels=visual.conv1.in_channels, embed_dim=visual.proj.shape[1],
        padded_vocab_size=model.token_embedding.num_embeddings,
        text_tower={
            "num_layers": len(text.resblocks), "hidden_size": text.width,
            "num_attention_heads": text.resblocks[0].attn.num_heads, "seq_length": model.context_length,
        },
    )  # fmt: skip


def weights_of(model: Any, of: Callable[[Any], Tensor] = lambda parameter: parameter.detach()) -> dict[str, Tensor]:
    """The weights of an open_clip model (or what `of` makes of them) under the names of ours."""
    visual = model.visual
    found = {
        "image.embedding.patches.weight": of(visual.conv1.weight).flatten(1),
        "image.embedding.class_token": of(visual.class_embedding)[None],
        "image.embedding.positions": of(visual.positional_embedding),
        "image.projection.linear.weight": of(visual.proj).T,
        "text.embedding.word_embeddings.weight": of(model.token_embedding.weight),
        "text.embedding.positions": of(model.positional_embedding),
        "text.projection.linear.weight": of(model.text_projection).T,
        "logit_scale.value": of(model.logit_scale)[None],
    }
    modules = {"image.pre_norm": visual.ln_pre, "image.final_norm": visual.ln_post, "text.final_norm": model.ln_final}
    for tower, blocks in (("image", visual.transformer.resblocks), ("text", model.transformer.resblocks)):
        for i, block in enumerate(blocks):
            prefix = f"{tower}.layers.{i}"
            modules |= {f"{prefix}.{ours}": block.get_submodule(name) for name, ours in (_NORMS | _LINEAR).items()}
            for part in ("weight", "bias"):
                shares = of(getattr(block.attn, f"in_proj_{part}")).chunk(3)
                names = (f"{prefix}.attention.{name}.{part}" for name in ("query", "key", "value"))
                found |= dict(zip(names, shares, strict=True))
    return found | {
        f"{name}.{part}": of(getattr(module, part)) for name, module in modules.items() for part in ("weight", "bias")
    }


def captions(rows: int, length: int, vocabulary: int) -> tuple[Tensor, Tensor]:
    """Random texts as open_clip takes them [rows, length], the highest id ending each, zeros behind; as ours does."""
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(1, vocabulary - 1, (rows, length), generator=generator)
    ends = torch.randint(1, length, (rows, 1), generator=generator)
    ends[0] = length - 1
    places = torch.arange(length)
    ids = torch.where(places == ends, vocabulary - 1, ids)
    return torch.where(places > ends, 0, ids), torch.where(places > ends, -1, ids)


GOLDEN = Path(__file__).parent / "fixtures/golden/open_clip.safetensors"
"""A small model of open_clip in fp64, under our names: weights, inputs, and what open_clip 3.3.0 made of them."""

SMALL: tuple[dict[str, Any], dict[str, Any], int] = (
    {"layers": 2, "width": 8, "head_width": 4, "patch_size": 4, "image_size": 8},
    {"layers": 1, "width": 8, "heads": 2, "vocab_size": 12, "context_length": 5},
    6,
)


def write_golden() -> None:
    """Make that file anew: `python -m tests.open_clip_weights`."""
    model = open_clip_model(*SMALL).double()
    images, (theirs, ours) = torch.randn(4, 3, 8, 8, dtype=torch.float64), captions(4, 5, 12)
    image, text, scale = model(images, theirs)
    from open_clip import ClipLoss

    loss = ClipLoss()(image, text, scale)
    loss.backward()
    tensors = {f"weights/{name}": tensor for name, tensor in weights_of(model).items()}
    tensors |= {f"gradients/{name}": tensor for name, tensor in weights_of(model, lambda p: p.grad).items()}
    tensors |= {"images": images, "ids": ours, "image": image.detach(), "text": text.detach(), "loss": loss.detach()}
    save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, GOLDEN)


if __name__ == "__main__":
    write_golden()
