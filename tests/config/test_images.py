"""The keys of image runs: what they take, and that other runs do not know them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import pytest

from megatron.config import load_config
from megatron.config.checks import find_evaluation_mistakes
from megatron.config.load import resolve_config
from megatron.config.sections import model as sections
from megatron.config.sections.base import Section
from megatron.config.sections.images import IMAGENET_MEAN, IMAGENET_STD, ImagesConfig, RandAugmentPolicy
from megatron.config.sections.model import ModelSection
from megatron.doctor.target import requirement_files
from megatron.errors import ConfigError, UserError

SIZES: dict[str, Any] = {"num_layers": 2, "hidden_size": 16, "num_attention_heads": 2}


class _Pictures(ModelSection):
    task: ClassVar[str] = "pictures"
    samples: ClassVar[type[Section]] = ImagesConfig


@pytest.fixture(autouse=True)
def pictures(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A task whose samples are images."""
    monkeypatch.setitem(sections.MODEL_SECTIONS, "pictures", _Pictures)
    yield


def images_of(**keys: Any) -> ImagesConfig:
    section = load_config([], {"task": "pictures", **SIZES, **keys}).images
    assert isinstance(section, ImagesConfig)
    return section


def test_keys_reach_the_section_and_come_back_flat() -> None:
    config = load_config([], {"task": "pictures", **SIZES, "mixup": 0.8, "scale": [0.5, 1], "hflip": 0})
    again = load_config([], config.flat())
    assert again == config and again.images == images_of(mixup=0.8, scale=[0.5, 1], hflip=0)
    assert config.replaced(**{"images.mixup": 0.2}).images == images_of(mixup=0.2, scale=[0.5, 1], hflip=0)


def test_a_language_run_does_not_know_them() -> None:
    with pytest.raises(UserError, match="mixup: unknown key"):
        load_config([], {**SIZES, "seq_length": 16, "mixup": 0.8})
    config = load_config([], {**SIZES, "seq_length": 16})
    assert not set(ImagesConfig.model_fields) & set(config.flat())


def test_such_a_run_needs_pillow() -> None:
    assert "requirements-vision.txt" in requirement_files(load_config([], {"task": "pictures", **SIZES}))


def test_a_policy_is_read_as_timm_reads_it() -> None:
    assert RandAugmentPolicy.of("rand-m9-mstd0.5-inc1") == RandAugmentPolicy(9, 0.5)
    assert RandAugmentPolicy.of("rand-inc1-n3-p0.7-mmax8") == RandAugmentPolicy(10, 0, 8, 3, 0.7)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"auto_augment": "augmix-m3"}, "auto_augment: expected a name such as rand-m9-mstd0.5-inc1, got 'augmix-m3'"),
        ({"auto_augment": "rand-m9-x2-inc1"}, "auto_augment: expected a name such as .*, got 'rand-m9-x2-inc1'"),
        ({"auto_augment": "rand-m9"}, "auto_augment: only operations that grow stronger .*; end the name in -inc1"),
        ({"auto_augment": "rand-n99-inc1"}, "auto_augment: n is at most 15"),
        ({"scale": [0.5]}, r"scale: \[0.5\]: expected \[least, greatest\], above 0 and at most 1"),
        ({"ratio": [2, 1]}, r"ratio: \[2.0, 1.0\]: expected \[least, greatest\]"),
        ({"image_mean": [0.5, 0.5]}, "image_mean: .*: expected one number a channel, from 0 to 1"),
        ({"image_std": [0]}, "image_std: .*: expected one number a channel"),
        ({"reprob": 2}, "reprob: "),
        ({"label_smoothing": 1}, "label_smoothing: "),
    ],
)
def test_a_mistake_is_one_line(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        images_of(**keys)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"pattention_top_k": 0.5}, "pattention_top_k: this is for models that make texts, and not for what learns"),
        ({"pattention_threshold": 0.1}, "pattention_threshold: this is for models that make texts"),
        ({"zero_shot_classes": ["a", " "]}, "zero_shot_classes: one of the names is empty"),
        ({"eval_tasks": ["piqa"]}, "eval_tasks: this is for language models"),
    ],
)
def test_what_an_image_model_is_not_evaluated_by(keys: dict[str, Any], message: str) -> None:
    model = {"task": "image_classification", "num_layers": 1, "hidden_size": 8, "num_attention_heads": 1}
    with pytest.raises(UserError, match=message):
        resolve_config([], {**model, **keys}, checks=[find_evaluation_mistakes])


def test_normalisation_is_of_the_channels() -> None:
    assert images_of().normalisation(3) == (IMAGENET_MEAN, IMAGENET_STD)
    assert images_of(image_mean=[0.1]).normalisation(1) == ((0.1,), (0.5,))
    with pytest.raises(ConfigError, match="image_mean: 1 given, for images of 3 channels; give one for each channel"):
        images_of(image_mean=[0.1]).normalisation(3)


def test_what_makes_labels_soft() -> None:
    assert not images_of().soft_labels and not images_of(mixup=1, mixup_prob=0).soft_labels
    assert images_of(cutmix=1).mixes and images_of(label_smoothing=0.1).soft_labels
