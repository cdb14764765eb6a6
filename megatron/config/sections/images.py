"""Section `images`: what becomes of an image on its way to a model. Runs that learn from text have no such keys."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from pydantic import Field, model_validator

from megatron.config.sections.base import ListedNumber, Section
from megatron.errors import ConfigError
from megatron.text import shortened

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
MOST_MAGNITUDE = 10.0
"""Strongest that an operation of RandAugment gets, unless mmax says otherwise."""

_EXAMPLE = "rand-m9-mstd0.5-inc1"
_PART = re.compile(r"(mmax|mstd|inc|m|n|p)(\d+(?:\.\d+)?)")


@dataclass(frozen=True)
class RandAugmentPolicy:
    """What a name such as rand-m9-mstd0.5-inc1 says, with timm's defaults for what it does not."""

    magnitude: float = 10.0
    std: float = 0.0
    """Deviation of the magnitude from one operation to the next."""
    most: float = MOST_MAGNITUDE
    operations: int = 2
    """Drawn for an image, with replacement."""
    probability: float = 0.5
    """That one which was drawn is applied."""

    @classmethod
    def of(cls, name: str) -> RandAugmentPolicy:
        """Read a name of timm's. Raises ConfigError for another one, and for policies that there are not here."""
        first, *rest = name.split("-")
        parts = [_PART.fullmatch(part) for part in rest]
        if first != "rand" or None in parts:
            raise ConfigError("auto_augment", f"expected a name such as {_EXAMPLE}", value=name)
        given = {part[1]: float(part[2]) for part in parts if part}
        if given.pop("inc", 0) != 1:
            reason = "only operations that grow stronger with the magnitude exist here"
            raise ConfigError("auto_augment", reason, "end the name in -inc1", value=name)
        keys = {"m": "magnitude", "mstd": "std", "mmax": "most", "n": "operations", "p": "probability"}
        policy = cls(**{keys[key]: int(value) if key == "n" else value for key, value in given.items()})  # type: ignore[arg-type]
        if policy.operations > 15 or policy.probability > 1 or policy.std > 100 or policy.most > MOST_MAGNITUDE:
            reason = "n is at most 15, p 1, mstd 100 and mmax 10"
            raise ConfigError("auto_augment", reason, value=name)
        return policy


class ImagesConfig(Section):
    """Augmentation, size and normalisation of images, and what is made of their labels. Only for runs that learn from
    images; names and meanings are timm's."""

    auto_augment: str | None = None
    """RandAugment of training images by timm's name, for example rand-m9-mstd0.5-inc1: magnitude 9 with a standard
    deviation of 0.5, and operations that grow stronger with it. n is their number for an image (2), p how likely each
    of them is applied (0.5). Default: none."""
    reprob: float = Field(default=0.0, ge=0, le=1)
    """Probability that a rectangle of a training image is erased: its pixels become normal noise of image_mean and
    image_std."""
    hflip: float = Field(default=0.5, ge=0, le=1)
    """Probability that a training image is mirrored."""
    scale: list[ListedNumber] = [0.08, 1.0]
    """Least and greatest share of a training image's area that is cropped. [1, 1] with ratio [1, 1] leaves a square
    image whole."""
    ratio: list[ListedNumber] = [0.75, 1.3333333333333333]
    """Least and greatest width / height of that crop."""
    train_interpolation: Literal["bilinear", "bicubic", "random"] = "bicubic"
    """How training images are resized and turned; random draws one of the two for each of them. Evaluation is always
    bicubic."""
    crop_pct: float = Field(default=0.875, gt=0, le=1)
    """An evaluated image is resized until its shorter edge is image_size / crop_pct, and its centre is taken."""
    image_mean: list[ListedNumber] | None = None
    """Mean of each channel, with pixels from 0 to 1. Default: ImageNet's of three channels, else 0.5."""
    image_std: list[ListedNumber] | None = None
    """Standard deviation of each channel. Default: ImageNet's of three channels, else 0.5."""
    mixup: float = Field(default=0.0, ge=0, le=100)
    """Two training images are mixed with the share lambda ~ Beta(mixup, mixup), and so are their labels; 0: never."""
    cutmix: float = Field(default=0.0, ge=0, le=100)
    """Two training images swap a rectangle whose share of the area is 1 - lambda, lambda ~ Beta(cutmix, cutmix), and
    their labels are mixed accordingly; 0: never."""
    mixup_prob: float = Field(default=1.0, ge=0, le=1)
    """Probability that a pair of training images is mixed at all."""
    mixup_switch_prob: float = Field(default=0.5, ge=0, le=1)
    """Where both are on: probability that a pair gets cutmix instead of mixup."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    """Training labels are (1 - e) of their class and e / num_classes of every class."""

    @model_validator(mode="after")
    def _check(self) -> ImagesConfig:
        if self.auto_augment is not None:
            RandAugmentPolicy.of(self.auto_augment)
        for key, most in (("scale", 1.0), ("ratio", 100.0)):
            values = getattr(self, key)
            if len(values) != 2 or not 0 < values[0] <= values[1] <= most:
                reason = f"{shortened(values)}: expected [least, greatest], above 0 and at most {most:g}"
                raise ConfigError(key, reason)
        for key, least in (("image_mean", 0.0), ("image_std", 1e-6)):
            values = getattr(self, key)
            if values is not None and (len(values) not in (1, 3) or not least <= min(values) <= max(values) <= 1):
                reason = f"{shortened(values)}: expected one number a channel, from {least:g} to 1"
                raise ConfigError(key, reason)
        return self

    @property
    def policy(self) -> RandAugmentPolicy | None:
        """What auto_augment says."""
        return None if self.auto_augment is None else RandAugmentPolicy.of(self.auto_augment)

    @property
    def mixes(self) -> bool:
        """Are training images mixed in pairs? Micro-batches must then be of whole pairs."""
        return self.mixup_prob > 0 and (self.mixup > 0 or self.cutmix > 0)

    @property
    def soft_labels(self) -> bool:
        """Is a training label a distribution over the classes?"""
        return self.mixes or self.label_smoothing > 0

    def normalisation(self, channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """(mean, standard deviation) of each channel. Raises ConfigError where as many are not given."""
        defaults = (IMAGENET_MEAN, IMAGENET_STD) if channels == 3 else ((0.5,) * channels, (0.5,) * channels)
        found = []
        for key, default in zip(("image_mean", "image_std"), defaults, strict=True):
            values = getattr(self, key)
            if values is not None and len(values) != channels:
                reason = f"{len(values)} given, for images of {channels} channels"
                raise ConfigError(key, reason, "give one for each channel", beside=["in_channels"])
            found.append(default if values is None else tuple(float(value) for value in values))
        return found[0], found[1]
