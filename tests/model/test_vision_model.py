"""The image classifier: parameter counts, timm's outputs and gradients, and what its own parts do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from megatron.config import load_config
from megatron.config.sections.vision import ImageConfig
from megatron.model.build import build_model
from megatron.model.vision_model import patches
from megatron.mpu.random import drop_path
from megatron.mpu.roles import role_of
from tests.timm_weights import GOLDEN, timm_model, weights_of_timm

CONFIGS = Path(__file__).parents[2] / "configs/vision"
TOKENFORMER: dict[str, Any] = {"norm": "layernorm_nonparam", "final_norm": "layernorm"}
SMALL: dict[str, Any] = {
    "num_layers": 2, "hidden_size": 16, "num_attention_heads": 2, "image_size": 8, "patch_size": 4, "in_channels": 2,
    "num_classes": 5,
}  # fmt: skip


def slots(attention: int, feed_forward: int) -> dict[str, Any]:
    return {"qkv_slot_num": attention, "proj_slot_num": attention, "ffn_slot_num": feed_forward, **TOKENFORMER}


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("B16_matched", 86_447_848), ("B16", 114_759_400), ("L16_matched", 304_007_144), ("L16", 404_670_440),
        ("ViT_B16", 86_567_656), ("ViT_L16", 304_326_632),
    ],
)  # fmt: skip
def test_a_configuration_has_as_many_parameters_as_it_says(name: str, count: int) -> None:
    path = CONFIGS / f"{name}_in1k.yml"
    assert build_model(load_config(path).model, device="meta").num_parameters() == count
    assert f"{count:,}" in path.read_text(encoding="utf-8").splitlines()[0]


def test_the_growth_chain_ends_in_the_larger_model() -> None:
    config, larger = (load_config(CONFIGS / f"{name}_in1k.yml") for name in ("B16_86M_to_115M", "B16"))
    [growth], end = config.scaling.growth, larger.model
    assert build_model(config.model, device="meta").num_parameters() == 86_447_848
    for key in ("qkv_slot_num", "proj_slot_num", "ffn_slot_num"):
        assert getattr(growth, key) == getattr(end, key)
    assert config.optimization == larger.optimization and config.images == larger.images
    assert growth.at_iteration < config.last_iteration == larger.last_iteration


def test_timm_had_the_same_outputs_and_gradients() -> None:
    """Of a small ViT they are in a file."""
    golden = load_file(GOLDEN)
    config = ImageConfig(
        num_layers=2, hidden_size=8, num_attention_heads=2, image_size=8, patch_size=4, in_channels=2, num_classes=5,
        layernorm_epsilon=1e-6,
    )  # fmt: skip
    model = build_model(config).double()
    parts = [name.partition("/") for name in golden]
    model.load_state_dict({name: golden[f"weights/{name}"] for part, _, name in parts if part == "weights"})
    logits = model(golden["images"])
    assert (logits - golden["logits"]).abs().max() <= 1e-12 * golden["logits"].abs().max()
    logits.square().sum().backward()
    largest = max(tensor.abs().max() for name, tensor in golden.items() if name.startswith("gradients/"))
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        assert (parameter.grad - golden[f"gradients/{name}"]).abs().max() <= 1e-12 * largest, name


VITS = [
    ("vit_tiny_patch16_224", {"num_classes": 10}),
    ("vit_tiny_patch16_224", {"num_classes": 10, "global_pool": "avg", "class_token": False}),
    ("vit_tiny_patch16_224", {"num_classes": 10, "global_pool": "avg", "img_size": 32, "in_chans": 1}),
]


@pytest.mark.parametrize(("name", "options"), VITS)
def test_timm_has_the_same_outputs_and_gradients(name: str, options: dict[str, Any]) -> None:
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-12)):
        theirs = timm_model(name, depth=3, **options).to(dtype)
        config, weights = weights_of_timm(theirs)
        ours = build_model(config).to(dtype)
        ours.load_state_dict(weights)
        assert ours.num_parameters() == sum(p.numel() for p in theirs.parameters())
        images = torch.randn(2, config.in_channels, config.image_size, config.image_size, dtype=dtype)
        expected, found = theirs(images), ours(images)
        assert (found - expected).abs().max() <= tolerance * expected.abs().max()
        factor = torch.randn_like(expected)
        (expected * factor).sum().backward()
        (found * factor).sum().backward()
        gradients = weights_of_timm(theirs, lambda parameter: parameter.grad)[1]
        for parameter_name, parameter in ours.named_parameters():
            gradient = gradients[parameter_name]
            # What moves all keys alike leaves attention as it is: their bias has no gradient but rounding.
            scale = max(gradient.abs().max().item(), gradients["head.linear.weight"].abs().max().item())
            assert parameter.grad is not None
            assert (parameter.grad - gradient).abs().max() <= tolerance * scale, parameter_name


def test_patches_are_in_the_order_of_a_convolution() -> None:
    images, weight = torch.randn(2, 3, 8, 12), torch.randn(5, 3, 4, 4)
    expected = torch.nn.functional.conv2d(images, weight, stride=4).flatten(2).transpose(1, 2)
    assert torch.allclose(patches(images, 4) @ weight.flatten(1).T, expected, atol=1e-5)


@pytest.mark.parametrize("activation", ["l2_norm_gelu", "gelu_l2_norm", "softmax"])
def test_every_part_of_an_image_reaches_every_class(activation: str) -> None:
    model = build_model(ImageConfig(**SMALL, **slots(8, 24), norm_activation_type=activation), seed=1)
    images = torch.randn(1, 2, 8, 8, requires_grad=True)
    model(images)[0, 3].backward()
    gradient = images.grad
    assert gradient is not None and (patches(gradient, 4).abs().amax(-1) > 0).all(), "attention is not causal"


def test_it_starts_as_it_should_and_what_is_added_does_not_decay() -> None:
    model = build_model(ImageConfig(**SMALL, **slots(8, 24)), seed=1)
    named: dict[str, Tensor] = dict(model.named_parameters())
    assert not named["embedding.class_token"].any() and not named["head.linear.bias"].any()
    assert 0.01 < named["embedding.positions"].std().item() < 0.03
    assert 0.01 < named["embedding.patches.weight"].std().item() < 0.03
    vectors = {name for name, parameter in named.items() if role_of(parameter).is_vector}
    assert vectors == {
        "embedding.class_token", "embedding.positions", "embedding.patches.bias", "final_norm.weight",
        "final_norm.bias", "head.linear.bias",
    }  # fmt: skip
    # The patches' map and the head are matrices; of five tokens four meet the one, and one the other.
    matrices = sum(parameter.numel() for name, parameter in named.items() if name not in vectors)
    unmet = 4 / 5 * 80 + 1 / 5 * named["embedding.patches.weight"].numel()
    assert model.flops_per_token() == pytest.approx(6 * (matrices - unmet) + 12 * 2 * 5 * 16, rel=1e-12)


def test_drop_path_leaves_out_whole_samples_and_keeps_the_mean() -> None:
    torch.manual_seed(0)
    dropped = drop_path(torch.ones(4000, 2, 3), 0.25, training=True)
    assert (dropped == dropped[:, :1, :1]).all()
    assert dropped.unique().tolist() == pytest.approx([0.0, 4 / 3])
    assert float(dropped.mean()) == pytest.approx(1, abs=0.05)
    assert drop_path(dropped, 0.25, training=False) is dropped
    config = ImageConfig(**{**SMALL, "num_layers": 3}, drop_path_rate=0.2)
    assert [layer.drop_path for layer in build_model(config).layers] == [0.0, 0.1, 0.2]  # type: ignore[union-attr]


def test_drop_path_is_for_training_only() -> None:
    model = build_model(ImageConfig(**SMALL, drop_path_rate=0.9), seed=1)
    images = torch.randn(8, 2, 8, 8)
    assert not torch.equal(model(images), model(images))
    model.eval()
    assert torch.equal(model(images), model(images))
