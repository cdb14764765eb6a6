"""The sets of images that an evaluation goes through, each by itself."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megatron.config.sections.data import DataConfig
from megatron.config.sections.evaluation import EvaluationConfig
from megatron.config.sections.images import ImagesConfig
from megatron.data.classes import IMAGE_SUFFIX, class_lines, classes_file
from megatron.data.datasets import Part, parts_of
from megatron.data.decode import MODES
from megatron.data.image_batch import ImageShape
from megatron.data.images import ImageDataset, LabelledImages
from megatron.data.indexed import IndexedDataset
from megatron.errors import ConfigError


@dataclass(frozen=True)
class EvaluatedSet:
    """A set of images, and what is known of it."""

    prefix: str
    """Of its image pair."""
    images: ImageDataset
    """Every image once, in order."""
    class_names: list[str]
    """What the classes are called; their numbers, where no file beside the pair says."""

    @property
    def name(self) -> str:
        """What results call it: `digits` of data/digits/digits_image_document."""
        return Path(self.prefix).name.removesuffix(IMAGE_SUFFIX)


def evaluated_sets(
    data: DataConfig, images: ImagesConfig, shape: ImageShape, evaluation: EvaluationConfig
) -> list[EvaluatedSet]:
    """The sets of eval_data_paths, else what the data section gives to eval_split; of each the first eval_limit images.

    Raises: UserError when data is missing, damaged or does not fit the shape, and for two sets of one name.
    """
    if shape.channels not in MODES:
        raise ConfigError("in_channels", "images are grey (1) or coloured (3)", value=shape.channels)
    sets: dict[str, EvaluatedSet] = {}
    for part in _parts(data, evaluation):
        first, end = part.documents
        limited = Part(part.indexed, (first, min(end, first + (evaluation.eval_limit or end))))
        dataset = ImageDataset([LabelledImages(limited, shape.num_classes)], shape, images)
        prefix = part.indexed.prefix
        found = EvaluatedSet(prefix, dataset, _class_names(prefix, shape.num_classes))
        if sets.setdefault(found.name, found) is not found:
            key = "eval_data_paths" if evaluation.eval_data_paths else f"{evaluation.eval_split}_data_paths"
            raise ConfigError(key, f"two sets are called {found.name}", "evaluate one after the other")
    return list(sets.values())


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


def _class_names(prefix: str, num_classes: int) -> list[str]:
    names = classes_file(prefix)
    return class_lines(names) if names.exists() else [str(number) for number in range(num_classes)]
