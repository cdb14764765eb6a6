"""eval.py's run of a model of images and texts: zero-shot classes, retrieval, ranks, and what it says of mistakes."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torch import Tensor

from eval_tasks.run import run_evaluation
from megatron.config import RunConfig
from megatron.config.cli import parse_run
from megatron.data import IndexedDataset
from megatron.errors import run_command
from megatron.evaluation.retrieval import SetFeatures, recalls
from megatron.exchange import open_checkpoint
from megatron.inference.load import model_of
from megatron.model.clip_model import NO_TOKEN
from megatron.mpu.processes import join
from tests.random_models import save_random_models
from tests.ranks import run_ranks
from tests.tasks.pair_runs import CORNERS, PAIRS, captions_of, config_of, write_pairs

ASKED = ["a {} corner", "{}", "bright: {}"]
ONE = 1.1 / PAIRS
"""A neighbour that is as near but for rounding."""


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_pairs(tmp_path_factory.mktemp("pairs") / "corners", numbered=True)


@pytest.fixture(scope="module")
def run(pairs: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with random weights."""
    folder = tmp_path_factory.mktemp("run")
    save_random_models(folder, evaluated(pairs, folder).with_vocabulary(512), (7,))
    return folder


def evaluated(pairs: str, folder: Path, **keys: Any) -> RunConfig:
    keys = {"init_method_std": 1.0, "eval_results_prefix": f"{folder}/results/", "eval_data_paths": [pairs], **keys}
    return config_of(pairs, folder, **keys)


def ids_of(texts: list[str]) -> Tensor:
    rows = [[*text.encode()[:23], 0] for text in texts]
    return torch.tensor([row + [NO_TOKEN] * (24 - len(row)) for row in rows])


def features_of(run: Path, pairs: str, texts: list[str]) -> tuple[Tensor, Tensor, Tensor]:
    """Of the images one after the other, read and normalised by hand, and of texts."""
    indexed = IndexedDataset(pairs)
    pictures = [Image.open(io.BytesIO(indexed[number].tobytes())) for number in range(PAIRS)]
    pixels = torch.from_numpy(np.stack([np.array(picture)[None] for picture in pictures]))
    model: Any = model_of(open_checkpoint(run))
    with torch.no_grad():
        images = model.image_features((pixels / 255 - 0.5) / 0.5)
        return images, model.text_features(ids_of(texts)), model.get_submodule("logit_scale")()


def test_classes_are_told_apart_by_texts_about_them(pairs: str, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = evaluated(pairs, run, zero_shot_templates=ASKED, per_class=True)
    results = run_evaluation(config)
    found = results["results"]["corners_zero_shot"]
    images, texts, scale = features_of(run, pairs, [t.replace("{}", name) for name in CORNERS for t in ASKED])
    classes = torch.nn.functional.normalize(texts.view(4, 3, -1).mean(1), dim=-1)
    logits, labels = scale * images @ classes.T, torch.arange(PAIRS) % 4
    assert found["num_images"] == PAIRS and 0 < found["acc,none"] < 1 and found["acc5,none"] == 1
    assert found["acc,none"] == pytest.approx((logits.argmax(1) == labels).double().mean().item())
    assert found["loss,none"] == pytest.approx(torch.nn.functional.cross_entropy(logits, labels).item(), rel=1e-4)
    assert [values["name"] for values in results["classes"]["corners_zero_shot"]] == list(CORNERS)
    assert results["configs"]["corners_zero_shot"]["templates"] == ASKED
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["corners_zero_shot", "acc", f"{found['acc,none']:.4f}", f"{found['acc_stderr,none']:.4f}"] in rows
    other = evaluated(pairs, run, zero_shot_templates=["{}"], zero_shot_classes=list(reversed(CORNERS)))
    reverse = run_evaluation(other)["results"]["corners_zero_shot"]["acc,none"]
    _, texts, _ = features_of(run, pairs, list(reversed(CORNERS)))
    assert reverse == pytest.approx(((images @ texts.T).argmax(1) == labels).double().mean().item())


def test_images_find_their_texts_and_texts_their_images(pairs: str, run: Path) -> None:
    found = run_evaluation(evaluated(pairs, run))["results"]["corners_retrieval"]
    captions = [caption for number in range(PAIRS) for caption in captions_of(number, numbered=True)]
    images, texts, _ = features_of(run, pairs, captions)
    expected = recalls(SetFeatures(images, texts, torch.arange(PAIRS).repeat_interleave(2)))
    assert (found["num_images"], found["num_texts"]) == (PAIRS, 2 * PAIRS)
    assert set(expected) == {f"{what}_retrieval_recall@{k}" for what in ("image", "text") for k in (1, 5, 10)}
    for name, hits in expected.items():
        assert found[f"{name},none"] == pytest.approx(hits.mean(), abs=ONE), name
        assert f"{name}_stderr,none" in found


def test_recalls_are_counted_by_hand() -> None:
    angles = torch.tensor([0.0, 1.0, 2.0])
    images = torch.stack([angles.cos(), angles.sin()], 1)
    places = torch.tensor([0.1, 1.9, 1.15, 0.95, 0.2])  # of texts: two of image 0, one of image 1, two of image 2
    texts, owners = torch.stack([places.cos(), places.sin()], 1), torch.tensor([0, 0, 1, 2, 2])
    found = recalls(SetFeatures(images, texts, owners))
    assert found["text_retrieval_recall@1"].tolist() == [True, False, False]
    assert found["image_retrieval_recall@1"].tolist() == [True, False, True, False, False]
    assert found["text_retrieval_recall@5"].all() and found["image_retrieval_recall@10"].all()


@pytest.mark.parametrize("keys", [{}, {"zero_shot_classes": ["a", "b", "c", "d"]}])
def test_a_set_is_evaluated_by_what_it_has(pairs: str, run: Path, tmp_path: Path, keys: dict[str, Any]) -> None:
    stem = pairs.removesuffix("_image_document")
    for kind in ("image", "label" if keys else "text"):
        for suffix in ("bin", "idx"):
            (tmp_path / f"few_{kind}_document.{suffix}").symlink_to(f"{stem}_{kind}_document.{suffix}")
    config = evaluated(pairs, run, eval_data_paths=[str(tmp_path / "few_image_document")], eval_limit=10, **keys)
    results = run_evaluation(config)["results"]
    [(name, found)] = results.items()
    assert name == ("few_zero_shot" if keys else "few_retrieval") and found["num_images"] == 10


def evaluate_all(configs: list[RunConfig]) -> list[dict[str, Any]]:
    return [run_evaluation(config, join(config.parallel.model_parallel_size, "gloo"))["results"] for config in configs]


@pytest.mark.processes
def test_ranks_share_images_texts_and_classes(pairs: str, run: Path) -> None:
    configs = [evaluated(pairs, run, eval_batch_size=5, model_parallel_size=size) for size in (1, 2)]
    expected = run_evaluation(configs[0])["results"]
    for rank in run_ranks(2, evaluate_all, configs):
        for found in rank:
            for name, values in expected.items():
                for key, value in values.items():
                    how = {"abs": ONE} if "recall" in key else {"rel": 1e-4}
                    same = pytest.approx(value, **how) if isinstance(value, float) else value
                    assert found[name][key] == same, (name, key)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"zero_shot_classes": ["a", "b"]}, "zero_shot_classes: 2 names for the 4 classes of"),
        ({"zero_shot_classes": ["a"]}, "zero_shot_classes: 1 of them; give at least 2"),
        ({"zero_shot_templates": ["a photo"]}, "zero_shot_templates: 'a photo' has no {} for the name of a class"),
        ({"zero_shot_templates": []}, "zero_shot_templates: 0 of them; give at least 1"),
        ({"eval_tasks": ["piqa"]}, "eval_tasks: this is for language models, and not for what learns 'clip'"),
        ({"embed_dim": 13}, "embed_dim: 13 in the configuration, 12 in checkpoint"),
        ({"text_tower": {"num_layers": 2}}, "text_tower.num_layers: 2 in the configuration, 1 in checkpoint"),
        ({"eval_data_paths": ["absent_image_document"]}, "absent_image_document"),
    ],
)
def test_a_mistake_is_one_line(
    pairs: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], keys: dict[str, Any], message: str
) -> None:
    file = tmp_path / "run.yml"
    flat = evaluated(pairs, run).flat()
    tower = {**flat["text_tower"], **keys.pop("text_tower", {})}
    file.write_text(yaml.safe_dump({**flat, "text_tower": tower, **keys}), encoding="utf-8")

    def command() -> None:
        run_evaluation(parse_run([str(file)], "eval.py")[0])

    assert run_command(command) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and message in lines[0]
