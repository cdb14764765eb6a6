"""eval.py's run of an image classifier: accuracy, classes, pictures, ranks, and what it says of mistakes."""

from __future__ import annotations

import io
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from eval_tasks.confusion import draw_confusion
from eval_tasks.run import run_evaluation
from megatron.config import RunConfig
from megatron.config.cli import parse_run
from megatron.data import IndexedDataset, IndexedDatasetBuilder
from megatron.errors import UserError, run_command
from megatron.evaluation.batching import Batches
from megatron.evaluation.images import Predictions, classify
from megatron.exchange import open_checkpoint
from megatron.inference.load import model_of
from megatron.mpu.processes import join
from megatron.tasks import ImageClassificationTask
from megatron.training import train
from tests.random_models import make_config, save_random_models
from tests.ranks import run_ranks
from tests.tasks.image_runs import IMAGES, config_of, write_images

CLASSES = 8
NAMES = ["tench", "crane", "crane", "$x^$", "\u9db4", "a" * 40, "drake", "hen"]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> str:
    """70 images of eight classes, two of which have one name."""
    folder = tmp_path_factory.mktemp("images")
    prefix = write_images(folder / "corners", [number % CLASSES for number in range(IMAGES)])
    (folder / "corners_classes.txt").write_text("\n".join(NAMES), encoding="utf-8")
    return prefix


@pytest.fixture(scope="module")
def run(images: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with random weights."""
    folder = tmp_path_factory.mktemp("run")
    save_random_models(folder, evaluated(images, folder), (7,))
    return folder


def evaluated(images: str, folder: Path, **keys: Any) -> RunConfig:
    keys = {"num_classes": CLASSES, "init_method_std": 1.0, "eval_results_prefix": f"{folder}/results/", **keys}
    return config_of(images, folder, **{"eval_data_paths": [images], **keys})


def logits_of(config: RunConfig, images: str) -> torch.Tensor:
    """Of the images one after the other, read and normalised by hand, [70, classes]."""
    indexed, model = IndexedDataset(images), model_of(open_checkpoint(str(config.checkpoint.load)))
    pictures = [Image.open(io.BytesIO(indexed[number].tobytes())) for number in range(IMAGES)]
    pixels = torch.from_numpy(np.stack([np.array(picture)[None] for picture in pictures]))
    with torch.no_grad():
        logits: torch.Tensor = model((pixels / 255 - 0.5) / 0.5)
    return logits


def test_accuracy_is_that_of_the_most_likely_classes(
    images: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = evaluated(images, run, eval_results_prefix=str(tmp_path / "a"))
    results = run_evaluation(config)
    logits, labels = logits_of(config, images), torch.arange(IMAGES) % CLASSES
    correct = logits.argmax(1) == labels
    in_best = (logits.argsort(1, descending=True)[:, :5] == labels[:, None]).any(1)
    losses = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    found = results["results"]["corners"]
    assert found["num_images"] == IMAGES and 0 < found["acc,none"] < found["acc5,none"] < 1
    assert found["acc,none"] == pytest.approx(correct.double().mean().item())
    assert found["acc5,none"] == pytest.approx(in_best.double().mean().item())
    assert found["loss,none"] == pytest.approx(losses.mean().item(), rel=1e-5)
    metrics = pytest.importorskip("lm_eval.api.metrics", reason="lm-eval's standard errors are compared with")
    assert found["acc_stderr,none"] == pytest.approx(metrics.mean_stderr(correct.double().tolist()))
    assert found["loss_stderr,none"] == pytest.approx(metrics.mean_stderr(losses.tolist()), rel=1e-4)
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["corners", "acc", f"{found['acc,none']:.4f}", f"{found['acc_stderr,none']:.4f}"] in rows
    (written,) = tmp_path.glob("a_eval_results_*.json")
    assert json.loads(written.read_text(encoding="utf-8"))["results"]["corners"] == found
    assert results["checkpoint"].endswith("global_step7") and "classes" not in results


def test_the_runs_own_sets_are_evaluated_and_limited(images: str, run: Path) -> None:
    def number(**keys: Any) -> int:
        config = evaluated(images, run, eval_data_paths=None, **keys)
        found: int = run_evaluation(config)["results"]["corners"]["num_images"]
        return found

    assert [number(), number(eval_split="train"), number(eval_split="train", eval_limit=9)] == [7, 56, 9]
    assert number(data_path=None, train_data_paths=[images], valid_data_paths=[images]) == IMAGES


def test_classes_are_told_apart_by_number_and_name(
    images: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = evaluated(images, run, per_class=True, confusion=True, eval_results_prefix=f"{tmp_path}/")
    results = run_evaluation(config)
    classes = results["classes"]["corners"]
    assert [values["name"] for values in classes] == NAMES and len({values["class"] for values in classes}) == CLASSES
    assert sum(values["num_images"] for values in classes) == IMAGES
    right = sum(values["num_images"] * values["acc"] for values in classes)
    assert right / IMAGES == pytest.approx(results["results"]["corners"]["acc,none"])
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("7"))
    assert line.split()[:2] == ["7", "hen"] and f"{classes[7]['acc']:.4f}" in line
    picture = Path(results["pictures"]["corners"])
    assert picture.parent == tmp_path and picture.name.endswith("_corners_confusion.png")
    with Image.open(picture) as image:
        assert image.format == "PNG" and min(image.size) > 300


def test_classes_are_the_checkpoints(images: str, run: Path, tmp_path: Path) -> None:
    """Their names are those of a set that has none, and a set that numbers them in another way is refused."""
    shutil.copytree(run, tmp_path / "run")
    names = [f"class {number}" for number in range(CLASSES)]
    (tmp_path / "run/classes.txt").write_text("\n".join(names), encoding="utf-8")
    plain = write_images(tmp_path / "plain")
    results = run_evaluation(evaluated(plain, tmp_path / "run", per_class=True))
    assert [values["name"] for values in results["classes"]["plain"]] == names
    message = "corners_classes.txt: class 0 is tench, and class 0 in the checkpoint; prepare these images again, with"
    with pytest.raises(UserError, match=message):
        run_evaluation(evaluated(images, tmp_path / "run"))


def test_a_picture_shows_what_is_taken_for_what() -> None:
    def dark_columns(counts: list[list[int]]) -> float:
        """Where the pixels of the darkest blue are on average."""
        with Image.open(io.BytesIO(draw_confusion(np.array(counts), ["a", "b"], "$"))) as image:
            pixels = np.array(image.convert("RGB"), dtype=int)
        return float(np.argwhere((pixels[..., 2] > 90) & (pixels[..., 0] < 40))[:, 1].mean())

    assert dark_columns([[9, 0], [9, 0]]) + 30 < dark_columns([[0, 9], [0, 9]])


def test_predictions_are_summed_up_by_hand() -> None:
    labels, classes = np.array([0, 0, 0, 2, 2, 3]), np.array([0, 1, 1, 2, 0, 3])
    found = Predictions(labels, classes, np.array([True] * 5 + [False]), np.arange(6.0))
    assert found.metrics()["acc"] == 0.5 and found.metrics()["acc5"] == pytest.approx(5 / 6)
    assert found.metrics()["acc_stderr"] == pytest.approx((0.25 / 5) ** 0.5)
    assert found.confusion(4).tolist() == [[1, 2, 0, 0], [0, 0, 0, 0], [1, 0, 1, 0], [0, 0, 0, 1]]
    zero, one, two, three = found.of_classes(4)
    assert (zero["num_images"], zero["acc"], zero["taken_for"], zero["taken"]) == (3, pytest.approx(1 / 3), 1, 2)
    assert one == {"class": 1, "num_images": 0}
    assert (two["acc"], two["taken_for"], two["taken"]) == (0.5, 0, 1)
    assert three["acc"] == 1.0 and np.isnan(three["acc_stderr"]) and "taken_for" not in three


@pytest.mark.parametrize("size", [40, "auto"])
def test_images_that_do_not_fit_in_memory_are_computed_in_smaller_batches(
    images: str, run: Path, size: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = evaluated(images, run, split="100,0,0")
    model, task = model_of(open_checkpoint(run)), ImageClassificationTask(config)
    whole = config.replaced(**{"data.train_data_paths": [images], "data.data_path": None})
    dataset = (
        ImageClassificationTask(whole.replaced(**{"data.valid_data_paths": [images]})).datasets([8, 8, 0], {}).valid
    )
    expected = classify(model, task, dataset)
    forward = model.forward

    def limited(inputs: torch.Tensor, **keywords: Any) -> torch.Tensor:
        if len(inputs) > 60 or len(inputs) == 40:
            raise torch.OutOfMemoryError("CUDA out of memory")
        logits: torch.Tensor = forward(inputs, **keywords)
        return logits

    monkeypatch.setattr(model, "forward", limited)
    found = classify(model, task, dataset, Batches(size, what="images"))
    assert (found.classes == expected.classes).all() and (found.labels == expected.labels).all()
    assert found.losses == pytest.approx(expected.losses, rel=1e-5)


LAYOUTS: dict[str, dict[str, Any]] = {
    "pipeline": {"pipe_parallel_size": 2},
    "zero": {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}},
}


def train_and_evaluate(trained: list[RunConfig], asked: list[RunConfig]) -> list[dict[str, Any]]:
    for config in trained:
        train(config)
    return [run_evaluation(config, join(config.parallel.model_parallel_size, "gloo"))["results"] for config in asked]


@pytest.mark.processes
def test_every_image_counts_once_on_any_ranks_from_a_checkpoint_of_any_layout(images: str, tmp_path: Path) -> None:
    runs = {name: evaluated(images, tmp_path / name, **keys, train_iters=1) for name, keys in LAYOUTS.items()}
    trained = [config.replaced(**{"training.eval_iters": 0}) for config in runs.values()]
    tensor = {"parallel.model_parallel_size": 2, "parallel.pipe_parallel_size": 0}
    two = run_ranks(
        2, train_and_evaluate, trained, [*runs.values(), *(run.replaced(**tensor) for run in runs.values())]
    )
    for number, config in enumerate(runs.values()):
        expected = run_evaluation(config)["results"]["corners"]
        shared = [rank[place]["corners"] for rank in two for place in (number, number + 2)]
        assert expected["num_images"] == IMAGES and len(shared) == 4
        for found in shared:
            same = {
                key: pytest.approx(value, rel=1e-4) if isinstance(value, float) else value
                for key, value in expected.items()
            }
            assert found == same
    assert len(list((tmp_path / "zero" / "results").glob("*.json"))) >= 1


def said(config: RunConfig, folder: Path, capsys: pytest.CaptureFixture[str], *flags: str) -> str:
    """The line that eval.py ends with."""
    file = folder / "run.yml"
    file.write_text(yaml.safe_dump(config.flat()), encoding="utf-8")

    def command() -> None:
        run_evaluation(parse_run([str(file), *flags], "eval.py")[0])

    assert run_command(command) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


@pytest.mark.parametrize(
    ("keys", "flags", "message"),
    [
        ({"num_classes": 9}, [], "num_classes: {images}_classes.txt names 8 classes, got 9; set 8"),
        ({"hidden_size": 64}, [], "hidden_size: 64 in the configuration, 32 in checkpoint"),
        ({}, ["--eval_data_paths", "absent_image_document"], "absent_image_document"),
        ({}, ["--eval_data_paths", "{images}_label_document"], "not images, whose prefix ends in _image_document"),
        ({}, ["--eval_data_paths", "{set}", "{set}"], "eval_data_paths: two sets are called corners"),
        ({"eval_data_paths": None, "split": "90,10,0"}, ["--eval_split", "test"], "eval_split: no test images"),
        ({}, ["--eval_split", "testing"], "eval_split: 'testing' is not supported"),
        ({}, ["--eval_tasks", "piqa"], "eval_tasks: this is for language models, and not for what learns 'image_cl"),
        ({}, ["--perplexity", "x.txt"], "perplexity_data: this is for language models"),
        ({"load": None}, [], "load: no checkpoint configured"),
        ({"eval_ckpt": "absent"}, [], "eval_ckpt: absent does not exist"),
    ],
)
def test_a_mistake_is_one_line(
    images: str,
    run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    keys: Any,
    flags: list[str],
    message: str,
) -> None:
    stem = images.removesuffix("_image_document")
    asked = [flag.format(images=stem, set=images) for flag in flags]
    assert message.format(images=stem) in said(evaluated(images, run, **keys), tmp_path, capsys, *asked)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--eval_data_paths", "x"],
            "eval_data_paths: this is for models of images, and not for what learns 'language'",
        ),
        (["--per_class"], "per_class: this is for image classifiers"),
        (["--perplexity", "{text}"], "task: language in the configuration, image_classification in checkpoint"),
    ],
)
def test_a_language_model_is_not_asked_for_images(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    (tmp_path / "x.txt").write_text("The ferry leaves.")
    asked = [flag.format(text=tmp_path / "x.txt") for flag in flags]
    assert message in said(make_config(load=str(run)), tmp_path, capsys, *asked)


def test_an_image_model_is_not_read_from_a_language_checkpoint(
    images: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_random_models(tmp_path / "text", make_config(), (3,))
    line = said(evaluated(images, tmp_path / "text"), tmp_path, capsys)
    assert "task: image_classification in the configuration, language in checkpoint" in line


@pytest.mark.parametrize(
    ("label", "size", "message"),
    [
        (8, None, "x_label_document.bin: image 3 has label 8, and num_classes 8 allows 0 to 7"),
        (3, 50, "x_image_document.bin: image 3 cannot be decoded ("),
    ],
)
def test_data_that_a_model_cannot_take_is_one_line(
    images: str,
    run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    label: int,
    size: int | None,
    message: str,
) -> None:
    whole = IndexedDataset(images)
    with (
        IndexedDatasetBuilder(tmp_path / "x_image_document", np.uint8) as pictures,
        IndexedDatasetBuilder(tmp_path / "x_label_document", np.int32) as labels,
    ):
        for number in range(5):
            pictures.add_document(whole[number][: size if number == 3 else None])
            labels.add_document([label if number == 3 else 0])
        pictures.finalize()
        labels.finalize()
    config = evaluated(images, run, eval_data_paths=[f"{tmp_path}/x_image_document"])
    assert message in said(config, tmp_path, capsys)


def test_a_picture_needs_matplotlib_and_not_too_many_classes(
    images: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    many = evaluated(images, run, confusion=True, num_classes=3000)
    assert "confusion: a picture of 3000 classes would be too large" in said(many, tmp_path, capsys)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    line = said(evaluated(images, run, confusion=True), tmp_path, capsys)
    assert line.endswith("confusion: the matplotlib package is not installed; pip install matplotlib")
