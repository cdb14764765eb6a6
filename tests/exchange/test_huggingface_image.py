"""Image models exported to Hugging Face's form: transformers computes what this package does."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from PIL import Image

from megatron.config.sections.data import DataConfig
from megatron.config.sections.images import ImagesConfig
from megatron.config.sections.vision import ImageConfig
from megatron.data.datasets import Part
from megatron.data.images import ImageDataset, ImageShape, LabelledImages
from megatron.data.indexed import IndexedDataset
from megatron.errors import UserError
from megatron.exchange import open_checkpoint
from megatron.exchange.convert import export_huggingface, from_huggingface, to_huggingface
from megatron.exchange.huggingface_source import IMAGES, configuration_source, modeling_source, processing_source
from megatron.model.layered import LayeredModel
from megatron.model.pattention import named_pattentions
from tests.exchange.image_models import CLASSES, TOKENS, image_config, image_model, noise, read_back, save_run
from tests.exchange.loaded_exports import private_modules
from tests.tasks.image_runs import write_images

OWN_NORMS: dict[str, Any] = {
    "token_segments": {"qkv": [[10, 6, 8]] * 2, "proj": [[12, 8, 0], [12, 0, 8]], "ffn": [[19, 12, 9]] * 2},
    "segment_norms": ["joint", "segment", "joint"],
}
GROWN = {"token_segments": {"qkv": [[16, 8]] * 2, "proj": [[20, 0]] * 2, "ffn": [[30, 10]] * 2}}
PATCHES_ALONE: dict[str, Any] = {"class_token": False, "global_pool": "avg"}
KINDS: dict[str, dict[str, Any]] = {
    "tokenformer": TOKENS,
    "tokenformer-avg": {**TOKENS, "global_pool": "avg", "norm_activation_type": "softmax"},
    "vit": {"in_channels": 1, "activation": "relu"},
    "vit-avg": {**PATCHES_ALONE, "gpt_j_residual": True, "norm": "rmsnorm", "pre_norm": True, "patch_bias": False},
    "row-norms": {**TOKENS, **OWN_NORMS},
    "grown": {**TOKENS, **PATCHES_ALONE, **GROWN},
}


@pytest.fixture(scope="module", autouse=True)
def modules_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with private_modules(tmp_path_factory.mktemp("modules")):
        yield


def classifier(folder: Path, **arguments: Any) -> Any:
    auto = transformers.AutoModelForImageClassification
    return auto.from_pretrained(folder, trust_remote_code=True, **arguments)


def processor(folder: Path) -> Any:
    return transformers.AutoImageProcessor.from_pretrained(folder, trust_remote_code=True)


@pytest.mark.parametrize("keys", KINDS.values(), ids=KINDS)
def test_every_kind_of_model_computes_the_same_and_comes_back(keys: dict[str, Any], tmp_path: Path) -> None:
    model = image_model(**keys)
    for _, layer in named_pattentions(model):
        layer.tau_tokens -= 1  # as after a growth with zero keys, whose tau is kept
    save_run(tmp_path / "run", model)
    to_huggingface(tmp_path / "run", tmp_path / "export")
    theirs = classifier(tmp_path / "export", dtype=torch.float64).eval()
    theirs.save_pretrained(tmp_path / "saved_by_transformers")
    images = noise(image_config(**keys))
    with torch.no_grad():
        expected = model.double()(images)
        found = theirs(images, output_hidden_states=True)
        assert (found.logits - expected).abs().max() <= 1e-12 * expected.abs().max()
        assert len(found.hidden_states) == 3
        for name in ("export", "saved_by_transformers"):
            again = read_back(tmp_path / name)
            assert (again(images) - expected).abs().max() <= 1e-12 * expected.abs().max()
    assert theirs.config.num_labels == 5 and theirs.num_parameters() == model.num_parameters()


def test_what_comes_back_is_equal_bit_by_bit(tmp_path: Path) -> None:
    model = image_model(**TOKENS, **OWN_NORMS)
    save_run(tmp_path / "run", model, crop_pct=0.9, image_mean=[0.1, 0.2, 0.3])
    (tmp_path / "run" / "classes.txt").write_text("\n".join(CLASSES) + "\n", encoding="utf-8")
    to_huggingface(tmp_path / "run", tmp_path / "export")
    from_huggingface(tmp_path / "export", tmp_path / "back")
    before, after = (open_checkpoint(tmp_path / name) for name in ("run", "back"))
    assert after.tensors.names("model") == list(model.state_dict())
    for name, tensor in model.state_dict().items():
        assert after.tensors.tensor("model", name).equal(tensor)
    assert after.model_config == before.model_config and after.class_names == CLASSES
    assert {k: after.resolved()[k] for k in ("crop_pct", "image_mean")} == {
        "crop_pct": 0.9, "image_mean": [0.1, 0.2, 0.3],
    }  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on grey images of 8 x 8, whose classes are named beside its data."""
    root = tmp_path_factory.mktemp("run")
    data = write_images(root / "corners")
    (root / "corners_classes.txt").write_text("\n".join(CLASSES[:4]) + "\n", encoding="utf-8")
    model = image_model(**TOKENS, in_channels=1, num_classes=4)
    save_run(root / "run", model, DataConfig(data_path=data), crop_pct=1.0, image_mean=[0.3], image_std=[0.2])
    to_huggingface(root / "run", root / "export")
    return root


def test_images_are_made_ready_as_an_evaluation_does_it(run: Path) -> None:
    """Pixel for pixel: the task's own tensors are the witness."""
    ready = processor(run / "export")
    indexed = IndexedDataset(str(run / "corners_image_document"))
    shape, images = ImageShape(1, 8, 4), ImagesConfig(crop_pct=1.0, image_mean=[0.3], image_std=[0.2])
    part = LabelledImages(Part(indexed, (0, len(indexed))), 4)
    dataset = ImageDataset([part], shape, images)
    mean, std = (255 * torch.tensor(values) for values in images.normalisation(1))
    pixels = torch.stack([dataset[i]["images"] for i in range(9)])
    found = ready([part.image(i, 1) for i in range(9)], return_tensors="pt").pixel_values
    assert found.dtype == torch.float32 and torch.equal(found, (pixels - mean) / std)


@pytest.mark.parametrize("size", [(13, 29), (40, 11), (8, 8), (9, 400)])
@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA", "CMYK"])
def test_any_image_becomes_what_the_data_would_give(size: tuple[int, int], mode: str, tmp_path: Path) -> None:
    from megatron.data.augment import centre_crop
    from megatron.exchange.huggingface_image_processor import TokenFormerImageProcessor

    values = torch.randint(0, 256, (size[1], size[0], 3), dtype=torch.uint8).numpy()
    image = Image.fromarray(values).convert(mode)
    mean, std = ImagesConfig().normalisation(3)
    ready = TokenFormerImageProcessor(8, 3, 0.875, mean, std)
    [found] = ready(image, return_tensors="pt").pixel_values
    pixels = torch.tensor(list(centre_crop(image.convert("RGB"), 8, 0.875).tobytes()), dtype=torch.uint8)
    expected = pixels.view(8, 8, 3).permute(2, 0, 1)
    scaled = (255 * torch.tensor(numbers)[:, None, None] for numbers in (mean, std))
    assert torch.equal(found, (expected - next(scaled)) / next(scaled))
    if mode == "RGB":
        array = ready(values, return_tensors="np").pixel_values
        assert array.shape == (1, 3, 8, 8) and torch.equal(torch.from_numpy(array)[0], found)


def test_a_pipeline_names_the_class_that_our_model_gives(run: Path, tmp_path: Path) -> None:
    pipeline = transformers.pipeline("image-classification", model=str(run / "export"), trust_remote_code=True)
    indexed = IndexedDataset(str(run / "corners_image_document"))
    model = read_back(run / "run").float()
    for number in range(4):
        file = tmp_path / f"{number}.png"
        file.write_bytes(indexed[number].tobytes())
        answers = pipeline(str(file))
        pixels = torch.tensor(list(Image.open(file).tobytes()), dtype=torch.uint8).view(1, 1, 8, 8)
        with torch.no_grad():
            scores = model((pixels - torch.tensor(0.3) * 255) / (torch.tensor(0.2) * 255)).softmax(-1)[0]
        assert {answer["label"]: answer["score"] for answer in answers} == pytest.approx(
            dict(zip(CLASSES[:4], scores.tolist(), strict=True)), abs=1e-5
        )
        assert answers[0]["label"] == CLASSES[int(scores.argmax())]


def test_what_people_do_with_a_classifier(run: Path) -> None:
    model, images = classifier(run / "export").train(), noise(image_config(in_channels=1)).float()
    labels = torch.tensor([0, 3, 2])
    gradients = []
    for enable in (False, True):
        model.gradient_checkpointing_enable() if enable else None
        model.zero_grad()
        outputs = model(images, labels=labels)
        outputs.loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.allclose(a, b, atol=1e-7) for a, b in zip(*gradients, strict=True))
    shares = torch.nn.functional.one_hot(labels, 4).float()
    assert torch.allclose(model(images, labels=shares).loss, outputs.loss)
    features = transformers.AutoModel.from_pretrained(run / "export", trust_remote_code=True)(images)
    assert features.last_hidden_state.shape == (3, 5, 16) and features.pooler_output.shape == (3, 16)
    eager = classifier(run / "export", attn_implementation="eager").eval()
    weights = eager(images, output_attentions=True).attentions
    assert len(weights) == 2 and torch.allclose(weights[0].sum(-1), torch.ones(3, 2, 5)) and (weights[0] > 0).all()
    assert torch.allclose(eager(images).logits, model.eval()(images).logits, atol=1e-6)
    other = classifier(run / "export", num_labels=7, ignore_mismatched_sizes=True)
    assert other(images).logits.shape == (3, 7) and torch.equal(
        other.model.layers[1].mlp.key_tokens_0, model.model.layers[1].mlp.key_tokens_0
    )
    fresh = transformers.AutoModelForImageClassification.from_config(model.config, trust_remote_code=True)
    assert fresh.model.embedding.positions.std() > 0.1 and not fresh.model.embedding.class_token.any()
    halved = classifier(run / "export", dtype=torch.bfloat16)
    assert halved(images).logits.dtype == torch.bfloat16
    with pytest.raises(ValueError, match=r"pixel_values: \[b, 1, 8, 8\] is expected, found \[3, 1, 16, 16\]"):
        model(torch.ones(3, 1, 16, 16))


def test_names_of_classes_come_from_where_they_are(run: Path, tmp_path: Path) -> None:
    def labels(*names: str, **arguments: Any) -> list[str]:
        folder = tmp_path.joinpath(*names)
        to_huggingface(run / "run", folder, **arguments)
        config = json.loads((folder / "config.json").read_text())
        assert config["label2id"] == {label: int(number) for number, label in config["id2label"].items()}
        return list(config["id2label"].values())

    assert labels("beside the data") == CLASSES[:4]
    (tmp_path / "others.txt").write_text("a\nb\nc\nd\n")
    assert labels("flag", classes=tmp_path / "others.txt") == ["a", "b", "c", "d"]
    (tmp_path / "others.txt").write_text("a\nb\nc\n")
    with pytest.raises(UserError, match="--classes: .*others.txt names 3 classes, and the model tells 4 apart"):
        labels("too few", classes=tmp_path / "others.txt")
    export_huggingface(image_model(num_classes=2), tmp_path / "nameless")
    assert classifier(tmp_path / "nameless").config.id2label == {0: "LABEL_0", 1: "LABEL_1"}
    assert open_checkpoint(tmp_path / "nameless").class_names is None


@pytest.mark.launches
def test_the_code_of_an_export_needs_no_other_package_than_it_says() -> None:
    allowed = {"torch", "transformers"}
    for source, packages in (
        (modeling_source(IMAGES), allowed),
        (configuration_source(IMAGES), allowed),
        (processing_source(), {"PIL", "numpy", "transformers"}),
    ):
        imported = {
            (name.name if isinstance(node, ast.Import) else node.module or "").partition(".")[0]
            for node in ast.walk(ast.parse(source))
            if isinstance(node, ast.Import | ast.ImportFrom) and not getattr(node, "level", 0)
            for name in node.names
        }
        assert imported <= {*sys.stdlib_module_names, *packages}
        result = subprocess.run(
            [sys.executable, "-m", "ruff", "check", "--isolated", "--select", "F", "--no-cache", "-"],
            input=source, capture_output=True, text=True,
        )  # fmt: skip
        assert result.returncode == 0, result.stdout


def test_documented_code_runs(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    page = (Path(__file__).parents[2] / "docs/vision.md").read_text(encoding="utf-8")
    [code] = re.findall(r"^```python\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
    (tmp_path / "HF_FOLDER").symlink_to(run / "export")
    (tmp_path / "image.jpg").write_bytes(IndexedDataset(str(run / "corners_image_document"))[0].tobytes())
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    assert capsys.readouterr().out.strip() in CLASSES


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_layers": 3}, r"num_layers: 3 does not fit the weights, which are of 2 layers"),
        ({"qkv_slot_num": 25}, r"query\.key_tokens_0 has shape \[24, 16\].*qkv_slot_num: 25"),
        ({"id2label": {"0": "a", "1": "b", "2": "c"}}, r"head\.linear\.weight has shape \[4, 16\].*num_classes: 3"),
        ({"image_size": 12}, r"embedding\.positions has shape \[5, 16\].*image_size: "),
        ({"global_pool": "max"}, r"config\.json: global_pool: .max. is not supported"),
        ({"architectures": ["ResNetForImageClassification"]}, "architecture ResNetForImageClassification is not supp"),
    ],
)
def test_a_configuration_that_does_not_describe_the_weights_is_named(
    change: dict[str, Any], message: str, run: Path, tmp_path: Path
) -> None:
    config = json.loads((run / "export" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
    (tmp_path / "model.safetensors").symlink_to(run / "export" / "model.safetensors")
    with pytest.raises(UserError, match=message) as error:
        open_checkpoint(tmp_path)
    assert "\n" not in str(error.value)


def test_an_image_model_has_no_place_in_language_forms(run: Path, tmp_path: Path) -> None:
    from megatron.exchange.convert import to_official
    from megatron.inference import load_model

    for action in (lambda: to_official(run / "run", tmp_path / "official"), lambda: load_model(run / "export")):
        with pytest.raises(UserError, match="task: this is for language models, and not for what learns 'image_cl"):
            action()
    model: LayeredModel = read_back(run / "export")
    assert isinstance(model.config, ImageConfig)
