"""Vision Transformers of timm, there and back."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron.config.sections.vision import ImageConfig
from megatron.errors import UserError, run_command
from megatron.exchange import open_checkpoint
from megatron.exchange.convert import from_timm, to_timm
from tests.exchange.image_models import CLASSES, TOKENS, image_model, noise, read_back, save_run
from tests.timm_weights import timm_model
from tools.ckpts.convert import main

FILE = "model.safetensors"
SMALL: dict[str, Any] = {"img_size": 32, "depth": 2, "num_classes": 5}


def saved_by_timm(model: Any, folder: Path, arguments: dict[str, Any]) -> Path:
    """The model as timm writes it for its hub."""
    from timm.models import save_for_hf

    save_for_hf(model, folder, model_args=arguments, safe_serialization=True)
    return folder


def logits(model: Any, images: Tensor, dtype: torch.dtype) -> Tensor:
    with torch.no_grad():
        return model.to(dtype)(images.to(dtype))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("vit_tiny_patch16_224", SMALL),
        ("vit_small_patch32_224", {**SMALL, "img_size": 96, "class_token": False, "global_pool": "avg"}),
        ("deit_tiny_patch16_224", {**SMALL, "in_chans": 1, "global_pool": "avg", "mlp_ratio": 2.3}),
        ("vit_tiny_patch16_224", {**SMALL, "embed_dim": 24, "num_heads": 2, "patch_size": 8, "act_layer": "silu"}),
        ("vit_tiny_patch16_224", {**SMALL, "pre_norm": True}),
    ],
    ids=["token", "mean-of-patches", "grey-mean-beside-token", "other-sizes", "pre-norm"],
)
def test_logits_are_equal_and_files_return_to_the_byte(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    theirs = timm_model(name, **options).eval()
    import timm

    saved_by_timm(theirs, tmp_path / "timm", options)
    ours = read_back(from_timm(tmp_path / "timm", tmp_path / "run"))
    to_timm(tmp_path / "run", tmp_path / "back")
    assert (tmp_path / "timm" / FILE).read_bytes() == (tmp_path / "back" / FILE).read_bytes()
    again = timm.create_model(f"local-dir:{tmp_path / 'back'}", pretrained=True).eval()
    assert isinstance(ours.config, ImageConfig)
    images = noise(ours.config)
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        expected = logits(theirs, images, dtype)
        assert torch.equal(logits(again, images, dtype), expected)
        assert (logits(ours, images, dtype) - expected).abs().max() <= tolerance * expected.abs().max()


def test_a_run_returns_bit_by_bit_with_its_classes_and_pixels(tmp_path: Path) -> None:
    """What timm itself has no part in."""
    model = image_model(layernorm_epsilon=1e-6, class_token=False, global_pool="avg", intermediate_size=37)
    save_run(tmp_path / "run", model, crop_pct=0.9, image_mean=[0.1, 0.2, 0.3])
    (tmp_path / "run" / "classes.txt").write_text("\n".join(CLASSES) + "\n", encoding="utf-8")
    to_timm(tmp_path / "run", tmp_path / "timm")
    from_timm(tmp_path / "timm", tmp_path / "back")
    before, after = (open_checkpoint(tmp_path / name) for name in ("run", "back"))
    names = before.tensors.names("model")
    assert after.tensors.names("model") == names == list(model.state_dict())
    assert all(before.tensors.tensor("model", n).equal(after.tensors.tensor("model", n)) for n in names)
    assert after.class_names == CLASSES and after.iteration == 0
    settings = after.resolved()
    assert (settings["crop_pct"], settings["image_mean"], settings["image_std"]) == (
        0.9, [0.1, 0.2, 0.3], [0.229, 0.224, 0.225],
    )  # fmt: skip
    assert {**before.model_config.model_dump(), "init_method_std": 0.02} == after.model_config.model_dump()


def test_weights_go_to_timm_or_on_demand_their_average(tmp_path: Path, package_log: pytest.LogCaptureFixture) -> None:
    models = [image_model(layernorm_epsilon=1e-6, init_method_std=std) for std in (0.3, 0.5)]
    save_run(tmp_path / "run", models[0], average=models[1])
    for flags, model in zip(([], ["--ema"]), models, strict=True):
        package_log.clear()
        target = tmp_path / f"timm{len(flags)}"
        main(["to-timm", str(tmp_path / "run"), str(target), *flags])
        assert ("--ema writes their average" in package_log.text) == (not flags)
        written = open_checkpoint(target).tensors
        assert all(torch.equal(p, written.tensor("model", name)) for name, p in model.named_parameters())


def plain(tmp_path: Path) -> Path:
    """A small model in timm's form, written without timm."""
    save_run(tmp_path / "run", image_model(layernorm_epsilon=1e-6))
    to_timm(tmp_path / "run", tmp_path / "timm")
    return tmp_path / "timm"


def test_files_of_weights_alone_are_read_with_a_configuration(tmp_path: Path) -> None:
    folder = plain(tmp_path)
    weights = load_file(folder / FILE)
    torch.save({"model": weights, "epoch": 3}, tmp_path / "vit.pth")
    sizes = image_model(layernorm_epsilon=1e-6).config.model_dump(mode="json")
    file = tmp_path / "vit.yml"
    file.write_text(yaml.safe_dump({"task": "image_classification", **sizes, "image_mean": [0.5, 0.5, 0.4]}))
    for number, source in enumerate((folder / FILE, tmp_path / "vit.pth")):
        main(["from-timm", str(source), str(tmp_path / f"from_{number}"), "--config", str(file)])
        found = open_checkpoint(tmp_path / f"from_{number}")
        expected = open_checkpoint(tmp_path / "run").tensors
        for name in expected.names("model"):
            assert found.tensors.tensor("model", name).equal(expected.tensor("model", name))
        assert found.resolved()["image_mean"] == [0.5, 0.5, 0.4]
    config_json(lambda content: content.update(architecture="vit_new", model_args={}))(folder)
    with pytest.raises(UserError, match="vit_new of width 16 is no plain Vision Transformer that is known"):
        open_checkpoint(folder)
    main(["from-timm", str(folder), str(tmp_path / "told"), "--config", str(file)])
    assert open_checkpoint(tmp_path / "told").model_config == open_checkpoint(tmp_path / "run").model_config
    for source in (folder / FILE, tmp_path / "vit.pth"):
        with pytest.raises(UserError, match=f"IN: {source} holds tensors only; give the YAML .* \\(--config\\)"):
            from_timm(source, tmp_path / "other")
    torch.save({"model": weights, "args": Path("x")}, tmp_path / "vit.pth")
    with pytest.raises(UserError, match="it holds a pathlib.* object, which could run code"):
        main(["from-timm", str(tmp_path / "vit.pth"), str(tmp_path / "other"), "--config", str(file)])
    assert not (tmp_path / "other").exists()


NOT_PLAIN = [
    ("deit_tiny_distilled_patch16_224", {}, r"(dist_token|head_dist\.\w+): a distilled model \(DeiT\)"),
    ("vit_tiny_patch16_224", {"reg_tokens": 2}, "reg_token: register tokens"),
    ("vit_tiny_patch16_224", {"init_values": 1e-5}, r"blocks\.0\.ls\d\.gamma: LayerScale"),
    ("vit_tiny_patch16_224", {"qk_norm": True}, r"attn\.\w_norm\.\w+: further norms in a block"),
    ("vit_tiny_patch16_224", {"scale_attn_norm": True}, r"attn\.norm\.\w+: further norms in a block"),
    ("vit_base_patch16_clip_224", {}, "vit_base_patch16_clip_224 of width 24 is no plain Vision Transformer"),
    ("vit_tiny_patch16_224", {"no_embed_class": True}, "no place here for no_embed_class: True"),
    ("vit_tiny_patch16_224", {"global_pool": "avg", "fc_norm": False}, "global_pool: avg of tokens that are normal"),
    ("vit_tiny_patch16_224", {"global_pool": "map"}, r"attn_pool\.\S+: pooling by attention"),
    ("vit_tiny_patch16_224", {"global_pool": "max"}, "global_pool: max is not supported; token and avg are"),
    ("vit_tiny_patch16_224", {"mlp_layer": "SwiGLU"}, r"mlp\.fc1_\w\.\w+: SwiGLU"),
    ("vit_tiny_patch16_224", {"mlp_layer": "SwiGLUPacked"}, r"blocks\.0\.mlp\.fc1: SwiGLU"),
    ("vit_tiny_patch16_224", {"qkv_bias": False}, r"has no tensor blocks\.0\.attn\.qkv\.bias"),
    ("vit_tiny_patch16_224", {"num_classes": 0}, r"has no tensor head\.weight; give a Vision .* its classifier"),
    ("vit_tiny_patch16_224", {"act_layer": "quick_gelu"}, "act_layer: quick_gelu is not supported"),
    ("vit_tiny_patch16_224", {"pool_include_prefix": True, "global_pool": "avg"}, "no place here for pool_include"),
]


@pytest.mark.parametrize(("name", "options", "message"), NOT_PLAIN, ids=[str(case[1:2]) for case in NOT_PLAIN])
def test_what_no_plain_vit_has_is_refused_in_a_line(
    name: str, options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    timm_model(name, depth=1, img_size=32, embed_dim=24, num_heads=2)  # skips without timm
    import timm

    layers = {key: getattr(timm.layers, value) for key, value in options.items() if key == "mlp_layer"}
    arguments = {"depth": 1, "img_size": 32, "embed_dim": 24, "num_heads": 2, "num_classes": 3, **options}
    model = timm.create_model(name, **{**arguments, **layers})
    saved_by_timm(model, tmp_path / "timm", arguments | dict.fromkeys(layers))
    with pytest.raises(UserError, match=message) as error:
        from_timm(tmp_path / "timm", tmp_path / "run")
    assert "\n" not in str(error.value) and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (TOKENS, "attention_config: timm has no parameter tokens, only Transformer blocks; use to-hf"),
        ({"norm": "rmsnorm"}, "norm: timm's are layernorm, these rmsnorm; use to-hf"),
        ({"final_norm": "rmsnorm"}, "norm: timm's are layernorm, these layernorm and rmsnorm; use to-hf"),
        ({"layernorm_epsilon": 1e-5}, "layernorm_epsilon: timm's is 1e-06; use to-hf"),
        ({"gpt_j_residual": True}, "gpt_j_residual: timm's blocks have the feed-forward after attention; use to-hf"),
        ({"use_bias_in_attn_linear": False}, "use_bias_in_attn_linear: timm's projections have biases; use to-hf"),
        ({"pre_norm": True}, "patch_bias: timm's patches have a bias without pre_norm, and none with it; use to-hf"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_timm_cannot_say_is_refused_in_a_line(keys: dict[str, Any], message: str, tmp_path: Path) -> None:
    save_run(tmp_path / "run", image_model(**{"layernorm_epsilon": 1e-6, **keys}))
    with pytest.raises(UserError) as error:
        to_timm(tmp_path / "run", tmp_path / "timm")
    assert str(error.value) == message and not (tmp_path / "timm").exists()


def config_json(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        content = json.loads((folder / "config.json").read_text())
        change(content)
        (folder / "config.json").write_text(json.dumps(content))

    return edit


def tensors(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        content = load_file(folder / FILE)
        change(content)
        save_file(content, folder / FILE, {"format": "pt"})

    return edit


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (config_json(lambda c: c["model_args"].pop("num_heads")), "architecture: vit_base_patch16_224 of width 16 is"),
        (config_json(lambda c: c["model_args"].update(num_heads=3)), "num_attention_heads: 3 heads do not divide"),
        (config_json(lambda c: c["model_args"].update(rope=True)), "model_args: there is no place here for rope: True"),
        (
            config_json(lambda c: c["pretrained_cfg"].update(crop_pct=7)),
            "crop_pct: must be at most 1, got 7",
        ),
        (config_json(lambda c: c.update(architectures=["X"])), "no model of timm; give a folder with its config.json"),
        (tensors(lambda t: t.pop("blocks.1.mlp.fc1.bias")), r"has no tensor layers\.1\.mlp\.fc_in\.bias"),
        (tensors(lambda t: t.update({"blocks.1.mlp.fc1.bias": torch.ones(3)})), r"layers\.1\.mlp\.fc_in\.bias has sh"),
        (tensors(lambda t: t["head.bias"].fill_(float("nan"))), r"head\.linear\.bias .*not finite"),
        (tensors(lambda t: t.update({"pos_embed": torch.ones(1, 3, 16)})), "pos_embed: 3 positions with a class token"),
        (tensors(lambda t: t.update({"fc_norm.bias": t["norm.bias"].clone()})), r"two tensors for final_norm\.bias"),
        (tensors(lambda t: t.update({"extra": torch.ones(1)})), "extra: no part of a plain ViT, which there is no"),
        (lambda folder: (folder / FILE).write_bytes(b"no weights"), r"model\.safetensors: not a readable safetensors"),
        (lambda folder: (folder / FILE).unlink(), r"has neither model\.safetensors nor"),
    ],
)
def test_damage_is_named_in_a_line(damage: Callable[[Path], None], message: str, tmp_path: Path, capsys: Any) -> None:
    folder = plain(tmp_path)
    damage(folder)
    code = run_command(lambda: main(["from-timm", str(folder), str(tmp_path / "new")]))
    [line] = capsys.readouterr().err.splitlines()
    assert code == 2 and re.search(message, line), line
    assert not (tmp_path / "new").exists()


def test_names_of_classes_that_are_no_lines_are_left_out(tmp_path: Path, package_log: Any) -> None:
    folder = plain(tmp_path)
    config_json(lambda content: content.update(label_names=["crane", "crane", "c", "d", "e"]))(folder)
    assert open_checkpoint(folder).class_names is None
    assert "its names of classes are left out: they are not one for each of 5" in package_log.text


def test_a_folder_of_timm_opens_like_any_checkpoint(tmp_path: Path) -> None:
    model, ours = read_back(plain(tmp_path)), read_back(tmp_path / "run")
    assert isinstance(model.config, ImageConfig)
    assert torch.equal(model(noise(model.config)), ours(noise(model.config)))
    other = model.config.replaced(layernorm_epsilon=1e-5)
    assert open_checkpoint(tmp_path / "timm", other).model_config == model.config, "a folder says what it is"
    with pytest.raises(UserError, match="layernorm_epsilon: 1e-05 in the configuration, 1e-06 in checkpoint"):
        open_checkpoint(tmp_path / "timm").as_model(other)
