"""The model of image-text pairs: counts, open_clip's outputs and gradients, and what its own parts do."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file
from torch import Tensor

from megatron.config.sections.clip import ClipConfig
from megatron.config.sections.optimization import OptimizationConfig
from megatron.config.sections.scaling import ScalingConfig
from megatron.errors import UserError
from megatron.growth.grow import grow
from megatron.growth.plan import TokenCounts, describe, grown_config
from megatron.growth.schedule import GrowthSchedule
from megatron.model.build import build_model
from megatron.model.clip_model import NO_TOKEN, ClipModel
from megatron.model.compatibility import check_fit, check_same_model, described_model
from megatron.model.init import InitialTensors
from megatron.model.pattention import named_pattentions
from megatron.mpu.roles import role_of
from megatron.ops.contrastive import contrastive_loss
from megatron.training.state import TrainState
from tests.open_clip_weights import GOLDEN, captions, config_of, open_clip_model, weights_of

SMALL: dict[str, Any] = {
    "num_layers": 2, "hidden_size": 16, "num_attention_heads": 2, "image_size": 8, "patch_size": 4, "in_channels": 1,
    "embed_dim": 6, "qkv_slot_num": 12, "proj_slot_num": 12, "ffn_slot_num": 20, "norm": "layernorm_nonparam",
    "final_norm": "layernorm", "init_method_std": 0.2, "padded_vocab_size": 30,
    "text_tower": {"num_layers": 3, "hidden_size": 8, "ffn_slot_num": 16, "seq_length": 5},
}  # fmt: skip
B16: dict[str, Any] = {"num_layers": 12, "hidden_size": 768, "num_attention_heads": 12, "final_norm": "layernorm"}
B16_TEXT: dict[str, Any] = {"num_layers": 12, "hidden_size": 512, "num_attention_heads": 8}


def slots(width: int, ratio: float = 0.75, feed_forward: float = 3) -> dict[str, int]:
    attention = int(ratio * width)
    return {"qkv_slot_num": attention, "proj_slot_num": attention, "ffn_slot_num": int(feed_forward * width)}


def small(**keys: Any) -> ClipModel:
    model = build_model(ClipConfig(**{**SMALL, **keys}), seed=1)
    assert isinstance(model, ClipModel)
    return model


def pairs() -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(3)
    return torch.randn(4, 1, 8, 8, generator=random), captions(4, 5, 30)[1]


@pytest.mark.parametrize(
    ("keys", "text", "count"),
    [
        ({}, {}, 149_620_737),
        ({"norm": "layernorm_nonparam", **slots(768)}, slots(512), 149_421_057),
        ({"norm": "layernorm_nonparam", **slots(768, 1, 4)}, slots(512, 1, 4), 190_315_521),
    ],
)
def test_base_models_have_as_many_parameters_as_they_should(
    keys: dict[str, Any], text: dict[str, Any], count: int
) -> None:
    config = ClipConfig(**B16, **keys, text_tower={**B16_TEXT, **text}).with_vocabulary(49408)
    assert build_model(config, device="meta").num_parameters() == count


def test_open_clip_had_the_same_outputs_and_gradients() -> None:
    """Of a small model they are in a file."""
    golden = load_file(GOLDEN)
    config = ClipConfig(
        num_layers=2, hidden_size=8, num_attention_heads=2, image_size=8, patch_size=4, embed_dim=6,
        padded_vocab_size=12, text_tower={"num_layers": 1, "seq_length": 5},
    )  # fmt: skip
    model = build_model(config).double()
    model.load_state_dict({n.removeprefix("weights/"): t for n, t in golden.items() if n.startswith("weights/")})
    features = model(golden["images"], golden["ids"])
    for found, name in ((features.image, "image"), (features.text, "text")):
        assert (found - golden[name]).abs().max() <= 1e-12
    loss = contrastive_loss(*features)
    assert loss.item() == pytest.approx(golden["loss"].item(), abs=1e-12)
    loss.backward()
    largest = max(tensor.abs().max() for name, tensor in golden.items() if name.startswith("gradients/"))
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        assert (parameter.grad - golden[f"gradients/{name}"]).abs().max() <= 1e-12 * largest, name


def test_open_clip_has_the_same_outputs_loss_and_gradients() -> None:
    theirs = open_clip_model(
        {"layers": 3, "width": 64, "head_width": 16, "patch_size": 8, "image_size": 32},
        {"layers": 2, "width": 48, "heads": 4, "vocab_size": 100, "context_length": 16}, 32,
    )  # fmt: skip
    from open_clip import ClipLoss

    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-12)):
        theirs = theirs.to(dtype)
        theirs.zero_grad()
        ours = build_model(config_of(theirs, head_width=16)).to(dtype)
        ours.load_state_dict(weights_of(theirs))
        assert ours.num_parameters() == sum(p.numel() for p in theirs.parameters())
        images, (their_ids, ids) = torch.randn(6, 3, 32, 32, dtype=dtype), captions(6, 16, 100)
        expected, found = theirs(images, their_ids), ours(images, ids)
        for a, b in zip(found, expected, strict=True):
            assert (a - b).abs().max() <= tolerance * b.abs().max()
        losses = ClipLoss()(*expected), contrastive_loss(*found)
        assert losses[1].item() == pytest.approx(losses[0].item(), rel=tolerance)
        for loss in losses:
            loss.backward()
        gradients = weights_of(theirs, lambda parameter: parameter.grad)
        largest = max(gradient.abs().max() for gradient in gradients.values())
        for name, parameter in ours.named_parameters():
            assert parameter.grad is not None
            assert (parameter.grad - gradients[name]).abs().max() <= tolerance * largest, name


def test_features_have_length_one() -> None:
    model, (images, ids) = small(), pairs()
    features = model(images, ids)
    for part in features[:2]:
        assert part.norm(dim=1).tolist() == pytest.approx([1] * 4)
    assert features.text.equal(model.text_features(ids)) and features.image.equal(model.image_features(images))


@torch.no_grad()
def test_a_text_is_all_tokens_up_to_its_last_one() -> None:
    model, ids = small(), torch.tensor([[3, 29, 4, NO_TOKEN, NO_TOKEN]])  # the last need not be the highest
    found = model.text_features(ids)
    assert torch.allclose(model.text_features(ids[:, :3]), found, atol=1e-6)
    for place in range(4):
        other = ids.clone()
        other[0, place] = 7
        assert not torch.allclose(model.text_features(other), found, atol=1e-4), place


def test_sixteen_bits_give_features_in_fp32() -> None:
    model = small().bfloat16()
    features = model(*pairs())
    assert [part.dtype for part in features] == [torch.float32] * 3
    assert features.image.norm(dim=1).tolist() == pytest.approx([1] * 4, abs=1e-6)


def test_the_factor_starts_as_said_and_does_not_pass_a_hundred() -> None:
    assert small().get_submodule("logit_scale")().item() == pytest.approx(1 / 0.07)
    model = small(logit_scale_init=2.0)
    scale = model.get_submodule("logit_scale")
    assert scale().item() == pytest.approx(math.e**2)
    with torch.no_grad():
        model.get_parameter("logit_scale.value").fill_(9.0)
    assert scale().item() == pytest.approx(100)


def test_it_starts_as_it_should_and_what_is_added_does_not_decay() -> None:
    config = ClipConfig(**SMALL, output_layer_init_method="wang_init")
    model = build_model(config, seed=1)
    named: dict[str, Tensor] = dict(model.named_parameters())
    # 2 / L / sqrt(d) of each tower: its depth and its width.
    for prefix, std in (("image", 2 / 2 / 16**0.5), ("text", 2 / 3 / 8**0.5)):
        values = torch.cat([t.flatten() for n, t in named.items() if n.startswith(prefix) and "value_tokens" in n])
        assert values.std().item() == pytest.approx(std, rel=0.1), prefix
    vectors = {name for name, parameter in named.items() if role_of(parameter).is_vector}
    assert vectors == {
        "image.embedding.class_token", "image.embedding.positions", "text.embedding.positions", "logit_scale.value",
        *(f"{n}.{part}" for n in ("image.pre_norm", "image.final_norm", "text.final_norm")
          for part in ("weight", "bias")),
    }  # fmt: skip
    again = InitialTensors(build_model(config, device="meta"), config, 1)
    assert all(again.tensor("model", name).equal(parameter) for name, parameter in named.items())


def test_flops_are_those_of_both_towers() -> None:
    config = ClipConfig(**SMALL)
    blocks = {16: 2 * 2 * 16 * (4 * 12 + 20), 8: 3 * 2 * 8 * (4 * 12 + 16)}
    image = 6 * (5 * (blocks[16] + 16 * 16) + 16 * 6) + 12 * 2 * 5 * 5 * 16
    text = 6 * (5 * blocks[8] + 8 * 6) + 6 * 3 * 5 * 5 * 8
    assert build_model(config, device="meta").flops_per_token() * 10 == pytest.approx(image + text)


@pytest.mark.parametrize("tower", ["image", "text", "both", None])
@pytest.mark.parametrize(("new_keys", "tolerance"), [("zero", 1e-6), ("rotated", 1e-5)])
def test_either_tower_grows_without_another_feature(tower: Any, new_keys: Any, tolerance: float) -> None:
    model, (images, ids) = small(), pairs()
    before = model(images, ids)
    grow(model, qkv=28, proj=28, ffn=40, tower=tower, new_keys=new_keys)
    after = model(images, ids)
    for a, b in zip(after, before, strict=True):
        assert (a - b).abs().max() <= tolerance * b.abs().max()
    assert isinstance(model.config, ClipConfig)
    sizes = model.config.image.qkv_slot_num, model.config.text.qkv_slot_num
    assert sizes == (28 if tower != "text" else 12, 28 if tower != "image" else 12)
    for name, layer in named_pattentions(model):
        grown = layer.segment_sizes[1] > 0
        assert len(layer.segment_sizes) == 2 and grown == (tower in ("both", None) or name.startswith(tower)), name
    built = build_model(model.config, device="meta")
    assert {n: p.shape for n, p in built.named_parameters()} == {n: p.shape for n, p in model.named_parameters()}


def test_a_growth_of_a_tower_says_which() -> None:
    config = ClipConfig(**SMALL)
    text = grown_config(config, TokenCounts(ffn=32, tower="text"))
    assert describe(config, text) == "text ffn 16 -> 32 in layers 0 to 2"
    both = grown_config(text, TokenCounts(qkv=32, layers=(0,)))
    assert describe(text, both) == "image qkv 12 -> 32 in layer 0; text qkv 12 -> 32 in layer 0"
    assert both.text_tower.token_segments is not None
    assert both.text_tower.token_segments["ffn"] == [[16, 16, 0]] * 3
    assert ClipConfig(**both.model_dump()) == both


def test_towers_may_grow_at_one_time_one_after_the_other() -> None:
    sizes = {"image": 24, "text": 17}
    growths = [{"at_iteration": 5, "tower": tower, "ffn_slot_num": size} for tower, size in sizes.items()]
    schedule = GrowthSchedule(ScalingConfig(growth=growths), train_iters=9)
    config = ClipConfig(**SMALL)
    grown = schedule.after(config, 2).model
    assert (grown.image.ffn_slot_num, grown.text.ffn_slot_num) == (24, 17)
    schedule.check(config, OptimizationConfig(), 1, TrainState())
    with pytest.raises(UserError, match="text_tower.ffn_slot_num grows by 1 where model_parallel_size is 2"):
        schedule.check(config, OptimizationConfig(), 2, TrainState())
    lineage = [{"scheduled": True}] * 2
    assert schedule.as_saved(config, grown, lineage).model == schedule.as_saved(grown, grown, lineage).model == grown


def test_a_tower_of_transformer_blocks_stays_as_it_is() -> None:
    keys = {**SMALL, "text_tower": {**SMALL["text_tower"], "attention_config": [[["global"], "all"]]}}
    config = ClipConfig(**keys)
    assert set(config.text.layer_kinds) == {"global"} and config.text.qkv_slot_num is None
    grown = grown_config(config, TokenCounts(qkv=20))
    assert (grown.image.qkv_slot_num, grown.text.qkv_slot_num) == (20, None)
    with pytest.raises(UserError, match="the model has no tokenformer blocks"):
        grown_config(config, TokenCounts(qkv=20, tower="text"))


def test_growths_that_cannot_be_name_the_tower() -> None:
    config = ClipConfig(**SMALL)
    with pytest.raises(UserError, match=r"text_tower.ffn_slot_num: 18 is fewer than the 20|ffn_slot_num: 18 is fewer"):
        grown_config(config, TokenCounts(ffn=18))
    with pytest.raises(UserError, match=r"text_tower.ffn_slot_num: 15 is fewer than the 16 tokens of layer 0"):
        grown_config(config, TokenCounts(ffn=15, tower="text"))
    with pytest.raises(UserError, match="layers: 2 is not a tokenformer block"):
        grown_config(config, TokenCounts(ffn=32, layers=(2,), tower="image"))


def test_what_does_not_fit_a_checkpoint_is_blamed_on_its_key() -> None:
    config = ClipConfig(**SMALL)
    tensors = InitialTensors(build_model(config, device="meta"), config, 1)
    for keys, message in (
        ({"text_tower": {**SMALL["text_tower"], "seq_length": 7}}, "text_tower.seq_length: 7 does not fit"),
        ({"text_tower": {**SMALL["text_tower"], "ffn_slot_num": 17}}, "text_tower.ffn_slot_num: 17 does not fit"),
        ({"embed_dim": 7}, "embed_dim: 7 does not fit"),
        ({"padded_vocab_size": 31}, "padded_vocab_size: 31 does not fit"),
        ({"ffn_slot_num": 21}, "[^.]ffn_slot_num: 21 does not fit"),
        ({"pre_norm": False}, "does pre_norm fit it"),
        ({"patch_bias": True}, "does patch_bias fit"),
    ):
        with pytest.raises(UserError, match=message):
            check_fit(described_model(ClipConfig(**{**SMALL, **keys})), tensors, "it")
    other = ClipConfig(**{**SMALL, "text_tower": {**SMALL["text_tower"], "num_layers": 1}})
    with pytest.raises(UserError, match="^text_tower.num_layers: 1 in the configuration, 3 in checkpoint x"):
        check_same_model(other, config, Path("x"))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"text_tower": {"num_attention_heads": 3}}, "text_tower.num_attention_heads: 3 heads do not divide"),
        ({"text_tower": {"token_segments": {"qkv": [[12, 3]] * 2, "proj": [[12, 0]] * 2, "ffn": [[20, 0]] * 2}}},
         "text_tower.token_segments: qkv of 2 blocks with up to 15 tokens"),
        ({"text_tower": {"token_segments": {"qkv": [[12, 0]] * 2, "proj": [[12, 0]] * 2, "ffn": [[20, 0]] * 2}}},
         "token_segments: the image tower has 1 stages of growth, the text tower 2"),
        ({"logit_scale_init": 5.0}, "less than or equal to 4.6"),
    ],
)  # fmt: skip
def test_a_section_that_cannot_be_is_refused(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        ClipConfig(**{**SMALL, **keys})
