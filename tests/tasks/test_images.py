"""Learning to classify images: training, evaluation, resuming, growth, layouts and mistakes."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron.checkpoint.store import CheckpointReader
from megatron.config import RunConfig, load_config
from megatron.config.checks import find_training_mistakes
from megatron.config.load import resolve_config
from megatron.errors import UserError
from megatron.evaluation.batching import Batches
from megatron.evaluation.images import classify
from megatron.exchange import open_checkpoint
from megatron.inference.load import model_of
from megatron.model.build import build_model
from megatron.model.fill import fill
from megatron.mpu.layout import SINGLE
from megatron.tasks import build_task
from megatron.training import train
from tests.ranks import run_ranks
from tests.tasks.image_runs import CLASSES, IMAGES, KEYS, config_of, write_images
from tests.training.cases import TOLERANCE, Case, metrics
from tests.training.test_layouts import train_all
from tools.ckpts.grow import main as grow_main

NAMES = ("loss", "valid_loss", "valid_acc1", "valid_acc5", "test_loss", "test_acc1")
PATCHES_ALONE = {"class_token": False, "global_pool": "avg"}
GROWTH = [{"at_iteration": 60, "qkv_slot_num": 32, "proj_slot_num": 32, "ffn_slot_num": 56, "lr_policy": "continue"}]
DECAY = 0.9
EVERYTHING = {
    "auto_augment": "rand-m9-mstd0.5-inc1", "reprob": 0.25, "hflip": 0.5, "scale": [0.3, 1], "mixup": 0.8,
    "cutmix": 1.0, "label_smoothing": 0.1, "drop_path_rate": 0.3, "hidden_dropout": 0.1, "ema_decay": 0.8,
}  # fmt: skip


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_images(tmp_path_factory.mktemp("images") / "corners")


@pytest.fixture(scope="module")
def trained(images: str, tmp_path_factory: pytest.TempPathFactory, single_process: None) -> Path:
    """A run of one process that has learned something, with an average of its weights."""
    folder = tmp_path_factory.mktemp("trained")
    train(config_of(images, folder, train_iters=60, lr_decay_iters=60, eval_interval=60, ema_decay=DECAY))
    return folder


def logits_of(folder: Path, inputs: torch.Tensor, use_ema: bool = False) -> torch.Tensor:
    checkpoint = open_checkpoint(folder)
    checkpoint = checkpoint.averaged() if use_ema else checkpoint
    model = build_model(checkpoint.model_config)
    fill(model, checkpoint.tensors, SINGLE)
    with torch.no_grad():
        outputs: torch.Tensor = model.eval()(inputs)
    return outputs


def test_it_learns_and_every_image_is_evaluated_once(images: str, trained: Path) -> None:
    losses = metrics(trained, "loss")
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])
    task = build_task(config_of(images, trained))
    valid = task.datasets([8, 8, 8], {}).valid
    batch = task.collate([valid[i] for i in range(len(valid))], len(valid))
    (inputs,), (labels,) = task.split(batch, torch.device("cpu"))
    logits = logits_of(trained, inputs, use_ema=True)
    assert len(labels) == IMAGES // 10 and metrics(trained, "valid_acc5") == [1.0]  # of four classes
    assert metrics(trained, "valid_acc1") == pytest.approx([(logits.argmax(1) == labels).float().mean().item()])
    expected = torch.nn.functional.cross_entropy(logits, labels).item()
    assert metrics(trained, "valid_loss") == pytest.approx([expected], rel=1e-5), "evaluation takes the average"
    assert (logits - logits_of(trained, inputs)).abs().max() > 1e-2, "which is another model than the weights"
    assert metrics(trained, "valid_acc1")[0] > 0.8


def test_top_five_are_counted() -> None:
    task = build_task(load_config([], {**KEYS, "num_classes": 8}))
    logits = torch.arange(8.0).repeat(4, 1)  # class 7 first
    sums = task.measure(logits, (torch.tensor([7, 3, 2, -1]),), SINGLE).tolist()
    losses = -logits.log_softmax(-1)[0, [7, 3, 2]]
    assert sums == pytest.approx([losses.sum().item(), 1, 2, 3])
    assert task.metrics("test", dict(zip(task.measures, sums, strict=True)))["test_acc5"] == pytest.approx(2 / 3)


def test_labels_may_be_shares_of_classes() -> None:
    task = build_task(load_config([], KEYS))
    logits, share = torch.randn(2, CLASSES), torch.tensor([[0.75, 0.0, 0.25, 0.0], [0.0, 0.0, 0.0, 1.0]])
    expected = -(share * logits.log_softmax(-1)).sum(1).mean()
    assert task.loss(logits, (share,), SINGLE).item() == pytest.approx(expected.item())


def test_images_are_normalised_as_the_model_wants_them() -> None:
    task = build_task(load_config([], {**KEYS, "image_mean": [0.2], "image_std": [0.4]}))
    pixels = torch.tensor([[[[0, 255]]]], dtype=torch.uint8)
    (inputs,), _ = task.split({"images": pixels, "labels": torch.tensor([0])}, torch.device("cpu"))
    assert inputs.flatten().tolist() == pytest.approx([-0.5, 2.0]) and inputs.dtype == torch.float32


def test_it_resumes_bit_for_bit_with_everything_random(images: str, tmp_path: Path, single_process: None) -> None:
    for stop in (2, None):
        train(config_of(images, tmp_path / "parts", **EVERYTHING, exit_interval=stop))
    train(config_of(images, tmp_path / "whole", **EVERYTHING))
    whole, parts = (CheckpointReader(tmp_path / name / "global_step5") for name in ("whole", "parts"))
    assert metrics(tmp_path / "whole", "loss") == metrics(tmp_path / "parts", "loss")
    for kind in ("model", "optimizer", "ema"):
        assert whole.names(kind) == parts.names(kind)
        assert all(whole.tensor(kind, name).equal(parts.tensor(kind, name)) for name in whole.names(kind))


# What layouts do to the layers that language models have, too, is for tests/training; here each meets images once.
CASES = [
    Case(tensor=2),
    Case(tensor=2, model="transformer"),
    Case(tensor=2, sequence=True, model="uneven"),
    Case(tensor=2, sequence=True, model="softmax"),
    Case(pipeline=2),
    Case(pipeline=2, zero=1, model="transformer"),
    Case(data=2, zero=1, model="softmax"),
    Case(data=2, zero=2, model="uneven"),
    Case(data=2, zero=3, keys={"checkpoint_activations": True}),
    Case(tensor=2, pipeline=2),
    Case(data=2, tensor=2, model="transformer"),
    Case(data=2, pipeline=2, zero=1),
    Case(data=2, tensor=2, zero=3, sequence=True, model="uneven"),
]


def keys_of(case: Case) -> dict[str, Any]:
    own = case.config_keys()
    without_class_token = case.sequence or case.model == "softmax"
    if case.model == "transformer":
        own |= dict.fromkeys(("qkv_slot_num", "proj_slot_num", "ffn_slot_num"))
    return {**own, **(PATCHES_ALONE if without_class_token else {})}


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    reader = CheckpointReader(folder / "global_step5")
    return {f"{kind}/{n}": reader.tensor(kind, n) for kind in ("model", "optimizer", "ema") for n in reader.names(kind)}


def assert_same_run(found: Path, expected: Path, case: str, names: Sequence[str] = NAMES) -> None:
    for name in names:
        assert metrics(found, name) == pytest.approx(metrics(expected, name), abs=TOLERANCE), (case, name)
    assert metrics(found, "grad_norm") == pytest.approx(metrics(expected, "grad_norm"), rel=TOLERANCE), case
    left, right = tensors(found), tensors(expected)
    assert left.keys() == right.keys(), case
    for name, tensor in right.items():
        assert torch.allclose(left[name].double(), tensor.double(), rtol=0, atol=TOLERANCE), (case, name)


@pytest.fixture(scope="module")
def one_process(images: str, tmp_path_factory: pytest.TempPathFactory, single_process: None) -> dict[str, Path]:
    """Runs of one process, by model and whether it has a class token."""
    root, found = tmp_path_factory.mktemp("one"), {}
    for case in CASES:
        has_class_token = keys_of(case).get("class_token", True)
        keys = keys_of(Case(model=case.model)) | ({} if has_class_token else PATCHES_ALONE)
        name = f"{case.model}-{has_class_token}"
        if name not in found:
            found[name] = root / name
            train(config_of(images, found[name], **keys))
    return found


@pytest.mark.processes
@pytest.mark.parametrize("world", sorted({case.world for case in CASES}))
def test_a_layout_trains_as_one_process_does(
    images: str, one_process: dict[str, Path], tmp_path: Path, world: int
) -> None:
    cases = [case for case in CASES if case.world == world]
    run_ranks(world, train_all, [config_of(images, tmp_path / case.name, **keys_of(case)) for case in cases])
    for case in cases:
        expected = one_process[f"{case.model}-{keys_of(case).get('class_token', True)}"]
        assert_same_run(tmp_path / case.name, expected, case.name)


@pytest.mark.processes
def test_a_trained_model_grows_in_every_layout(images: str, trained: Path, tmp_path: Path) -> None:
    """What a run records is the largest difference of logits on held-out images."""
    axes = {
        "one": {}, "tensor": {"model_parallel_size": 2}, "pipeline": {"pipe_parallel_size": 2},
        "zero": {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}},
    }  # fmt: skip
    for name in axes:
        shutil.copytree(trained, tmp_path / name)
    more = {"train_iters": 62, "lr_decay_iters": 60, "growth": GROWTH, "ema_decay": DECAY}
    configs = [config_of(images, tmp_path / name, **more, **keys) for name, keys in axes.items()]
    train(configs[0])
    run_ranks(2, train_all, configs[1:])
    for name in axes:
        [entry] = open_checkpoint(tmp_path / name).train_state["lineage"]
        assert entry["added"].startswith("qkv 24 -> 32") and entry["logit_difference"] < 1e-6, name
        assert entry["ema_logit_difference"] < 1e-6, name
        assert metrics(tmp_path / name, "loss") == pytest.approx(metrics(tmp_path / "one", "loss"), abs=TOLERANCE), name


Computed = Callable[[Path], tuple[torch.Tensor, list[int], int]]
COUNTS = {"qkv_slot_num": 48, "proj_slot_num": 48, "ffn_slot_num": 80}
NEW_KEYS: dict[str, dict[str, Any]] = {
    "zero": {"new_keys": "zero"}, "rotated": {"new_keys": "rotated"}, "random": {"row_norm": "segment"},
}  # fmt: skip
STILL, NO_STEP = {"lr": 1e-30, "warmup": 0.0}, {"ema_decay": 1 - 1e-12}
"""What moves no weight, and no average: what is saved after an update is the model that has just grown."""
LAYOUTS: dict[str, dict[str, Any]] = {
    "tensor": {"model_parallel_size": 2}, "pipeline": {"pipe_parallel_size": 2},
    "zero": {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}},
}  # fmt: skip
OWN_NORMS: dict[str, dict[str, Any]] = {
    "softmax": LAYOUTS["tensor"], "gelu_l2_norm": {**LAYOUTS["pipeline"], "zero_optimization": {"stage": 1}},
}  # fmt: skip


@pytest.fixture(scope="module")
def computed(images: str, trained: Path) -> Computed:
    """Of a checkpoint: logits of noise by its weights and by their average, the classes that all images are taken for,
    and the number of its parameters."""
    inputs = torch.randn(16, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    task = build_task(config_of(images, trained, data_path=None, train_data_paths=[images], valid_data_paths=[images]))
    dataset = task.datasets([8, 8, 0], {}).valid

    @cache
    def compute(folder: Path) -> tuple[torch.Tensor, list[int], int]:
        checkpoint = open_checkpoint(folder)
        classes = classify(model_of(checkpoint), task, dataset, Batches(IMAGES)).classes
        logits = torch.stack([logits_of(folder, inputs, use_ema) for use_ema in (False, True)])
        return logits, classes.tolist(), checkpoint.num_parameters

    return compute


def assert_same_function(computed: Computed, before: Path, after: Path, kind: str) -> None:
    (logits, classes, count), (grown, grown_classes, grown_count) = computed(before), computed(after)
    tolerance = 1e-5 if kind == "rotated" else 1e-6
    assert (logits - grown).abs().max() <= tolerance * logits.abs().max(), (after.name, kind)
    assert len(classes) == IMAGES and classes == grown_classes and grown_count > count, (after.name, kind)


@pytest.mark.parametrize("kind", NEW_KEYS)
def test_a_trained_checkpoint_grows_on_disk_without_another_output(
    computed: Computed, trained: Path, tmp_path: Path, kind: str
) -> None:
    flags = [f"--{key.replace('_', '-')}={value}" for key, value in NEW_KEYS[kind].items()]
    grow_main([str(trained), str(tmp_path / "larger"), "--qkv=48", "--proj=48", "--ffn=80", *flags])
    assert_same_function(computed, trained, tmp_path / "larger", kind)


@pytest.mark.processes
def test_a_trained_model_is_the_same_after_its_growth_in_every_layout(
    images: str, computed: Computed, trained: Path, tmp_path: Path
) -> None:
    """By the schedule of a run with one kind of keys in each, and from a smaller model's checkpoint with another; that
    of the other activations, whose new tokens have a row norm of their own, is one of an update."""
    runs, others = dict[Path, tuple[str, RunConfig]](), dict[Path, Path]()
    still = {"optimizer": {**KEYS["optimizer"], "params": {"lr": STILL["lr"]}}, "train_iters": 1, "eval_interval": 1}
    for (layout, axes), kind, other in zip(LAYOUTS.items(), NEW_KEYS, ("rotated", "random", "zero"), strict=True):
        folder = tmp_path / f"{layout}-{kind}"
        shutil.copytree(trained, folder)
        growth = [{"at_iteration": 60, **COUNTS, **NEW_KEYS[kind], **STILL, "lr_policy": "restart"}]
        keys = {"train_iters": 61, "lr_decay_iters": 60, "eval_interval": 61}
        runs[folder] = kind, config_of(images, folder, **keys, **axes, **NO_STEP, growth=growth)
        folder = tmp_path / f"{layout}-from-{other}"
        smaller = {"pretrain_partial_init": str(trained), **COUNTS, **NEW_KEYS[other]}
        runs[folder] = other, config_of(images, folder, **smaller, **axes, **still, **NO_STEP)
    for activation, axes in OWN_NORMS.items():
        folder, before = tmp_path / f"{activation}-grown", tmp_path / activation
        once = {"train_iters": 1, "eval_interval": 1, "ema_decay": DECAY}
        train(config_of(images, before, norm_activation_type=activation, **once))
        keys = {"norm_activation_type": activation, "pretrain_partial_init": str(before), "row_norm": "segment"}
        runs[folder] = "random", config_of(images, folder, **keys, **COUNTS, **axes, **still, **NO_STEP)
        others[folder] = before
    run_ranks(2, train_all, [config for _, config in runs.values()])
    for folder, (kind, _) in runs.items():
        assert_same_function(computed, others.get(folder, trained), folder, kind)
        names = ("valid_acc1", "valid_loss") if folder not in others else ()
        for name in names:  # as the engine of that layout finds them
            assert metrics(folder, name)[-1] == pytest.approx(metrics(trained, name)[-1], rel=1e-4), (folder.name, name)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"mixup": 0.8, "train_micro_batch_size_per_gpu": 1}, "mixup: images are mixed two by two, and train_mic"),
        ({"cutmix": 1, "train_batch_size": 7}, "cutmix: images are mixed two by two, and train_batch_size 7 is odd"),
        ({"mixup": 1, "train_batch_size": 6, "gradient_accumulation_steps": 2},
         "mixup: images are mixed two by two, and train_batch_size 6 is 2 times an odd number"),
        ({"auto_augment": "rand-m9"}, "override: auto_augment: only operations that grow stronger"),
        ({"task": "image_clasification"}, "task: there is no task 'image_clasification'; there are language, image_cl"),
        ({"sequence_parallel": True, "model_parallel_size": 2}, "sequence_parallel: the ranks' shares of the tokens"),
        ({"sequence_parallel": True, "model_parallel_size": 2, **PATCHES_ALONE, "patch_size": 8},
         "sequence_parallel: 1 patches are no multiple of model_parallel_size 2"),
        ({"patch_size": 3}, "patch_size: 3 pixels do not divide image_size 8"),
        ({"class_token": False}, "global_pool: token reads the class token, and class_token is false"),
        ({"seq_length": 64}, "seq_length: unknown key; it is of task language"),
        ({"num_classes": 3}, "image 3 has label 3, and num_classes 3 allows 0 to 2"),
        ({"in_channels": 2}, "in_channels: .*images are grey"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line(
    images: str, tmp_path: Path, keys: dict[str, Any], message: str, single_process: None
) -> None:
    settings = {**KEYS, "data_path": images, "save": str(tmp_path), **keys}
    with pytest.raises(UserError, match=message) as error:
        train(resolve_config([], settings, checks=[find_training_mistakes]).config)
    assert "\n" not in str(error.value)
    assert not list(tmp_path.glob("global_step*"))


def test_a_text_run_does_not_know_the_keys_of_images() -> None:
    for key, value in (("image_size", 224), ("num_classes", 10), ("label_smoothing", 0.1)):
        with pytest.raises(UserError, match=f"{key}: unknown key; it is of task image_classification"):
            load_config([], {"num_layers": 1, "hidden_size": 8, "num_attention_heads": 1, "seq_length": 8, key: value})


@pytest.mark.parametrize(
    ("shape", "labels", "message"),
    [
        ((2, 1, 8, 8), torch.tensor([0, 4]), "data_path: the data has label 4, and num_classes 4 allows 0 to 3"),
        ((2, 1, 8, 8), torch.tensor([-2, 0]), "the data has label -2"),
        ((2, 1, 8, 8), torch.rand(2, 5), "num_classes: 4, and the labels of the data are of 5 classes"),
        ((2, 3, 8, 8), torch.tensor([0, 1]), r"an image of the data is \[3, 8, 8\], the model takes \[1, 8, 8\]"),
    ],
)
def test_a_batch_that_the_model_cannot_take_is_one_line(
    shape: tuple[int, ...], labels: torch.Tensor, message: str
) -> None:
    task = build_task(load_config([], KEYS))
    with pytest.raises(UserError, match=message):
        task.check({"images": torch.zeros(shape, dtype=torch.uint8), "labels": labels})


def test_another_model_than_the_checkpoint_has_is_blamed_on_its_key(images: str, trained: Path) -> None:
    for key, value in (("num_classes", 5), ("image_size", 16)):
        with pytest.raises(UserError, match=f"{key}: {value} in the configuration"):
            train(config_of(images, trained, **{key: value}))
