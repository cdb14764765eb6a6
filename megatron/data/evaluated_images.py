"""The sets of images that an evaluation goes through, each by itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron.config.sections.data import DataConfig
from megatron.config.sections.evaluation import EvaluationConfig
from megatron.config.sections.images import ImagesConfig
from megatron.data.classes import IMAGE_SUFFIX, check_same_classes, class_names, classes_file
from megatron.data.datasets import Part, parts_of
from megatron.data.decode import MODES
from megatron.data.image_batch import ImageShape
from megatron.data.images import ImageDataset, LabelledImages
from megatron.data.indexed import IndexedDataset
from megatron.errors import ConfigError


@dataclass(frozen=True)
class EvaluatedSet:
    """A set of images, and what is known of it."""

    name: str
    """What results call it."""
    prefix: str
    """Of its image pair."""
    images: ImageDataset
    """Every image once, in order."""
    class_names: Sequence[str]
    """What the classes are called, by the file beside the pair, else the checkpoint; else their numbers."""


def evaluated_sets(
    data: DataConfig,
    images: ImagesConfig,
    shape: ImageShape,
    evaluation: EvaluationConfig,
    learned: Sequence[str] | None = None,
) -> list[EvaluatedSet]:
    """The images of `evaluated_parts` with their labels.

    Args:
        learned: what the classes of the model are called, in order, where that is known.

    Raises: UserError when data is missing, damaged or does not fit the shape, for a set that numbers its classes in
        another way than the model, and for two sets of one name.
    """
    sets = []
    for name, part in evaluated_parts(data, shape, evaluation).items():
        own = class_names(part.indexed.prefix)
        if own is not None and learned is not None:
            check_same_classes(own, classes_file(part.indexed.prefix), learned, "the checkpoint")
        names = own or learned or [str(number) for number in range(shape.num_classes)]
        sets.append(labelled_set(name, part, names, images, shape))
    return sets


def labelled_set(name: str, part: Part, names: Sequence[str], images: ImagesConfig, shape: ImageShape) -> EvaluatedSet:
    """The images of a part with their labels, whose classes have these names."""
    dataset = ImageDataset([LabelledImages(part, shape.num_classes)], shape, images)
    return EvaluatedSet(name, part.indexed.prefix, dataset, names)


def evaluated_parts(data: DataConfig, shape: ImageShape, evaluation: EvaluationConfig) -> dict[str, Part]:
    """The sets of eval_data_paths, else what the data section gives to eval_split; of each the first eval_limit images.

    By what results call them: `digits` of data/digits/digits_image_document. Raises: see evaluated_sets.
    """
    if shape.channels not in MODES:
        raise ConfigError("in_channels", "images are grey (1) or coloured (3)", value=shape.channels)
    found: dict[str, Part] = {}
    for part in _parts(data, evaluation):
        first, end = part.documents
        limited = Part(part.indexed, (first, min(end, first + (evaluation.eval_limit or end))))
        name = Path(part.indexed.prefix).name.removesuffix(IMAGE_SUFFIX)
        if found.setdefault(name, limited) is not limited:
            key = "eval_data_paths" if evaluation.eval_data_paths else f"{evaluation.eval_split}_data_paths"
            raise ConfigError(key, f"two sets are called {name}", "evaluate one after the other")
    return found


def _parts(data: DataConfig, evaluation: EvaluationConfig) -> list[Part]:
    if evaluation.eval_data_paths:
        opened = [IndexedDataset(path) for path in evaluation.eval_data_paths]
        parts = [Part(indexed, (0, len(indexed))) for indexed in opened]
    else:
        parts = parts_of(data, evaluation.eval_split)
    parts = [part for part in parts if part.documents[1] > part.documents[0]]
    if not parts:
        what = "eval_data_paths" if evaluation.eval_data_paths else "eval_split"
        reason = "there are no images in it" if evaluation.eval_data_paths else f"no {evaluation.eval_split} images"
        raise ConfigError(what, reason, "name other sets with eval_data_paths, or choose another eval_split")
    return parts


def has_document(part: Part, suffix: str) -> bool:
    """Is there a pair `NAME{suffix}` beside the image pair of a part?"""
    return Path(f"{part.indexed.prefix.removesuffix(IMAGE_SUFFIX)}{suffix}.idx").exists()
