"""Stored images as parts of data sets, and what becomes of an image before a model sees it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from megatron.config.sections.data import DataConfig
from megatron.config.sections.images import ImagesConfig
from megatron.data.augment import INTERPOLATIONS, Pixels, RandAugment, centre_crop, crop_box, erase, resized_crop
from megatron.data.classes import IMAGE_SUFFIX
from megatron.data.datasets import SPLIT_NAMES, Part, parts_of
from megatron.data.decode import MODES, BrokenImageError, decode
from megatron.data.image_batch import ImageShape
from megatron.data.indexed import IndexedDataset
from megatron.data.permutation import Permutation
from megatron.errors import ConfigError, RankError, UserError


class StoredImages:
    """The documents [first, end) of an image pair. Raises UserError for a pair of something else."""

    def __init__(self, part: Part) -> None:
        self.indexed, (self._first, self._end) = part.indexed, part.span
        prefix = part.indexed.prefix
        if not prefix.endswith(IMAGE_SUFFIX) or part.indexed.dtype != np.uint8:
            raise UserError(f"{prefix}: not images, whose prefix ends in {IMAGE_SUFFIX}; prepare_data.py writes them")
        self._stem = prefix.removesuffix(IMAGE_SUFFIX)

    def __len__(self) -> int:
        return self._end - self._first

    def beside(self, suffix: str, what: str) -> IndexedDataset:
        """The pair that has a document for each of these images. Raises UserError unless it has."""
        if not Path(f"{self._stem}{suffix}.idx").exists():
            advice = f"prepare images that have {what}, or learn another task"
            raise UserError(f"{self._stem}{suffix}.idx: no such file: the images have no {what}; {advice}")
        found = IndexedDataset(self._stem + suffix)
        documents = len(found.document_indices) - 1
        if documents != len(self.indexed):
            counts = f"{documents} {what} for {len(self.indexed)} images"
            raise UserError(f"{found.bin_path}: {counts}; prepare both again")
        return found

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


StoredPart = TypeVar("StoredPart", bound=StoredImages)


class ImageParts(Generic[StoredPart]):
    """Several parts, one after the other."""

    def __init__(self, parts: Sequence[StoredPart]) -> None:
        self._parts = list(parts)
        self._ends = np.cumsum([len(part) for part in parts])
        self.num_images = int(self._ends[-1])
        """Different images, of all parts."""

    def place(self, index: int) -> tuple[StoredPart, int]:
        """(part, number in it) of image `index`. Raises IndexError for one that is not there."""
        if not 0 <= index < self.num_images:
            raise IndexError(f"image {index} of {self.num_images}")
        number = int(np.searchsorted(self._ends, index, side="right"))
        return self._parts[number], index - int(self._ends[number - 1] if number else 0)

    def origin(self, index: int) -> dict[str, Any]:
        """Where image `index` is."""
        part, place = self.place(index)
        return part.origin(place)


class EpochOrder:
    """The image of each training sample: all images once an epoch, every epoch in an order of its own."""

    def __init__(self, num_images: int, seed: int) -> None:
        self._num_images, self._seed = num_images, seed
        self._order: tuple[int, Permutation] | None = None

    def __call__(self, sample: int) -> int:
        epoch, place = divmod(sample, self._num_images)
        if self._order is None or self._order[0] != epoch:
            self._order = epoch, Permutation(self._num_images, self._seed, epoch)
        return self._order[1](place)


class Augmentation:
    """A training image: crop, flip, RandAugment and erasing, as the options say."""

    def __init__(self, shape: ImageShape, options: ImagesConfig) -> None:
        self._size, self._options = shape.size, options
        self._mean, self._std = options.normalisation(shape.channels)
        fill = tuple(min(255, round(255 * value)) for value in self._mean)
        self._resamples = INTERPOLATIONS[options.train_interpolation]
        policy = options.policy
        self._augment = policy and RandAugment(policy, fill if shape.channels > 1 else fill[0], self._resamples)

    def __call__(self, image: Image.Image, random: np.random.Generator) -> Pixels:
        """[c, H, W], drawn from `random` alone."""
        options = self._options
        box = crop_box(image.size, _two(options.scale), _two(options.ratio), random)
        resample = self._resamples[random.integers(len(self._resamples))]
        image = resized_crop(image, box, self._size, resample)
        if random.random() < options.hflip:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        if self._augment:
            image = self._augment(image, random)
        pixels = _pixels(image)
        if random.random() < options.reprob:
            erase(pixels, self._mean, self._std, random)
        return pixels


def centre(image: Image.Image, shape: ImageShape, options: ImagesConfig) -> Tensor:
    """The centre of an evaluated image, uint8 [c, H, W]."""
    return torch.from_numpy(_pixels(centre_crop(image, shape.size, options.crop_pct)))


def _two(values: Sequence[float]) -> tuple[float, float]:
    return values[0], values[1]


def _pixels(image: Image.Image) -> Pixels:
    """[c, H, W], writable."""
    pixels = np.array(image)
    return np.ascontiguousarray(pixels.transpose(2, 0, 1)) if pixels.ndim == 3 else pixels[None]


def image_parts(data: DataConfig, shape: ImageShape, samples: Sequence[int]) -> dict[str, list[Part]]:
    """What the sets that a data section names are made of, by train, valid and test; those with samples only.

    Raises: UserError when data is missing or damaged, and for weights of a blend.
    """
    if shape.channels not in MODES:
        raise ConfigError("in_channels", "images are grey (1) or coloured (3)", value=shape.channels)
    for key in ("weight_by_num_documents", *(f"{name}_data_weights" for name in SPLIT_NAMES)):
        if getattr(data, key):
            raise ConfigError(key, "every image of all sets is read once an epoch", "remove it")
    if data.random_split or data.sample_order != "documents":
        key = "random_split" if data.random_split else "sample_order"
        raise ConfigError(key, "is of text; prepare_data.py puts images in random order", "remove it")
    counts = dict(zip(SPLIT_NAMES, samples, strict=True))
    return {name: parts_of(data, name) if count else [] for name, count in counts.items()}
