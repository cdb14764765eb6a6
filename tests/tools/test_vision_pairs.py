"""The runs on digits with captions: what they train on, what they are asked, and what counts as right."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from megatron.config import RunConfig, load_config
from megatron.data import IndexedDataset
from megatron.data.datasets import parts_of
from megatron.data.samples import split_documents
from tools.demo import captioned_digits
from tools.demo.captioned_digits import TEMPLATES, UNSEEN_TEMPLATES, WORDS
from tools.vision import pairs
from tools.vision.pairs import CaptionTrial, ClipTrial
from tools.vision.scripts import ROOT, ScriptFolder

Calls = list[tuple[str, RunConfig]]


@pytest.fixture
def shades(monkeypatch: pytest.MonkeyPatch) -> None:
    """In place of scikit-learn's digits, ten images that are as bright as their class says."""
    labels = np.arange(10)
    images = (20 * labels[:, None, None] + np.zeros((10, 8, 8), np.int64)).astype(np.uint8)
    monkeypatch.setattr(captioned_digits, "digits", lambda: (images, labels))
    monkeypatch.setattr(pairs, "open_checkpoint", lambda path: type("Opened", (), {"num_parameters": 7}))


def scripts(
    monkeypatch: pytest.MonkeyPatch, answer: Callable[[RunConfig], dict[str, float]], say: Callable[[int], str] = str
) -> Calls:
    """In place of the scripts: eval.py gives the answer, generate.py says something of the class of each image."""
    calls: Calls = []

    def call(self: ScriptFolder, script: str, *words: str | Path, keys: dict[str, Any]) -> None:
        config = load_config(words[0], [f"{key}={value}" for key, value in keys.items()])
        calls.append((script, config))
        if script == "eval.py":
            folder = Path(config.evaluation.eval_results_prefix)
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "x.json").write_text(json.dumps({"results": {folder.name: answer(config)}}))
        if script == "generate.py":
            lines = map(json.loads, Path(words[words.index("-i") + 1]).read_text().splitlines())
            shades = [int(np.asarray(Image.open(line["image"])).max()) // 20 for line in lines]
            texts = [json.dumps({"text": say(shade)}) + "\n" for shade in shades]
            Path(words[words.index("-o") + 1]).write_text("".join(texts))

    monkeypatch.setattr(ScriptFolder, "call", call)
    return calls


def captions_of(prefix: str | Path) -> list[str]:
    texts = IndexedDataset(str(prefix).replace("_image_", "_text_"))
    return [bytes(texts[number][:-1].astype(np.uint8)).decode() for number in range(len(texts))]


def test_texts_of_classes_are_those_of_captions_and_others(
    tmp_path: Path, shades: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def answer(config: RunConfig) -> dict[str, float]:
        return {"acc,none": 0.9 if config.evaluation.zero_shot_templates == list(TEMPLATES) else 0.4}

    calls = scripts(monkeypatch, answer)
    found = ClipTrial(2).run(tmp_path / "run", tmp_path / "data")
    assert (found["accuracy"], found["unseen_templates"], found["parameters"]) == (90.0, 40.0, 7)
    assert [script for script, _ in calls] == ["train.py", "eval.py", "eval.py"]
    trained, asked = calls[0][1], [config.evaluation.zero_shot_templates for _, config in calls[1:]]
    assert asked == [list(TEMPLATES), list(UNSEEN_TEMPLATES)] and trained.training.seed == 2
    assert {config.checkpoint.load for _, config in calls} == {trained.checkpoint.save} == {f"{tmp_path}/run/model"}
    captions = captions_of(trained.data.data_path)
    assert len(captions) == 10 * len(TEMPLATES) and not any("on paper" in caption for caption in captions)


def test_a_caption_is_right_with_the_word_of_its_held_out_image(
    tmp_path: Path, shades: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def say(shade: int) -> str:
        asked.append(shade)
        return f"a {WORDS[shade]} on paper" if len(asked) == 1 else f"a {WORDS[shade - 1]} on paper"

    calls = scripts(monkeypatch, lambda _: {"exact_match,none": 0.25, "perplexity,none": 1.5}, say)
    found = CaptionTrial(1).run(tmp_path / "run", tmp_path / "data")
    assert (found["accuracy"], found["exact_match"], found["perplexity"]) == (50.0, 25.0, 1.5)
    assert [script for script, _ in calls] == ["train.py"] * 3 + ["generate.py", "eval.py"]
    image, text, joined = (config for _, config in calls[:3])
    assert {config.training.seed for config in (image, text, joined)} == {1} and joined.scaling.freeze_old_tokens
    assert joined.checkpoint.pretrain_image_tower == image.checkpoint.save
    assert joined.checkpoint.pretrain_text_tower == text.checkpoint.save
    [part] = parts_of(joined.data, "valid")
    labels = IndexedDataset(str(joined.data.data_path).replace("_image_", "_label_"))
    assert asked == [int(labels[number][0]) for number in range(*part.documents)] and part.documents == (8, 10)
    assert {f"the digit {word}" for word in WORDS} < set(captions_of(joined.data.data_path))


def test_both_towers_have_seen_none_of_the_held_out_images() -> None:
    files = ("vision/demo_digits.yml", "image_to_text/demo_text.yml", "image_to_text/demo_digits.yml")
    image, text, joined = (split_documents(load_config(ROOT / "configs" / file).data.split, 1797) for file in files)
    assert image[0][1] <= joined[1][0] and text[0][1] <= joined[1][0]
    assert joined[1] == (1438, 1797)
