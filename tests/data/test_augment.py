"""Augmentation is timm's and torchvision's, pixel for pixel, and depends on a sample's number only."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from megatron.config.sections.images import RandAugmentPolicy
from megatron.data.augment import (
    INTERPOLATIONS,
    OPERATIONS,
    Mix,
    Mixing,
    Pixels,
    RandAugment,
    Resample,
    Setting,
    centre_crop,
    crop_box,
    erase,
    pair_generator,
    resized_crop,
    sample_generator,
)
from tests.fixtures.images.make_augmentations import BOX, BOXES, CENTRES, LAMBDA, PATH, by_timm, cases
from tests.with_timm import need_timm

GOLDEN = dict(np.load(PATH))
IMAGES = {"RGB": Image.fromarray(GOLDEN["colour"]), "L": Image.fromarray(GOLDEN["grey"])}
POLICY = RandAugmentPolicy.of("rand-m9-mstd0.5-inc1")
FILL = (124, 116, 104)
DRAWS = 1000


def is_near(found: int, share: float, draws: int) -> bool:
    """Within four standard deviations of a binomial."""
    return abs(found - share * draws) <= 4 * math.sqrt(draws * share * (1 - share))


def random_image(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


def test_every_operation_is_timms_pixel_for_pixel() -> None:
    place, wrong = 0, []
    for mode, name, setting in cases():
        found = np.asarray(OPERATIONS[name](IMAGES[mode], setting)).ravel()
        if not np.array_equal(found, GOLDEN["operations"][place : place + found.size]):
            wrong.append((mode, name, setting))
        place += found.size
    assert place == GOLDEN["operations"].size and wrong == []


@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_is_timms_at_any_magnitude(name: str) -> None:
    need_timm()
    for mode, image in IMAGES.items():
        for magnitude in (0.0, 0.3, 2.5, 5.1, 8.7, 9.0, 9.99, *(() if name == "PosterizeIncreasing" else (10.0,))):
            for sign in (1, -1):
                setting = Setting(magnitude, sign, Resample.BICUBIC, FILL if mode == "RGB" else 128)
                assert OPERATIONS[name](image, setting).tobytes() == by_timm(image, name, setting).tobytes()


def test_no_bits_are_black() -> None:
    found = OPERATIONS["PosterizeIncreasing"](IMAGES["RGB"], Setting(10.0, 1, Resample.BICUBIC, FILL))
    assert found.size == IMAGES["RGB"].size and found.getextrema() == ((0, 0),) * 3


def test_crops_are_torchvisions_pixel_for_pixel() -> None:
    image = IMAGES["RGB"]
    crops = [resized_crop(image, box, 8, Resample.BICUBIC) for box in BOXES]
    crops += [centre_crop(image, size, pct) for size, pct in CENTRES]
    assert np.array_equal(np.concatenate([np.asarray(crop).ravel() for crop in crops]), GOLDEN["crops"])


def test_pairs_are_mixed_as_timm_does() -> None:
    one = GOLDEN["colour"].transpose(2, 0, 1)
    other = GOLDEN["colour"][::-1, ::-1].transpose(2, 0, 1)
    for mix, golden in zip((Mix(LAMBDA), Mix(0.0, BOX)), GOLDEN["pairs"], strict=True):
        before = one.copy(), other.copy()
        assert np.array_equal(np.stack(mix(one, other)), golden)
        assert np.array_equal(before, (one, other))


def test_operations_come_as_often_as_they_should() -> None:
    augment = RandAugment(POLICY, FILL, INTERPOLATIONS["random"])
    drawn = [augment.draw(sample_generator(5, sample)) for sample in range(DRAWS)]
    applied = [operation for operations in drawn for operation in operations]
    assert is_near(len(applied), POLICY.probability, 2 * DRAWS)
    names = Counter(name for name, _ in applied)
    assert set(names) == set(OPERATIONS)
    assert all(is_near(names[name], 1 / 15, len(applied)) for name in OPERATIONS)
    settings = [setting for _, setting in applied]
    assert is_near(sum(setting.sign > 0 for setting in settings), 0.5, len(settings))
    assert is_near(sum(setting.resample is Resample.BICUBIC for setting in settings), 0.5, len(settings))
    assert is_near(sum(setting.magnitude > 9 for setting in settings), 0.5, len(settings))
    above = [setting.magnitude == 10 for setting in settings]  # two deviations above 9 and cut off
    assert is_near(sum(above), 0.02275, len(settings))


def test_crops_have_the_sizes_and_shapes_that_were_asked_for() -> None:
    boxes = [crop_box((200, 200), (0.2, 0.5), (0.5, 1.5), sample_generator(1, sample)) for sample in range(DRAWS)]
    assert all(0 <= left < right <= 200 and 0 <= top < bottom <= 200 for left, top, right, bottom in boxes)
    areas = [(right - left) * (bottom - top) / 40000 for left, top, right, bottom in boxes]
    shapes = [(right - left) / (bottom - top) for left, top, right, bottom in boxes]
    assert min(areas) > 0.19 and max(areas) < 0.51 and min(shapes) > 0.48 and max(shapes) < 1.53
    assert is_near(sum(shape > math.sqrt(0.75) for shape in shapes), 0.5, DRAWS), "uniform in the logarithm"


@pytest.mark.parametrize(("size", "box"), [((100, 10), (42, 0, 57, 10)), ((10, 100), (0, 40, 10, 60))])
def test_where_no_crop_fits_it_is_the_middle(size: tuple[int, int], box: tuple[int, int, int, int]) -> None:
    assert crop_box(size, (1.0, 1.0), (0.5, 1.5), sample_generator(1, 0)) == box


def test_the_smallest_image_can_be_cropped() -> None:
    assert crop_box((1, 1), (0.08, 1.0), (0.75, 4 / 3), sample_generator(1, 0)) == (0, 0, 1, 1)


def test_a_narrow_strip_is_not_blown_up() -> None:
    found = centre_crop(Image.new("RGB", (1, 60_000), (1, 2, 3)), 224, 0.875)
    assert found.size == (224, 224) and found.getpixel((100, 100)) == (1, 2, 3)


def test_erasing_puts_noise_of_the_datas_mean_into_a_rectangle() -> None:
    areas, means = [], []
    for sample in range(300):
        pixels: Pixels = np.full((3, 32, 32), 7, np.uint8)
        erase(pixels, (0.5, 0.5, 0.5), (0.1, 0.1, 0.1), sample_generator(2, sample))
        rows, columns = np.nonzero((pixels != 7).any(0))
        erased = pixels[:, rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
        areas.append(erased[0].size / 1024)
        means.append(erased.mean())
    assert min(areas) > 0.015 and max(areas) < 0.36 and np.mean(areas) == pytest.approx(0.177, abs=0.02)
    assert np.mean(means) == pytest.approx(127.5, abs=1)


def test_pairs_are_mixed_as_often_as_they_should() -> None:
    mixing = Mixing(0.8, 1.0, 0.9, 0.25)
    mixes = [mixing.draw((16, 16), pair_generator(3, pair)) for pair in range(DRAWS)]
    cut = [mix for mix in mixes if mix.box]
    assert is_near(sum(mix.lam < 1 and mix.box is None for mix in mixes), 0.9 * 0.75, DRAWS)
    assert is_near(len(cut), 0.9 * 0.25, DRAWS)
    for mix in cut:
        top, bottom, left, right = mix.box or (0, 0, 0, 0)
        assert mix.lam == 1 - (bottom - top) * (right - left) / 256 and 0 <= top <= bottom <= 16 >= right >= left >= 0
    averaged = [mix.lam for mix in mixes if mix.box is None and mix.lam < 1]
    assert np.mean(averaged) == pytest.approx(0.5, abs=0.06)


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.8, 0.0), (0.0, 1.0)])
def test_one_of_the_two_alone(mixup: float, cutmix: float) -> None:
    mixes = [Mixing(mixup, cutmix, 1.0, 0.5).draw((16, 16), pair_generator(3, pair)) for pair in range(50)]
    assert {mix.box is not None for mix in mixes} == {cutmix > 0}


def test_generators_are_of_a_number_and_of_nothing_else() -> None:
    first = sample_generator(1, 4).random(4)
    sample_generator(1, 5).random(100)
    assert np.array_equal(sample_generator(1, 4).random(4), first)
    others = [sample_generator(1, 5), sample_generator(2, 4), pair_generator(1, 4), sample_generator(4, 1)]
    assert all(not np.isin(other.random(4), first).any() for other in others)


def test_the_global_generators_are_left_alone() -> None:
    before = np.random.get_state()[1].copy()  # type: ignore[index,union-attr]
    RandAugment(POLICY, FILL)(random_image(20, 20), sample_generator(1, 1))
    assert np.array_equal(before, np.random.get_state()[1])  # type: ignore[index]
