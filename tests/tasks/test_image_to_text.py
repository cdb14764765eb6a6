"""Models that say what is on an image: joined of two, trained, resumed and cut up, generating and evaluated."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from eval_tasks.run import run_evaluation
from megatron.checkpoint.store import CheckpointReader
from megatron.config import RunConfig
from megatron.config.checks import find_evaluation_mistakes, find_training_mistakes
from megatron.config.load import resolve_config
from megatron.data import IndexedDataset
from megatron.errors import UserError
from megatron.exchange import open_checkpoint
from megatron.growth.describe import describe_checkpoint
from megatron.inference.decoding import Decoder, Text
from megatron.inference.generate import start_texts
from megatron.inference.modes import run_generation
from megatron.inference.prepare import load_with_images
from megatron.inference.sampling import Sampling
from megatron.model.build import build_model
from megatron.model.fill import fill
from megatron.mpu.environment import ensure_process_environment
from megatron.mpu.layout import SINGLE, Layout
from megatron.mpu.processes import join
from megatron.tasks import build_task
from megatron.training import train
from tests.ranks import run_ranks
from tests.tasks.image_text_runs import (
    CORNERS,
    IMAGE,
    IMAGES,
    KEYS,
    LEARNING,
    MORE,
    TEXT,
    TOWER,
    config_of,
    write_captioned_images,
    write_tower,
)  # fmt: skip
from tests.tasks.test_images import assert_same_run
from tests.training.cases import metrics
from tests.training.test_layouts import train_all

FROZEN = {**MORE, "freeze_old_tokens": True}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_captioned_images(tmp_path_factory.mktemp("captions"))


@pytest.fixture(scope="module")
def towers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An image model and a language model, as the keys of a run name them."""
    root = tmp_path_factory.mktemp("towers")
    image, text = write_tower(root / "image", **IMAGE), write_tower(root / "text", **TEXT)
    return {"pretrain_image_tower": image, "pretrain_text_tower": text}


@pytest.fixture(scope="module")
def trained(data: str, tmp_path_factory: pytest.TempPathFactory, single_process: None) -> Path:
    """A run from scratch that has learned something."""
    folder = tmp_path_factory.mktemp("trained")
    train(config_of(data, folder, **LEARNING))
    return folder


@pytest.fixture(scope="module")
def frozen(data: str, towers: dict[str, str], tmp_path_factory: pytest.TempPathFactory, single_process: None) -> Path:
    """A run that trains what joins the two, and nothing else."""
    folder = tmp_path_factory.mktemp("frozen")
    train(config_of(data, folder, **FROZEN, **towers))
    return folder


def learned(data: str, folder: Path, **keys: Any) -> RunConfig:
    """The configuration of the run that has learned something."""
    return config_of(data, folder, **{**LEARNING, **keys})


def image_file(folder: Path, corner: int) -> str:
    pixels = np.full((8, 8), 60, np.uint8)
    pixels[4 * (corner // 2) :, 4 * (corner % 2) :][:4, :4] = 160
    Image.fromarray(pixels).save(folder / f"{corner}.png")
    return str(folder / f"{corner}.png")


def test_it_learns_and_its_validation_reads_every_caption(data: str, trained: Path) -> None:
    losses = metrics(trained, "lm_loss")
    assert sum(losses[-5:]) < 0.3 * sum(losses[:5])
    task = build_task(learned(data, trained))
    valid = task.datasets([8, 8, 8], {}).valid
    assert len(valid) == 3 * IMAGES // 10
    batch = task.collate([valid[i] for i in range(len(valid))], len(valid))
    inputs, (ids, mask) = task.split(batch, torch.device("cpu"))
    checkpoint = open_checkpoint(trained)
    model = build_model(checkpoint.model_config)
    fill(model, checkpoint.tensors, SINGLE)
    with torch.no_grad():
        logits = model.eval()(*inputs)
    every = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids.flatten(), reduction="none")
    expected = every[mask.flatten()].mean().item()
    assert metrics(trained, "valid_lm_loss") == pytest.approx([expected], rel=1e-5)
    assert metrics(trained, "valid_perplexity") == pytest.approx([math.exp(expected)], rel=1e-5)


def test_a_sample_counts_by_its_learned_ids_alone(data: str, tmp_path: Path) -> None:
    task = build_task(config_of(data, tmp_path))
    logits, ids = torch.randn(2, 3, 512), torch.tensor([[1, 2, 3], [4, 5, 6]])
    mask = torch.tensor([[True, True, False], [False, False, True]])
    losses = -logits.log_softmax(-1).gather(-1, ids[..., None])[..., 0]
    expected = ((losses[0, 0] + losses[0, 1]) / 2 + losses[1, 2]) / 2
    assert task.loss(logits, (ids, mask), SINGLE).item() == pytest.approx(expected.item())
    sums = dict(zip(task.measures, task.measure(logits, (ids, mask), SINGLE).tolist(), strict=True))
    assert task.metrics("test", sums)["test_lm_loss"] == pytest.approx(losses[mask].mean().item())


def test_a_text_reads_its_image_and_no_text_behind_it(data: str, trained: Path) -> None:
    checkpoint = open_checkpoint(trained)
    model = build_model(checkpoint.model_config)
    fill(model, checkpoint.tensors, SINGLE)
    images, ids = torch.randn(2, 1, 8, 8), torch.randint(1, 200, (2, 6))
    with torch.no_grad():
        before = model.eval()(images, ids)
        ids[:, 4:] += 1
        after, other = model(images, ids), model(images.flip(0), ids)
    assert before.shape == (2, 6, 512)
    assert torch.equal(before[:, :4], after[:, :4]) and not torch.allclose(before[:, 4:], after[:, 4:])
    assert not torch.allclose(after[:, :4], other[:, :4])


def test_only_what_joins_the_two_is_trained(towers: dict[str, str], frozen: Path) -> None:
    found = open_checkpoint(frozen)
    [entry] = found.train_state["lineage"]
    assert entry["logit_difference"] < 1e-6 and not entry["scheduled"]
    sources = {"image.": towers["pretrain_image_tower"], "text.": towers["pretrain_text_tower"]}
    kept = set()
    for prefix, path in sources.items():
        source = open_checkpoint(path).tensors
        for name in source.names("model"):
            if not name.startswith("head.") and not name.endswith("tau_tokens"):
                kept.add(f"{prefix}{name}")
                assert found.tensors.tensor("model", f"{prefix}{name}").equal(source.tensor("model", name)), name
    new = {name for name in found.tensors.names("model") if not name.endswith("tau_tokens")} - kept
    assert {"connector.key_tokens_0", "text.layers.1.mlp.value_tokens_1"} <= new
    assert {name.partition(".")[0] for name in new} == {"connector", "text"}
    assert describe_checkpoint(frozen)["tau_tokens"]["connector"] == [20]
    trained = {name.partition("/")[2] for name in found.tensors.names("optimizer")}
    assert trained == new
    assert metrics(frozen, "lm_loss")[-1] < metrics(frozen, "lm_loss")[0]


def test_it_resumes_bit_for_bit(
    data: str, towers: dict[str, str], frozen: Path, tmp_path: Path, single_process: None
) -> None:
    for stop in (2, None):
        train(config_of(data, tmp_path, **FROZEN, **towers, exit_interval=stop))
    whole, parts = (CheckpointReader(folder / "global_step5") for folder in (frozen, tmp_path))
    assert metrics(tmp_path, "lm_loss") == metrics(frozen, "lm_loss")
    for kind in ("model", "optimizer"):
        assert whole.names(kind) == parts.names(kind)
        assert all(whole.tensor(kind, name).equal(parts.tensor(kind, name)) for name in whole.names(kind))


LAYOUTS: dict[str, dict[str, Any]] = {
    "tensor": {"model_parallel_size": 2},
    "data": {"zero_optimization": {"stage": 0}},
    "ZeRO 3": {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}},
    "both": {"model_parallel_size": 2, "zero_optimization": {"stage": 1}},
}  # fmt: skip
NAMES = ("lm_loss", "valid_lm_loss", "test_lm_loss")


@pytest.mark.processes
def test_a_layout_trains_as_one_process_does(
    data: str, towers: dict[str, str], frozen: Path, tmp_path: Path, single_process: None
) -> None:
    keys = {**towers, "checkpoint_activations": True}
    train(config_of(data, tmp_path / "all", **keys))
    configs: dict[int, list[RunConfig]] = {2: [], 4: []}
    for name, axes in LAYOUTS.items():
        configs[4 if name == "both" else 2].append(config_of(data, tmp_path / name, **keys, **axes))
    configs[2].append(config_of(data, tmp_path / "frozen", **towers, **FROZEN, **LAYOUTS["ZeRO 3"]))
    for world, of_world in configs.items():
        run_ranks(world, train_all, of_world)
    for name in LAYOUTS:
        assert_same_run(tmp_path / name, tmp_path / "all", name, NAMES)
    assert_same_run(tmp_path / "frozen", frozen, "frozen", NAMES)


def test_it_grows_in_a_run(data: str, tmp_path: Path, single_process: None) -> None:
    growth = [{"at_iteration": 2, "tower": tower, "ffn_slot_num": 60} for tower in ("image", "text")]
    train(config_of(data, tmp_path, train_iters=3, growth=growth))
    entries = open_checkpoint(tmp_path).train_state["lineage"]
    assert [entry["logit_difference"] < 1e-6 for entry in entries] == [True, True]
    shapes = open_checkpoint(tmp_path).tensors
    assert shapes.shape("model", "image.layers.0.mlp.key_tokens_1") == (40, 16)
    assert shapes.shape("model", "text.layers.1.mlp.key_tokens_2") == (20, 32)


@pytest.fixture(scope="module")
def lines(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    folder = tmp_path_factory.mktemp("images")
    prompts = ("", "where?", "it is")
    return [{"image": image_file(folder, n % 4), "prompt": prompts[n % 3]} for n in range(8)]


def said(config: RunConfig, lines: list[dict[str, str]], layout: Layout = SINGLE, **how: bool) -> list[Text]:
    """What a model says of images behind prompts, in batches of unlike lengths."""
    model, tokenizer, reader = load_with_images(config, layout)
    decoder = Decoder(model, tokenizer, 16, logprobs=True, images=reader, **how)
    prompts, images = [line["prompt"] for line in lines], [line["image"] for line in lines]
    texts = start_texts(decoder, prompts, [Sampling(maximum_tokens=16)] * len(lines), 0, images)
    for batch in (texts[:3], texts[3:]):
        decoder.complete(batch)
    return texts


def assert_same_texts(found: list[Text], expected: list[Text]) -> None:
    assert [text.tokens for text in found] == [text.tokens for text in expected]
    for text, other in zip(found, expected, strict=True):
        assert text.logprobs == pytest.approx(other.logprobs, abs=1e-5)


def test_cached_decoding_is_that_without_a_cache(
    data: str, trained: Path, lines: list[dict[str, str]], single_process: None
) -> None:
    config = learned(data, trained)
    recomputed, cached, slow = (said(config, lines, **how) for how in ({"recompute": True}, {}, {"fast": False}))
    assert_same_texts(cached, recomputed)
    assert_same_texts(slow, recomputed)
    assert len({text.text for text in cached}) >= 6, "images and prompts make a difference"


def said_by_rank(config: RunConfig, lines: list[dict[str, str]]) -> list[Text]:
    ensure_process_environment()
    return said(config, lines, join(2, "gloo"))


@pytest.mark.processes
def test_tensor_ranks_say_what_one_process_does(
    data: str, trained: Path, lines: list[dict[str, str]], single_process: None
) -> None:
    config = learned(data, trained)
    for texts in run_ranks(2, said_by_rank, config, lines):
        assert_same_texts(texts, said(config, lines))


def test_lines_with_images_are_completed(
    data: str, trained: Path, lines: list[dict[str, str]], tmp_path: Path, single_process: None
) -> None:
    (tmp_path / "in.jsonl").write_text("\n".join(json.dumps(line) for line in [*lines, {"image": lines[0]["image"]}]))
    keys = {
        "text_gen_type": "input-file", "sample_input_file": f"{tmp_path}/in.jsonl", "temperature": 0.0,
        "sample_output_file": f"{tmp_path}/out.jsonl", "maximum_tokens": 12,
    }  # fmt: skip
    run_generation(learned(data, trained, **keys))
    answers = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [answer["image"] for answer in answers] == [line["image"] for line in lines] + [lines[0]["image"]]
    assert answers[0]["text"] == answers[-1]["text"]
    corners = [CORNERS[n % 4] for n in range(8)]
    right = sum(corner in answer["text"] for corner, answer in zip(corners, answers, strict=False))
    assert right >= 7
    for content, message in (
        ('{"prompt": "a"}', "prompt 1 has no image; write lines"),
        ('{"image": 3}', "line 1: image is not the name of a file"),
        ('{"image": "none.png"}', "image: none.png cannot be read: No such file"),
        (json.dumps({"image": f"{tmp_path}/in.jsonl"}), "in.jsonl is no JPEG, PNG"),
    ):
        (tmp_path / "in.jsonl").write_text(content)
        with pytest.raises(UserError, match=message):
            run_generation(learned(data, trained, **keys))
    with pytest.raises(UserError, match="text_gen_type: unconditional has no images"):
        run_generation(learned(data, trained, **{**keys, "text_gen_type": "unconditional"}))


def test_captions_are_evaluated(data: str, trained: Path, tmp_path: Path, single_process: None) -> None:
    config = learned(data, trained, eval_results_prefix=f"{tmp_path}/")
    results = run_evaluation(config)["results"]
    assert set(results) == {"corners"}
    valid = results["corners"]
    assert valid["loss,none"] == pytest.approx(metrics(trained, "valid_lm_loss")[0], rel=1e-5)
    assert valid["perplexity,none"] == pytest.approx(math.exp(valid["loss,none"]))
    assert valid["num_images"] == 5 and valid["num_captions"] == 15
    model, tokenizer, reader = load_with_images(config)
    decoder = Decoder(model, tokenizer, 16, images=reader)
    stored, right = IndexedDataset(data), []
    labels = IndexedDataset(data.replace("_image_", "_label_"))
    for number in range(40, 45):
        (tmp_path / "one.png").write_bytes(stored[number].tobytes())
        word = CORNERS[int(labels[number][0])]
        for prompt, answers in (("", {word, f"it is {word}"}), ("where?", {f" {word}"})):
            [text] = start_texts(decoder, [prompt], [Sampling(maximum_tokens=16)], 0, [f"{tmp_path}/one.png"])
            decoder.complete([text])
            right.append(text.text in answers)
    assert valid["exact_match,none"] == pytest.approx(np.mean(right)) and np.mean(right) >= 0.8
    test = run_evaluation(config.replaced(**{"evaluation.eval_split": "test", "evaluation.eval_limit": 2}))["results"]
    assert test["corners"]["num_images"] == 2 and test["corners"]["loss,none"] != valid["loss,none"]


def test_keys_of_other_models_evaluations_are_refused() -> None:
    for key, value in (("eval_tasks", ["piqa"]), ("per_class", True)):
        with pytest.raises(UserError, match=f"{key}: this is for .* not for what learns 'image_to_text'"):
            resolve_config([], {**KEYS, key: value}, checks=[find_evaluation_mistakes])


def mistake_of(keys: dict[str, Any], folder: Path) -> str:
    settings = {**KEYS, "save": str(folder), **keys}
    with pytest.raises(UserError) as error:
        train(resolve_config([], settings, checks=[find_training_mistakes]).config)
    assert "\n" not in str(error.value) and not list(folder.glob("global_step*"))
    return str(error.value)


def test_a_mistake_is_one_line(data: str, towers: dict[str, str], tmp_path: Path, single_process: None) -> None:
    image, text = towers["pretrain_image_tower"], towers["pretrain_text_tower"]
    cases: list[tuple[dict[str, Any], str]] = [
        ({"image_tower": {**TOWER, "hidden_size": 32}},
         f"image_tower.hidden_size: 32 in the configuration, 16 in checkpoint {image}"),
        ({"num_layers": 3}, f"num_layers: 3 in the configuration, 2 in checkpoint {text}"),
        ({"make_vocab_size_divisible_by": 1024}, "padded_vocab_size: 1024 does not fit this checkpoint"),
        ({"qkv_slot_num": 20}, "qkv_slot_num: 20 is fewer than the 24 tokens of layer 0"),
        ({"pretrain_image_tower": text}, "learned 'language' and has no such image tower"),
        ({"pretrain_text_tower": image}, "learned 'image_classification' and has no such text tower"),
        ({"pretrain_image_tower": "/none"}, "pretrain_image_tower: no checkpoint in /none"),
        ({"pretrain_partial_init": text, "pretrain_text_tower": None},
         "pretrain_image_tower: pretrain_partial_init is given too; keep one"),
        ({"pipe_parallel_size": 2}, "pipe_parallel_size: a model of 2 towers cannot be cut into 2 stages"),
        ({"sequence_parallel": True, "model_parallel_size": 2}, "sequence_parallel: the tokens of an image and of its"),
        ({"mixup": 0.5}, "mixup: is for labels, and captions cannot be mixed"),
        ({"use_mup": True}, "use_mup: true is for language models"),
        ({"data_path": data.replace("_image_", "_text_")}, "not images, whose prefix ends in _image_document"),
    ]  # fmt: skip
    for keys, message in cases:
        found = mistake_of({"data_path": data, **towers, **keys}, tmp_path)
        assert message in found, found
    needed: list[tuple[str, Any, str]] = [
        ("image_tower", None, "missing image_tower: add to a YAML file"),
        ("connector_slot_num", None, "missing connector_slot_num: add to a YAML file"),
        ("connector_slot_num", 0, "connector_slot_num: must be greater than 0, got 0"),
        ("image_tower", {**TOWER, "patch_size": 3}, "image_tower.patch_size: 3 pixels do not divide image_size 8"),
        ("image_tower", {**TOWER, "num_layers": 0}, "image_tower.num_layers: must be greater than 0, got 0"),
    ]
    for key, value, message in needed:
        keys = {**KEYS, "data_path": data, key: value}
        if value is None:
            del keys[key]
        with pytest.raises(UserError) as error:
            resolve_config([], keys, checks=[find_training_mistakes])
        assert message in str(error.value) and "\n" not in str(error.value)
    language = {**TEXT, "task": "language", "data_path": data, "pretrain_image_tower": image}
    with pytest.raises(UserError, match="pretrain_image_tower: a model that learns language has no image tower"):
        resolve_config([], language, checks=[find_training_mistakes])


def test_what_is_for_language_models_says_so(trained: Path, data: str) -> None:
    with pytest.raises(UserError, match="task: this is for language models, and not for what learns 'image_to_text'"):
        _ = open_checkpoint(trained).language
