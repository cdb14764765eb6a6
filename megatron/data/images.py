"""Images and their labels from .bin/.idx pairs: training samples with augmentation, and sets that are evaluated.

`X_image_document` holds encoded images, one a document of uint8; `X_label_document` the class of each as int32, and
`X_classes.txt` the names of the classes, where they are known.

What a training sample is depends on the seed and its number k alone: epoch k // n in an order of its own, every image
once an epoch; crop, flip, RandAugment and erasing from a generator of (seed, k). Samples 2j and 2j + 1 are mixed with
each other, by a generator of (seed, j). So neither workers, ranks and accumulation nor a resume change a sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from megatron.config.sections.data import DataConfig
from megatron.config.sections.images import ImagesConfig
from megatron.data.augment import (
    INTERPOLATIONS,
    Mixing,
    Pixels,
    RandAugment,
    centre_crop,
    crop_box,
    erase,
    pair_generator,
    resized_crop,
    sample_generator,
)
from megatron.data.datasets import SPLIT_NAMES, Datasets, Part, parts_of
from megatron.data.decode import MODES, BrokenImageError, decode
from megatron.data.indexed import IndexedDataset
from megatron.data.permutation import Permutation
from megatron.errors import ConfigError, RankError, UserError
from megatron.files import read_text

IMAGE_SUFFIX, LABEL_SUFFIX, CLASSES_SUFFIX = "_image_document", "_label_document", "_classes.txt"
PADDING = -1
"""Label of what fills up the last batch of an evaluation."""

_ROWS = 1 << 22
_MOST_CLASSES_BYTES = 1 << 26


@dataclass(frozen=True)
class ImageShape:
    """What a model takes and tells apart: square images of 1 (grey) or 3 channels, and classes."""

    channels: int
    size: int
    num_classes: int


class LabelledImages:
    """The documents [first, end) of an image pair, with their labels. Raises UserError where these do not fit."""

    def __init__(self, part: Part, num_classes: int) -> None:
        self.indexed, (self._first, self._end) = part.indexed, part.documents
        prefix = part.indexed.prefix
        if not prefix.endswith(IMAGE_SUFFIX) or part.indexed.dtype != np.uint8:
            raise UserError(f"{prefix}: not images, whose prefix ends in {IMAGE_SUFFIX}; prepare_data.py writes them")
        self._stem = prefix.removesuffix(IMAGE_SUFFIX)
        self._labels = IndexedDataset(self._stem + LABEL_SUFFIX)
        if len(self._labels) != len(self.indexed) or self._labels.num_tokens != len(self.indexed):
            counts = f"{len(self._labels)} labels for {len(self.indexed)} images"
            raise UserError(f"{self._labels.bin_path}: {counts}; prepare both again")
        self._check_classes(num_classes)

    def __len__(self) -> int:
        return self._end - self._first

    def _check_classes(self, num_classes: int) -> None:
        names = Path(self._stem + CLASSES_SUFFIX)
        known = len(read_text(names, limit=_MOST_CLASSES_BYTES).splitlines()) if names.exists() else num_classes
        if known != num_classes:
            raise ConfigError("num_classes", f"{names} names {known} classes", f"set {known}", value=num_classes)
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

    def image(self, index: int, channels: int) -> Image.Image:
        """Image `index` of this part. Raises RankError for one that is broken."""
        number = self._first + index
        try:
            return decode(self.indexed[number].tobytes(), channels)
        except BrokenImageError as error:
            advice = "prepare the data again, without it"
            raise RankError(f"{self.indexed.bin_path}: image {number} {error}; {advice}") from None

    def origin(self, index: int) -> dict[str, Any]:
        """Where image `index` of this part is."""
        return {"set": self.indexed.prefix, "index": self._first + index}


class _Images:
    """Several parts, one after the other."""

    def __init__(self, parts: Sequence[LabelledImages], shape: ImageShape, images: ImagesConfig) -> None:
        self._parts, self._shape, self._options = list(parts), shape, images
        self._ends = np.cumsum([len(part) for part in parts])
        self.num_images = int(self._ends[-1])
        """Different images, of all parts."""

    def _place(self, index: int) -> tuple[LabelledImages, int]:
        number = int(np.searchsorted(self._ends, index, side="right"))
        return self._parts[number], index - int(self._ends[number - 1] if number else 0)

    def _decoded(self, index: int) -> tuple[Image.Image, int]:
        part, place = self._place(index)
        return part.image(place, self._shape.channels), part.label(place)


class ImageDataset(_Images):
    """Every image once, in order: {images: uint8 [c, H, W], labels: int64 scalar}, its centre, without augmentation.

    Raises: RankError, by an item, for an image that is broken.
    """

    def __len__(self) -> int:
        return self.num_images

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not 0 <= index < len(self):
            raise IndexError(f"image {index} of {len(self)}")
        image, label = self._decoded(index)
        image = centre_crop(image, self._shape.size, self._options.crop_pct)
        return {"images": torch.from_numpy(_pixels(image)), "labels": torch.tensor(label)}

    def origins(self, index: int) -> list[dict[str, Any]]:
        """What sample `index` is made of."""
        part, place = self._place(index)
        return [part.origin(place)]


class AugmentedImages(_Images):
    """Training samples: {images: uint8 [c, H, W], labels: int64 scalar}, epoch after epoch, each in another order.

    Labels are float32 [num_classes] where the options mix or smooth them.

    Args:
        seed: of the orders and of all that is drawn.
        num_samples: length of the set. A longer one begins with the same samples.
    """

    def __init__(
        self, parts: Sequence[LabelledImages], shape: ImageShape, images: ImagesConfig, seed: int, num_samples: int
    ) -> None:
        super().__init__(parts, shape, images)
        self._seed, self._num_samples = seed, num_samples
        self._mean, self._std = images.normalisation(shape.channels)
        fill = tuple(min(255, round(255 * value)) for value in self._mean)
        self._resamples = INTERPOLATIONS[images.train_interpolation]
        policy = images.policy
        self._augment = policy and RandAugment(policy, fill if shape.channels > 1 else fill[0], self._resamples)
        self._mixing = Mixing(images.mixup, images.cutmix, images.mixup_prob, images.mixup_switch_prob)
        self._order: tuple[int, Permutation] | None = None
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
        places = [self._place(self._index(number)) for number in samples]
        return [part.origin(place) for part, place in places]

    def _index(self, sample: int) -> int:
        """The image of a sample."""
        epoch, place = divmod(sample, self.num_images)
        if self._order is None or self._order[0] != epoch:
            self._order = epoch, Permutation(self.num_images, self._seed, epoch)
        return self._order[1](place)

    def _augmented(self, sample: int) -> tuple[Pixels, Tensor]:
        options, random = self._options, sample_generator(self._seed, sample)
        image, label = self._decoded(self._index(sample))
        box = crop_box(image.size, _two(options.scale), _two(options.ratio), random)
        resample = self._resamples[random.integers(len(self._resamples))]
        image = resized_crop(image, box, self._shape.size, resample)
        if random.random() < options.hflip:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        if self._augment:
            image = self._augment(image, random)
        pixels = _pixels(image)
        if random.random() < options.reprob:
            erase(pixels, self._mean, self._std, random)
        return pixels, self._label(label)

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


def _two(values: Sequence[float]) -> tuple[float, float]:
    return values[0], values[1]


def _pixels(image: Image.Image) -> Pixels:
    """[c, H, W], writable."""
    pixels = np.array(image)
    return np.ascontiguousarray(pixels.transpose(2, 0, 1)) if pixels.ndim == 3 else pixels[None]


def images_of(samples: Sequence[dict[str, Tensor]], size: int, shape: ImageShape) -> dict[str, Tensor]:
    """{images: uint8 [size, c, H, W], labels} of samples; black images with the label PADDING (-1) fill it up."""
    missing = size - len(samples)
    images = [sample["images"] for sample in samples]
    images += [torch.zeros(shape.channels, shape.size, shape.size, dtype=torch.uint8)] * missing
    labels = [sample["labels"] for sample in samples] + [torch.tensor(PADDING)] * missing
    return {"images": torch.stack(images), "labels": torch.stack(labels)}


def build_image_datasets(
    data: DataConfig, images: ImagesConfig, shape: ImageShape, seed: int, samples: Sequence[int]
) -> Datasets:
    """The data sets that a data section names; those that are evaluated have every image of theirs once.

    Args:
        samples: of training, validation and test that are needed (0: not built). The training set has as many.

    Raises: UserError when data is missing, damaged or does not fit the shape, and for weights of a blend.
    """
    if shape.channels not in MODES:
        raise ConfigError("in_channels", "images are grey (1) or coloured (3)", value=shape.channels)
    for key in ("weight_by_num_documents", *(f"{name}_data_weights" for name in SPLIT_NAMES)):
        if getattr(data, key):
            raise ConfigError(key, "every image of all sets is read once an epoch", "remove it")
    wanted = [name for name, count in zip(SPLIT_NAMES, samples, strict=True) if count]
    found = {name: parts_of(data, name) for name in wanted}
    parts = {name: [LabelledImages(part, shape.num_classes) for part in found.get(name, [])] for name in SPLIT_NAMES}
    train = AugmentedImages(parts["train"], shape, images, seed, samples[0]) if parts["train"] else None
    valid, test = (ImageDataset(parts[name], shape, images) if parts[name] else None for name in ("valid", "test"))
    return Datasets(train, valid, test)
