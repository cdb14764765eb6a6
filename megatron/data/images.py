"""Images and their labels from .bin/.idx pairs: training samples with augmentation, and sets that are evaluated.

`X_image_document` holds encoded images, one a document of uint8; `X_label_document` the class of each as int32, and
`X_classes.txt` the names of the classes, where they are known.

What a training sample is depends on the seed and its number k alone: epoch k // n in an order of its own, every image
once an epoch; crop, flip, RandAugment and erasing from a generator of (seed, k). Samples 2j and 2j + 1 are mixed with
each other, by a generator of (seed, j). So neither workers, ranks and accumulation nor a resume change a sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron.config.sections.data import DataConfig
from megatron.config.sections.images import ImagesConfig
from megatron.data.augment import Mixing, Pixels, pair_generator, sample_generator
from megatron.data.classes import check_same_classes, class_names, classes_file
from megatron.data.datasets import Datasets, Part
from megatron.data.image_batch import ImageShape
from megatron.data.image_sets import Augmentation, EpochOrder, ImageParts, StoredImages, centre, image_parts
from megatron.errors import ConfigError, UserError

LABEL_SUFFIX = "_label_document"

_ROWS = 1 << 22


class LabelledImages(StoredImages):
    """The documents [first, end) of an image pair, with their labels. Raises UserError where these do not fit."""

    def __init__(self, part: Part, num_classes: int) -> None:
        super().__init__(part)
        self._labels = self.beside(LABEL_SUFFIX, "labels")
        if self._labels.num_tokens != len(self.indexed):
            counts = f"{self._labels.num_tokens} numbers for {len(self.indexed)} images"
            raise UserError(f"{self._labels.bin_path}: {counts}; prepare both again")
        self.class_names = class_names(part.indexed.prefix)
        """What its classes are called, where a file says it."""
        self._check_classes(num_classes)

    def _check_classes(self, num_classes: int) -> None:
        known = num_classes if self.class_names is None else len(self.class_names)
        if known != num_classes:
            reason = f"{classes_file(self.indexed.prefix)} names {known} classes"
            raise ConfigError("num_classes", reason, f"set {known}", value=num_classes)
        for first in range(0, len(self._labels), _ROWS):
            rows = self._labels.tokens[first : first + _ROWS]
            wrong = np.flatnonzero((rows < 0) | (rows >= num_classes))
            if len(wrong):
                raise UserError(
                    f"{self._labels.bin_path}: image {first + wrong[0]} has label {rows[wrong[0]]}, and num_classes "
                    f"{num_classes} allows 0 to {num_classes - 1}; set num_classes, or prepare the data again"
                )

    def label(self, index: int) -> int:
        """The class of image `index` of this part."""
        return int(self._labels.tokens[self._first + index])


class ImageDataset:
    """Every image once, in order: {images: uint8 [c, H, W], labels: int64 scalar}, its centre, without augmentation.

    Raises: RankError, by an item, for an image that is broken.
    """

    def __init__(self, parts: Sequence[LabelledImages], shape: ImageShape, images: ImagesConfig) -> None:
        self._parts, self._shape, self._options = ImageParts(parts), shape, images

    def __len__(self) -> int:
        return self._parts.num_images

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        part, place = self._parts.place(index)
        image = part.image(place, self._shape.channels)
        return {"images": centre(image, self._shape, self._options), "labels": torch.tensor(part.label(place))}

    def origins(self, index: int) -> list[dict[str, Any]]:
        """What sample `index` is made of."""
        return [self._parts.origin(index)]


class AugmentedImages:
    """Training samples: {images: uint8 [c, H, W], labels: int64 scalar}, epoch after epoch, each in another order.

    Labels are float32 [num_classes] where the options mix or smooth them.

    Args:
        seed: of the orders and of all that is drawn.
        num_samples: length of the set. A longer one begins with the same samples.
    """

    def __init__(
        self, parts: Sequence[LabelledImages], shape: ImageShape, images: ImagesConfig, seed: int, num_samples: int
    ) -> None:
        self._parts, self._shape, self._options = ImageParts(parts), shape, images
        self._seed, self._num_samples = seed, num_samples
        self.num_images = self._parts.num_images
        """Different images, of all parts."""
        self._image = EpochOrder(self.num_images, seed)
        self._augment = Augmentation(shape, images)
        self._mixing = Mixing(images.mixup, images.cutmix, images.mixup_prob, images.mixup_switch_prob)
        self._pair: tuple[int, list[tuple[Pixels, Tensor]]] | None = None

    def __len__(self) -> int:
        return self._num_samples

    def __getitem__(self, sample: int) -> dict[str, Tensor]:
        if not 0 <= sample < len(self):
            raise IndexError(f"sample {sample} of {len(self)}")
        if self._options.mixes:
            pixels, label = self._mixed(sample // 2)[sample % 2]
        else:
            pixels, label = self._augmented(sample)
        return {"images": torch.from_numpy(pixels), "labels": label}

    def origins(self, sample: int) -> list[dict[str, Any]]:
        """The images that sample `sample` is made of."""
        samples = (sample, sample ^ 1) if self._options.mixes else (sample,)
        return [self._parts.origin(self._image(number)) for number in samples]

    def _augmented(self, sample: int) -> tuple[Pixels, Tensor]:
        part, place = self._parts.place(self._image(sample))
        image = part.image(place, self._shape.channels)
        return self._augment(image, sample_generator(self._seed, sample)), self._label(part.label(place))

    def _label(self, label: int) -> Tensor:
        if not self._options.soft_labels:
            return torch.tensor(label)
        smoothing, classes = self._options.label_smoothing, self._shape.num_classes
        soft = torch.full((classes,), smoothing / classes)
        soft[label] += 1 - smoothing
        return soft

    def _mixed(self, pair: int) -> list[tuple[Pixels, Tensor]]:
        """Both samples of a pair. The last pair is kept: its second sample is mostly the next to be asked for."""
        if self._pair is None or self._pair[0] != pair:
            (one, first), (other, second) = self._augmented(2 * pair), self._augmented(2 * pair + 1)
            mix = self._mixing.draw((self._shape.size, self._shape.size), pair_generator(self._seed, pair))
            pixels, lam = mix(one, other), mix.lam
            labels = first * lam + second * (1 - lam), second * lam + first * (1 - lam)
            self._pair = pair, list(zip(pixels, labels, strict=True))
        return self._pair[1]


def _check_numbering(parts: Sequence[LabelledImages]) -> None:
    """Raise UserError where the files beside two parts number the classes in different ways."""
    named = [(part.class_names, classes_file(part.indexed.prefix)) for part in parts if part.class_names is not None]
    for names, file in named[1:]:
        check_same_classes(names, file, *named[0])


def build_image_datasets(
    data: DataConfig, images: ImagesConfig, shape: ImageShape, seed: int, samples: Sequence[int]
) -> Datasets:
    """The data sets that a data section names; those that are evaluated have every image of theirs once.

    Args:
        samples: of training, validation and test that are needed (0: not built). The training set has as many.

    Raises: UserError when data is missing, damaged or does not fit the shape, for sets that number their classes in
        different ways, and for weights of a blend.
    """
    found = image_parts(data, shape, samples)
    parts = {name: [LabelledImages(part, shape.num_classes) for part in split] for name, split in found.items()}
    _check_numbering([part for split in parts.values() for part in split])
    train = AugmentedImages(parts["train"], shape, images, seed, samples[0]) if parts["train"] else None
    valid, test = (ImageDataset(parts[name], shape, images) if parts[name] else None for name in ("valid", "test"))
    return Datasets(train, valid, test)
