"""Learning which captions belong to which images: training, layouts, accumulation, resuming, growth and mistakes."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron.checkpoint.store import CheckpointReader
from megatron.config import load_config
from megatron.config.checks import find_training_mistakes
from megatron.config.load import resolve_config
from megatron.errors import UserError
from megatron.exchange import open_checkpoint
from megatron.growth.convert import grow_checkpoint
from megatron.growth.describe import as_text, describe_checkpoint
from megatron.growth.plan import TokenCounts
from megatron.model.build import build_model
from megatron.model.clip_model import NO_TOKEN
from megatron.model.fill import fill
from megatron.mpu.layout import SINGLE
from megatron.ops.contrastive import contrastive_loss
from megatron.tasks import ClipTask, build_task
from megatron.tasks.texts import Texts
from megatron.training import train
from tests.ranks import run_ranks
from tests.tasks.pair_runs import KEYS, config_of, write_pairs
from tests.training.cases import TOLERANCE, metrics
from tests.training.test_layouts import train_all
from tools.demo.captioned_digits import TEMPLATES, UNSEEN_TEMPLATES, write_digits

NAMES = ("loss", "valid_loss", "valid_image_to_text", "valid_text_to_image", "test_loss")
TRANSFORMER = {**dict.fromkeys(("qkv_slot_num", "proj_slot_num", "ffn_slot_num")), "norm": "layernorm"}
ALL_IN_PARTS = {"stage": 3, "stage3_param_persistence_threshold": 0}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_pairs(tmp_path_factory.mktemp("pairs") / "corners")


@pytest.fixture(scope="module")
def trained(pairs: str, tmp_path_factory: pytest.TempPathFactory, single_process: None) -> Path:
    """A run of one process that has learned something."""
    folder = tmp_path_factory.mktemp("trained")
    train(config_of(pairs, folder, train_iters=60, lr_decay_iters=60, eval_interval=60))
    return folder


def features_of(folder: Path, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    checkpoint = open_checkpoint(folder)
    model = build_model(checkpoint.model_config)
    fill(model, checkpoint.tensors, SINGLE)
    with torch.no_grad():
        outputs: tuple[torch.Tensor, ...] = model.eval()(*inputs)
    return outputs


def held_out(pairs: str, folder: Path, count: int) -> tuple[torch.Tensor, ...]:
    task = build_task(config_of(pairs, folder))
    return task.held_out(task.datasets([8, 8, 8], {}), count)


def test_it_learns_and_evaluates_whole_updates(pairs: str, trained: Path) -> None:
    losses = metrics(trained, "loss")
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
    inputs = held_out(pairs, trained, 16)
    found = [features_of(trained, tuple(x[part] for x in inputs)) for part in (slice(0, 8), slice(8, 16))]
    expected = sum(contrastive_loss(*features).item() for features in found) / 2
    assert metrics(trained, "valid_loss") == pytest.approx([expected], rel=1e-5)
    hits = [int((f[0] @ f[1].T).argmax(1).eq(torch.arange(8)).sum()) for f in found]
    assert metrics(trained, "valid_image_to_text") == pytest.approx([sum(hits) / 16])


LAYOUTS: dict[str, dict[str, Any]] = {
    "accumulation": {"train_micro_batch_size_per_gpu": 2},
    "data, accumulation": {"train_micro_batch_size_per_gpu": 1, "checkpoint_activations": True},
    "ZeRO 2, accumulation": {"zero_optimization": {"stage": 2}, "train_micro_batch_size_per_gpu": 2},
    "ZeRO 3, accumulation": {"zero_optimization": ALL_IN_PARTS, "train_micro_batch_size_per_gpu": 1},
    "tensor, Transformer": {"model_parallel_size": 2, **TRANSFORMER},
    "tensor, ZeRO 3": {"model_parallel_size": 2, "zero_optimization": ALL_IN_PARTS},
    "data x4": {},
    "data x2, tensor, ZeRO 1, accumulation": {
        "model_parallel_size": 2, "zero_optimization": {"stage": 1}, "train_micro_batch_size_per_gpu": 2,
    },
}  # fmt: skip


def world_of(name: str) -> int:
    return 1 if name == "accumulation" else 4 if "x" in name else 2


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    reader = CheckpointReader(folder / "global_step4")
    return {f"{kind}/{n}": reader.tensor(kind, n) for kind in ("model", "optimizer") for n in reader.names(kind)}


def assert_same_run(found: Path, expected: Path, case: str) -> None:
    for name in NAMES:
        assert metrics(found, name) == pytest.approx(metrics(expected, name), abs=TOLERANCE), (case, name)
    assert metrics(found, "grad_norm") == pytest.approx(metrics(expected, "grad_norm"), rel=TOLERANCE), case
    left, right = tensors(found), tensors(expected)
    assert left.keys() == right.keys(), case
    for name, tensor in right.items():
        assert torch.allclose(left[name].double(), tensor.double(), rtol=0, atol=TOLERANCE), (case, name)


@pytest.fixture(scope="module")
def one_process(pairs: str, tmp_path_factory: pytest.TempPathFactory, single_process: None) -> dict[bool, Path]:
    """Runs of one process without accumulation, by whether they are of Transformer blocks."""
    root = tmp_path_factory.mktemp("one")
    for is_transformer in (False, True):
        train(config_of(pairs, root / str(is_transformer), **(TRANSFORMER if is_transformer else {})))
    return {is_transformer: root / str(is_transformer) for is_transformer in (False, True)}


@pytest.mark.processes
@pytest.mark.parametrize("world", [1, 2, 4])
def test_a_layout_trains_as_one_process_does(
    pairs: str, one_process: dict[bool, Path], tmp_path: Path, world: int
) -> None:
    """However an update is divided into ranks and micro-batches, its loss is that of all its pairs."""
    cases = [name for name in LAYOUTS if world_of(name) == world]
    configs = [config_of(pairs, tmp_path / name, **LAYOUTS[name]) for name in cases]
    if world == 1:
        train_all(configs)
    else:
        run_ranks(world, train_all, configs)
    for name in cases:
        assert_same_run(tmp_path / name, one_process["Transformer" in name], name)


def test_sixteen_bits_with_accumulation_are_near_fp32(
    pairs: str, one_process: dict[bool, Path], tmp_path: Path, single_process: None
) -> None:
    train(config_of(pairs, tmp_path, precision="bf16", train_micro_batch_size_per_gpu=2, train_iters=3, eval_iters=0))
    assert metrics(tmp_path, "loss") == pytest.approx(metrics(one_process[False], "loss")[:3], rel=0.02)


def test_it_resumes_bit_for_bit_with_dropout_and_accumulation(pairs: str, tmp_path: Path, single_process: None) -> None:
    keys = {
        "hidden_dropout": 0.1, "drop_path_rate": 0.3, "hflip": 0.5, "scale": [0.5, 1],
        "train_micro_batch_size_per_gpu": 2,
    }  # fmt: skip
    for stop in (2, None):
        train(config_of(pairs, tmp_path / "parts", **keys, exit_interval=stop))
    train(config_of(pairs, tmp_path / "whole", **keys))
    assert metrics(tmp_path / "whole", "loss") == metrics(tmp_path / "parts", "loss")
    whole, parts = tensors(tmp_path / "whole"), tensors(tmp_path / "parts")
    assert whole.keys() == parts.keys() and all(whole[name].equal(parts[name]) for name in whole)


@pytest.mark.processes
def test_either_tower_grows_in_every_layout(pairs: str, trained: Path, tmp_path: Path) -> None:
    """What a run records is the largest difference of features on held-out pairs."""
    axes: dict[str, dict[str, Any]] = {
        "one": {}, "tensor": {"model_parallel_size": 2}, "ZeRO 3": {"zero_optimization": ALL_IN_PARTS},
    }  # fmt: skip
    sizes = {"text": {"ffn_slot_num": 40}, "image": {"qkv_slot_num": 28, "proj_slot_num": 28, "ffn_slot_num": 44}}
    growth = [{"at_iteration": 60, "lr_policy": "continue", "tower": tower, **new} for tower, new in sizes.items()]
    for name in axes:
        shutil.copytree(trained, tmp_path / name)
    keys = {"train_iters": 61, "lr_decay_iters": 60, "growth": growth}
    configs = [config_of(pairs, tmp_path / name, **keys, **axes[name]) for name in axes]
    train(configs[0])
    run_ranks(2, train_all, configs[1:])
    for name in axes:
        first, second = open_checkpoint(tmp_path / name).train_state["lineage"]
        assert first["added"] == "text ffn 20 -> 40 in layer 0"
        assert second["added"] == "image qkv 12 -> 28, proj 12 -> 28, ffn 20 -> 44 in layers 0 to 1"
        assert max(entry["logit_difference"] for entry in (first, second)) < 1e-6, name
        assert metrics(tmp_path / name, "loss") == pytest.approx(metrics(tmp_path / "one", "loss"), abs=TOLERANCE), name
    facts = describe_checkpoint(tmp_path / "tensor")
    assert facts["segments"]["text ffn"] == [[20, 20, 0]] and facts["segments"]["image qkv"] == [[12, 0, 16]] * 2
    assert "text ffn tokens  20 + 20 + 0 (tau^2 20), layer 0" in as_text(facts)


@pytest.mark.parametrize(("new_keys", "tolerance"), [("zero", 1e-6), ("rotated", 1e-5)])
def test_a_trained_checkpoint_grows_without_another_feature(
    pairs: str, trained: Path, tmp_path: Path, new_keys: Any, tolerance: float
) -> None:
    counts = TokenCounts(qkv=40, proj=40, ffn=60, new_keys=new_keys, tower="both")
    grow_checkpoint(trained, tmp_path / "larger", counts)
    inputs = held_out(pairs, trained, 16)
    for before, after in zip(features_of(trained, inputs), features_of(tmp_path / "larger", inputs), strict=True):
        assert (before - after).abs().max() <= tolerance * before.abs().max()


def test_a_larger_model_starts_from_a_smaller_one(pairs: str, trained: Path, tmp_path: Path) -> None:
    larger = {"ffn_slot_num": 40, "text_tower": {**KEYS["text_tower"], "ffn_slot_num": 60, "qkv_slot_num": 40}}
    train(config_of(pairs, tmp_path, **larger, pretrain_partial_init=str(trained), train_iters=1))
    [entry] = open_checkpoint(tmp_path).train_state["lineage"]
    assert entry["added"] == "image ffn 20 -> 40 in layers 0 to 1; text qkv 12 -> 40, ffn 20 -> 60 in layer 0"
    assert entry["logit_difference"] < 1e-6


def test_texts_end_where_the_loader_says_and_begin_as_the_tokenizer_does() -> None:
    task = build_task(load_config([], KEYS))
    assert isinstance(task, ClipTask)
    [short, long] = task.texts.of_texts(["ab", "a" * 40]).tolist()
    assert short == [97, 98, 0] + [NO_TOKEN] * 21 and long == [97] * 23 + [0]
    ids, ends = torch.tensor([[97, 0, 0], [97, 98, 0]]), torch.tensor([1, 2])
    assert task.texts.of_ids(ids, ends).tolist() == [[97, 0, NO_TOKEN], [97, 98, 0]]

    class Started(type(task.texts._tokenizer)):  # type: ignore[misc]
        specials = {0: "\\0", 511: "<|startoftext|>"}

    texts = Texts(Started(), 5)
    assert texts.length == 4 and texts.of_texts(["ab", "abcdef"]).tolist() == [
        [511, 97, 98, 0, NO_TOKEN], [511, 97, 98, 99, 0],
    ]  # fmt: skip
    assert texts.of_ids(torch.tensor([[97, 0, 0, 0]]), torch.tensor([1])).tolist() == [[511, 97, 0, NO_TOKEN, NO_TOKEN]]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"pipe_parallel_size": 2}, "pipe_parallel_size: a model of 2 towers cannot be cut into 2 stages; set it to 1"),
        ({"sequence_parallel": True, "model_parallel_size": 2}, "sequence_parallel: the vector of a text is that of"),
        ({"model_parallel_size": 2, "text_tower": {"num_attention_heads": 1}},
         "2 ranks cannot share text_tower.num_attention_heads 1 evenly"),
        ({"text_tower": {"num_attention_heads": 5}}, "text_tower.num_attention_heads: 5 heads do not divide"),
        ({"text_tower": {"num_layer": 5}}, "text_tower.num_layer: unknown key; did you mean text_tower.num_layers"),
        ({"mixup": 0.5}, "mixup: is for labels, and captions cannot be mixed"),
        ({"train_batch_size": 1}, "train_batch_size: every sample of an update is compared with the others of it"),
        ({"num_classes": 5}, "num_classes: unknown key; it is of task image_classification"),
        ({"padded_vocab_size": 300}, "padded_vocab_size: 300 rows cannot hold the vocabulary of 512 token ids"),
        ({"split": "90,5,5"}, "eval_iters: an evaluation reads whole updates, 8 samples each, and the valid set has"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line(
    pairs: str, tmp_path: Path, keys: dict[str, Any], message: str, single_process: None
) -> None:
    settings = {**KEYS, "data_path": pairs, "save": str(tmp_path), **keys}
    with pytest.raises(UserError, match=message) as error:
        train(resolve_config([], settings, checks=[find_training_mistakes]).config)
    assert "\n" not in str(error.value)
    assert not list(tmp_path.glob("global_step*"))


def test_other_runs_do_not_know_the_text_tower() -> None:
    language = {"num_layers": 1, "hidden_size": 8, "num_attention_heads": 1, "seq_length": 8}
    for keys in ({"text_tower": {"num_layers": 1}}, {"text_tower.num_layers": 1}, {"embed_dim": 8}):
        with pytest.raises(UserError, match="unknown key; it is of task clip"):
            load_config([], {**language, **keys})


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"images": torch.zeros(1, 3, 8, 8), "ids": torch.zeros(1, 4)}, r"an image of the data is \[3, 8, 8\]"),
        ({"images": torch.zeros(1, 1, 8, 8), "ids": torch.tensor([[3, 512]])}, "the captions have token id 512"),
        ({"images": torch.zeros(1, 1, 8, 8), "ids": torch.tensor([[-3, 5]])}, "the captions have token id -3"),
    ],
)
def test_a_batch_that_the_model_cannot_take_is_one_line(batch: dict[str, torch.Tensor], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_task(load_config([], KEYS)).check(batch)


def test_the_demo_asks_with_the_templates_that_its_captions_are_made_of(tmp_path: Path) -> None:
    pytest.importorskip("sklearn", reason="scikit-learn is not installed: requirements/requirements-eval.txt")
    write_digits(tmp_path / "digits.npz")
    digits = np.load(tmp_path / "digits.npz")
    templates = load_config(CONFIGS / "demo_digits.yml").evaluation.zero_shot_templates
    assert templates == list(TEMPLATES) and not set(templates) & set(UNSEEN_TEMPLATES)
    for number in (0, 1796):
        word = digits["classes"][digits["labels"][number]]
        assert digits["text"][number].tolist() == [template.replace("{}", word) for template in templates]
    assert digits["images"].shape == (1797, 8, 8) and digits["images"].max() == 255


CONFIGS = Path(__file__).parents[2] / "configs/clip"


@pytest.mark.parametrize(("name", "count"), [("B16", 149_421_057), ("ViT_B16", 149_620_737)])
def test_a_configuration_has_as_many_parameters_as_it_says(name: str, count: int) -> None:
    path = CONFIGS / f"{name}_datacomp.yml"
    model = load_config(path).with_vocabulary(49408).model
    assert build_model(model, device="meta").num_parameters() == count
    assert f"{count:,}" in path.read_text(encoding="utf-8").splitlines()[0]
