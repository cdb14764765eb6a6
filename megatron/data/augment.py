"""Augmentation of images from explicit random generators: a sample's pixels depend on its number and on nothing else.

The 15 operations are those of timm's `rand-m..-inc1` (timm/data/auto_augment.py), pixel for pixel: functions of the
image, a magnitude from 0 to 10 and a sign. What is drawn at random is drawn as timm, torchvision and their papers say,
from a numpy Generator: RandAugment (arXiv 1909.13719), random resized crops (arXiv 1409.4842), random erasing (arXiv
1708.04896), mixup (arXiv 1710.09412) and CutMix (arXiv 1905.04899).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageEnhance, ImageOps

from megatron.config.sections.images import RandAugmentPolicy

Pixels = npt.NDArray[np.uint8]
Resample = Image.Resampling
INTERPOLATIONS = {
    "bilinear": (Resample.BILINEAR,), "bicubic": (Resample.BICUBIC,), "random": (Resample.BILINEAR, Resample.BICUBIC),
}  # fmt: skip
"""What a sample's interpolation is drawn from, by train_interpolation."""

_ERASED_AREA, _ERASED_RATIO = (0.02, 1 / 3), (0.3, 1 / 0.3)
_ATTEMPTS = 10
_MOST_LEVEL = 10.0
_MOST_RATIO = 32


def sample_generator(seed: int, sample: int) -> np.random.Generator:
    """The generator of one training sample, whatever was drawn for others."""
    return np.random.Generator(np.random.Philox(key=[seed, sample]))


def pair_generator(seed: int, pair: int) -> np.random.Generator:
    """The generator of what the samples 2 * pair and 2 * pair + 1 share; not one of theirs."""
    return np.random.Generator(np.random.Philox(key=[seed, pair], counter=[0, 0, 0, 1]))


# ---- operations ----


@dataclass(frozen=True)
class Setting:
    """How an operation is applied. magnitude: 0 to 10; sign: 1 or -1, of those that have two directions."""

    magnitude: float
    sign: int
    resample: Resample
    fill: int | tuple[int, ...]
    """What comes in from outside of the image, one number a channel."""

    @property
    def level(self) -> float:
        """The magnitude, from 0 to 1."""
        return self.magnitude / _MOST_LEVEL


def _affine(image: Image.Image, matrix: tuple[float, ...], setting: Setting) -> Image.Image:
    return image.transform(
        image.size, Image.Transform.AFFINE, matrix, resample=setting.resample, fillcolor=setting.fill
    )


def _shear_x(image: Image.Image, setting: Setting) -> Image.Image:
    return _affine(image, (1, setting.sign * (setting.level * 0.3), 0, 0, 1, 0), setting)


def _shear_y(image: Image.Image, setting: Setting) -> Image.Image:
    return _affine(image, (1, 0, 0, setting.sign * (setting.level * 0.3), 1, 0), setting)


def _translate_x(image: Image.Image, setting: Setting) -> Image.Image:
    return _affine(image, (1, 0, setting.sign * (setting.level * 0.45) * image.size[0], 0, 1, 0), setting)


def _translate_y(image: Image.Image, setting: Setting) -> Image.Image:
    return _affine(image, (1, 0, 0, 0, 1, setting.sign * (setting.level * 0.45) * image.size[1]), setting)


def _rotate(image: Image.Image, setting: Setting) -> Image.Image:
    return image.rotate(setting.sign * (setting.level * 30.0), resample=setting.resample, fillcolor=setting.fill)


def _posterize(image: Image.Image, setting: Setting) -> Image.Image:
    bits = 4 - int(setting.level * 4)
    # Pillow refuses to keep no bits, and with it timm fails; what is meant, and older versions gave, is black.
    return ImageOps.posterize(image, bits) if bits else Image.new(image.mode, image.size)


def _solarize(image: Image.Image, setting: Setting) -> Image.Image:
    return ImageOps.solarize(image, 256 - min(256, int(setting.level * 256)))


def _solarize_add(image: Image.Image, setting: Setting) -> Image.Image:
    added = min(128, int(setting.level * 110))
    table = [min(255, value + added) if value < 128 else value for value in range(256)]
    return image.point(table * len(image.getbands()))


def _enhanced(
    enhancer: Callable[[Image.Image], ImageEnhance._Enhance], image: Image.Image, setting: Setting
) -> Image.Image:
    return enhancer(image).enhance(max(0.1, 1.0 + setting.sign * (setting.level * 0.9)))


Operation = Callable[[Image.Image, Setting], Image.Image]
OPERATIONS: dict[str, Operation] = {
    "AutoContrast": lambda image, _: ImageOps.autocontrast(image),
    "Equalize": lambda image, _: ImageOps.equalize(image),
    "Invert": lambda image, _: ImageOps.invert(image),
    "Rotate": _rotate,
    "PosterizeIncreasing": _posterize,
    "SolarizeIncreasing": _solarize,
    "SolarizeAdd": _solarize_add,
    "ColorIncreasing": lambda image, setting: _enhanced(ImageEnhance.Color, image, setting),
    "ContrastIncreasing": lambda image, setting: _enhanced(ImageEnhance.Contrast, image, setting),
    "BrightnessIncreasing": lambda image, setting: _enhanced(ImageEnhance.Brightness, image, setting),
    "SharpnessIncreasing": lambda image, setting: _enhanced(ImageEnhance.Sharpness, image, setting),
    "ShearX": _shear_x,
    "ShearY": _shear_y,
    "TranslateXRel": _translate_x,
    "TranslateYRel": _translate_y,
}
"""By timm's names, in timm's order; images of mode L or RGB."""


# ---- RandAugment ----


@dataclass(frozen=True)
class RandAugment:
    """Some of the operations at random, one after the other.

    Args:
        fill: what comes in from outside of the image, one number a channel.
        resamples: what each operation's interpolation is drawn from.
    """

    policy: RandAugmentPolicy
    fill: int | tuple[int, ...]
    resamples: tuple[Resample, ...] = INTERPOLATIONS["bicubic"]

    def draw(self, random: np.random.Generator) -> list[tuple[str, Setting]]:
        """The operations that an image gets, in order; of those drawn, the ones that are applied."""
        names = [list(OPERATIONS)[index] for index in random.integers(len(OPERATIONS), size=self.policy.operations)]
        return [(name, self._setting(random)) for name in names if random.random() <= self.policy.probability]

    def _setting(self, random: np.random.Generator) -> Setting:
        magnitude = random.normal(self.policy.magnitude, self.policy.std) if self.policy.std else self.policy.magnitude
        sign = -1 if random.random() > 0.5 else 1
        resample = self.resamples[random.integers(len(self.resamples))]
        return Setting(max(0.0, min(magnitude, self.policy.most)), sign, resample, self.fill)

    def __call__(self, image: Image.Image, random: np.random.Generator) -> Image.Image:
        for name, setting in self.draw(random):
            image = OPERATIONS[name](image, setting)
        return image


# ---- crops, erasing ----


def crop_box(
    size: tuple[int, int], scale: tuple[float, float], ratio: tuple[float, float], random: np.random.Generator
) -> tuple[int, int, int, int]:
    """(left, top, right, bottom) of a random part of an image of size (width, height), as torchvision draws it.

    After ten boxes that do not fit it is the largest one in the middle whose ratio is within bounds.
    """
    width, height = size
    for _ in range(_ATTEMPTS):
        area = width * height * random.uniform(*scale)
        shape = math.exp(random.uniform(math.log(ratio[0]), math.log(ratio[1])))
        w, h = round(math.sqrt(area * shape)), round(math.sqrt(area / shape))
        if 0 < w <= width and 0 < h <= height:
            top, left = int(random.integers(height - h + 1)), int(random.integers(width - w + 1))
            return left, top, left + w, top + h
    shape = width / height
    w = width if shape <= ratio[1] else min(width, max(1, round(height * ratio[1])))
    h = height if shape >= ratio[0] else min(height, max(1, round(width / ratio[0])))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def resized_crop(image: Image.Image, box: tuple[int, int, int, int], size: int, resample: Resample) -> Image.Image:
    """A part of an image as a square of `size` pixels."""
    return image.crop(box).resize((size, size), resample)


def centre_crop(image: Image.Image, size: int, crop_pct: float) -> Image.Image:
    """The middle square of `size` pixels, once the shorter edge is size / crop_pct, bicubic, as torchvision does it."""
    image = _without_far_ends(image)
    edge, (width, height) = math.floor(size / crop_pct), image.size
    short, long = min(width, height), int(edge * max(width, height) / min(width, height))
    resized = (edge, long) if width == short else (long, edge)
    if resized != image.size:
        image = image.resize(resized, Resample.BICUBIC)
    left, top = round((resized[0] - size) / 2.0), round((resized[1] - size) / 2.0)
    return image.crop((left, top, left + size, top + size))


def _without_far_ends(image: Image.Image) -> Image.Image:
    """At most _MOST_RATIO times as long as it is short: resized as a whole, a narrow strip would fill the memory."""
    width, height = image.size
    most = _MOST_RATIO * min(width, height)
    if max(width, height) <= most:
        return image
    left, top = max(0, (width - most) // 2), max(0, (height - most) // 2)
    return image.crop((left, top, min(width, left + most), min(height, top + most)))


def erase(pixels: Pixels, mean: tuple[float, ...], std: tuple[float, ...], random: np.random.Generator) -> None:
    """Put noise into a random rectangle of [c, H, W], in place.

    timm's mode `pixel` puts standard normal noise into normalised images; before normalisation that is noise of the
    same mean and deviation as the data, which is cut off at 0 and 255 here.
    """
    channels, height, width = pixels.shape
    for _ in range(_ATTEMPTS):
        area = random.uniform(*_ERASED_AREA) * height * width
        shape = math.exp(random.uniform(math.log(_ERASED_RATIO[0]), math.log(_ERASED_RATIO[1])))
        h, w = round(math.sqrt(area * shape)), round(math.sqrt(area / shape))
        if h < height and w < width:
            top, left = int(random.integers(height - h + 1)), int(random.integers(width - w + 1))
            scale, shift = (np.asarray(values, np.float32)[:, None, None] * 255 for values in (std, mean))
            noise = random.standard_normal((channels, h, w), dtype=np.float32) * scale + shift
            pixels[:, top : top + h, left : left + w] = np.rint(noise).clip(0, 255)
            return


# ---- pairs ----


@dataclass(frozen=True)
class Mix:
    """How the two images of a pair are mixed: each keeps the share `lam` of itself.

    box: (top, bottom, left, right) that they swap; None where their pixels are averaged.
    """

    lam: float
    box: tuple[int, int, int, int] | None = None

    def __call__(self, one: Pixels, other: Pixels) -> tuple[Pixels, Pixels]:
        """Both images [c, H, W] as they are mixed; those given stay as they are. Averages are rounded, as in timm."""
        if self.box is None:
            a, b = one.astype(np.float32), other.astype(np.float32)
            keep, take = np.float32(self.lam), np.float32(1 - self.lam)
            return np.rint(a * keep + b * take).astype(np.uint8), np.rint(b * keep + a * take).astype(np.uint8)
        top, bottom, left, right = self.box
        first, second = one.copy(), other.copy()
        first[:, top:bottom, left:right] = other[:, top:bottom, left:right]
        second[:, top:bottom, left:right] = one[:, top:bottom, left:right]
        return first, second


@dataclass(frozen=True)
class Mixing:
    """Mixup and CutMix of pairs (timm's mode `pair`): parameters of their Beta distributions (0: never)."""

    mixup: float
    cutmix: float
    probability: float
    switch: float
    """Probability of CutMix where both are on."""

    def draw(self, size: tuple[int, int], random: np.random.Generator) -> Mix:
        """How a pair of images of size (height, width) is mixed; lam is 1 where it is not."""
        if random.random() >= self.probability or not (self.mixup or self.cutmix):
            return Mix(1.0)
        cut = random.random() < self.switch if self.mixup and self.cutmix else self.cutmix > 0
        alpha = self.cutmix if cut else self.mixup
        lam = float(random.beta(alpha, alpha))
        if not cut:
            return Mix(lam)
        box = _box(size, lam, random)
        return Mix(1.0 - (box[1] - box[0]) * (box[3] - box[2]) / (size[0] * size[1]), box)


def _box(size: tuple[int, int], lam: float, random: np.random.Generator) -> tuple[int, int, int, int]:
    """A rectangle of the image's shape and 1 - lam of its area around a random point, cut off at the edges."""
    edges: list[int] = []
    for length in size:
        cut, centre = int(length * math.sqrt(1 - lam)), int(random.integers(length))
        edges += [max(0, centre - cut // 2), min(length, centre + (cut + 1) // 2)]
    return edges[0], edges[1], edges[2], edges[3]
