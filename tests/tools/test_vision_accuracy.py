"""The check of accuracy: a run of it is a real one, on images that it may train on, and tables say what came out."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from megatron.config import load_config
from megatron.data.datasets import parts_of
from megatron.data.images import AugmentedImages, ImageDataset, ImageShape, LabelledImages
from megatron.errors import UserError
from megatron.model.build import build_model
from tools.results import known_results
from tools.vision import accuracy
from tools.vision.accuracy import (
    BATCH,
    MODELS,
    RATES,
    SUBJECTS,
    Subject,
    Trial,
    rates_report,
    report,
    trials,
)
from tools.vision.data import SOURCES, digits, prepare
from tools.vision.scripts import ROOT


@pytest.mark.parametrize("name", SUBJECTS)
def test_both_models_have_nearly_as_many_parameters_and_the_same_recipe(name: str) -> None:
    ours, theirs = (load_config(Trial(name, model, 0).config) for model in MODELS)
    counts = [build_model(config.model, device="meta").num_parameters() for config in (ours, theirs)]
    assert counts[0] == pytest.approx(counts[1], rel=0.02)
    assert ours.images == theirs.images and ours.data == theirs.data
    assert ours.model.init_method_std == theirs.model.init_method_std  # type: ignore[attr-defined]


@pytest.fixture
def shades(monkeypatch: pytest.MonkeyPatch) -> Subject:
    """In place of scikit-learn's digits, 200 images that are as bright as their class says."""
    labels = np.arange(200) % 10
    images = np.random.default_rng(0).integers(0, 20, (200, 8, 8)) + 25 * labels[:, None, None]
    monkeypatch.setitem(SOURCES, "digits", lambda: (images.astype(np.uint8), labels))
    monkeypatch.setitem(SUBJECTS, "digits", Subject(160, 40, 10, 95.0))
    return SUBJECTS["digits"]


def test_test_images_are_held_out_of_every_run(tmp_path: Path, shades: Subject) -> None:
    """Rates are tried on other images, too, than those that are trained on then."""
    prefix, found = prepare("digits", tmp_path), {}
    for trial in (Trial("digits", "TokenFormer", 0), Trial("digits", "TokenFormer", 0, 1e-3)):
        words = [f"{key}={value}" for key, value in trial.keys(tmp_path, prefix).items()]
        config = load_config(trial.config, words)
        assert config.checkpoint.save is None and config.training.train_batch_size == BATCH
        found[trial.rate] = {
            name: [part.documents for part in parts_of(config.data, name)] for name in ("train", "valid", "test")
        }
    assert found[None] == {"train": [(0, 160)], "valid": [(160, 200)], "test": []}
    assert found[1e-3] == {"train": [(0, 128)], "valid": [(128, 160)], "test": [(160, 200)]}


@pytest.mark.launches
def test_a_run_is_real(tmp_path: Path, shades: Subject, capsys: pytest.CaptureFixture[str]) -> None:
    words = [str(tmp_path / "x.json"), "-d", str(tmp_path / "data"), "--work-dir", str(tmp_path / "runs")]
    name = "digits TokenFormer seed 0"
    for _ in range(2):  # the second time there is nothing to do
        assert accuracy.main([*words, "--only", name]) == 0
    results = json.loads((tmp_path / "x.json").read_text())["results"]
    assert list(results) == [name] and results[name]["parameters"] == 198_858
    assert results[name]["accuracy"] > 20  # of ten classes
    assert capsys.readouterr().out.count(f"{name}: ") == 1


def test_the_digits_are_scikit_learns() -> None:
    pytest.importorskip("sklearn", reason="scikit-learn is not installed: requirements/requirements-eval.txt")
    images, labels = digits()
    assert images.shape == (1797, 8, 8) and images.dtype == np.uint8 and images.max() == 255
    assert sorted(set(labels.tolist())) == list(range(10))


def test_a_run_that_fails_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trial = Trial("digits", "ViT", 0)
    monkeypatch.setattr(sys, "executable", "false")
    with pytest.raises(UserError, match=r"digits ViT seed 0: train.py ended with exit code 1; .*log.txt says why"):
        trial.run(tmp_path / "run", tmp_path / "data")


def test_handwritten_digits_are_moved_by_two_pixels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    array = np.zeros((1, 32, 32), np.uint8)
    array[0, 2:30, 2:30] = np.arange(784, dtype=np.int64).reshape(28, 28) % 255 + 1
    monkeypatch.setitem(SOURCES, "mnist5k", lambda: (array, np.zeros(1, np.int64)))
    prefix = prepare("mnist5k", tmp_path)
    config = load_config(Trial("mnist5k", "TokenFormer", 0).config, {"data_path": str(prefix), "split": "1,0,0"})
    parts = [LabelledImages(part, 1) for part in parts_of(config.data, "train")]
    shape = ImageShape(1, 28, 1)
    seen = AugmentedImages(parts, shape, config.images, 0, 400)  # type: ignore[arg-type]
    crops = {array[0, top : top + 28, left : left + 28].tobytes() for top in range(5) for left in range(5)}
    assert {seen[number]["images"].numpy().tobytes() for number in range(400)} == crops
    centre = ImageDataset(parts, shape, config.images)[0]["images"].numpy()  # type: ignore[arg-type]
    assert np.array_equal(centre[0], array[0, 2:30, 2:30])


def test_results_are_of_this_tool(tmp_path: Path) -> None:
    assert known_results(tmp_path / "none.json") == {}
    (tmp_path / "other.json").write_text("[1]")
    with pytest.raises(UserError, match="FILE: .*other.json is no file of results; name another one"):
        known_results(tmp_path / "other.json")


def test_tables_have_what_is_complete_only() -> None:
    figures = {"parameters": 1234, "unseen_templates": 50.0}
    results = {trial.name: {"accuracy": 90.0 + trial.seed, **figures} for trial in trials()}
    lines = list(report(results))
    assert lines[2] == "| digits, 60 epochs, TokenFormer | 1,234 | 90.0 | 91.0 | 92.0 | 91.0 ± 0.6 | 95 |"
    assert lines[-2:] == [
        "| the same with templates that no caption has | 1,234 | 50.0 | 50.0 | 50.0 | 50.0 ± 0.0 |  |",
        "| digits, right captions of ten | 1,234 | 90.0 | 91.0 | 92.0 | 91.0 ± 0.6 | 90 |",
    ]
    del results["digits TokenFormer seed 2"]
    assert list(report(results)) == [line for line in lines if line != lines[2]]
    results[Trial("mnist5k", "ViT", 0, RATES[1]).name]["accuracy"] = 95.0
    assert list(rates_report(results))[-1] == "| mnist5k, ViT | 90.0 | **95.0** | 90.0 |"


def test_the_page_has_the_figures_of_the_file() -> None:
    results = known_results(ROOT / "tools/vision/accuracy.json")
    page, lines = (ROOT / "docs/vision.md").read_text(encoding="utf-8"), list(report(results))
    assert len(lines) > 2 and set(lines) <= set(page.splitlines())
    assert set(results) <= {trial.name for trial in trials()}
