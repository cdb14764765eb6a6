"""Image data sets: samples that depend on their number only, and evaluation of every image once."""

from __future__ import annotations

import functools
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron.config.sections.data import DataConfig
from megatron.config.sections.images import ImagesConfig
from megatron.config.sections.tokenizer import TokenizerConfig
from megatron.data import IndexedDataset, IndexedDatasetBuilder, batches
from megatron.data.augment import Mix, Mixing
from megatron.data.datasets import Part
from megatron.data.image_batch import images_of
from megatron.data.image_sources import ImageRecord, Listing
from megatron.data.images import (
    AugmentedImages,
    ImageDataset,
    ImageShape,
    LabelledImages,
    build_image_datasets,
)
from megatron.data.permutation import Permutation
from megatron.data.prepare_images import Faults, prepare_images
from megatron.errors import RankError, UserError
from tests.data.image_files import encoded, pixels
from tests.data.test_augment import GOLDEN

COUNT, SEED = 10, 7
SHAPE = ImageShape(3, 16, 5)
ALL: dict[str, Any] = {
    "auto_augment": "rand-m9-mstd0.5-inc1", "reprob": 0.5, "mixup": 0.8, "cutmix": 1.0, "label_smoothing": 0.1,
    "train_interpolation": "random",
}  # fmt: skip
"""Every augmentation."""


def options(**keys: Any) -> ImagesConfig:
    return ImagesConfig(**keys)


def parts_of_pair(prefix: str) -> list[LabelledImages]:
    """All images of a pair."""
    indexed = IndexedDataset(prefix)
    return [LabelledImages(Part(indexed, (0, len(indexed))), SHAPE.num_classes)]


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> str:
    records = [ImageRecord(f"image {i}", pixels(i), i % SHAPE.num_classes) for i in range(COUNT)]
    folder = tmp_path_factory.mktemp("images")
    return prepare_images(Listing(records), folder / "set", TokenizerConfig(), Faults(False)).prefixes["image"]


@pytest.fixture(scope="module")
def train(prefix: str) -> AugmentedImages:
    return AugmentedImages(parts_of_pair(prefix), SHAPE, options(**ALL), SEED, 48)


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(one[key], other[key]) for key in ("images", "labels"))


def stream(dataset: Any, *layout: int, num_workers: int = 0, start: int = 0) -> list[dict[str, Tensor]]:
    collate = functools.partial(images_of, shape=SHAPE)
    return list(batches(dataset, *layout, start_sample=start, num_workers=num_workers, collate=collate))


def test_a_sample_has_the_models_shape(train: AugmentedImages) -> None:
    sample = train[3]
    assert sample["images"].dtype == torch.uint8 and sample["images"].shape == (3, 16, 16)
    assert sample["labels"].dtype == torch.float32 and sample["labels"].shape == (5,)
    assert float(sample["labels"].sum()) == pytest.approx(1)


def test_a_sample_depends_on_its_number_only(prefix: str, train: AugmentedImages) -> None:
    samples = [train[number] for number in range(48)]
    longer = AugmentedImages(parts_of_pair(prefix), SHAPE, options(**ALL), SEED, 1000)
    order = np.random.default_rng(0).permutation(48).tolist()
    assert all(same(longer[number], samples[number]) for number in order)
    other = AugmentedImages(parts_of_pair(prefix), SHAPE, options(**ALL), SEED + 1, 48)
    assert not any(same(other[number], samples[number]) for number in range(48))


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.launches
def test_workers_and_a_resume_change_no_bit(train: AugmentedImages) -> None:
    whole = stream(train, 4, 2)
    assert len(whole) == 12
    for workers in (1, 3):
        assert all(map(same, stream(train, 4, 2, num_workers=workers), whole)), workers
        rest = stream(train, 4, 2, num_workers=workers, start=24)
        assert len(rest) == 6 and all(map(same, rest, whole[6:])), workers


@pytest.mark.parametrize("layout", [(8, 1, 1), (1, 2, 4), (2, 1, 4), (3, 4, 1)])
def test_an_update_has_the_same_samples_in_any_layout(train: AugmentedImages, layout: tuple[int, int, int]) -> None:
    micro, steps, ranks = layout
    found = [stream(train, micro, steps, rank, ranks)[:steps] for rank in range(ranks)]
    update = [sample for step in range(steps) for rank in range(ranks) for sample in found[rank][step]["images"]]
    assert len(update) == micro * steps * ranks
    assert all(torch.equal(sample, train[number]["images"]) for number, sample in enumerate(update))


def test_every_image_comes_once_an_epoch(prefix: str) -> None:
    plain = AugmentedImages(parts_of_pair(prefix), SHAPE, options(), SEED, 3 * COUNT)
    epochs = [[plain.origins(e * COUNT + place)[0]["index"] for place in range(COUNT)] for e in range(3)]
    assert all(sorted(epoch) == list(range(COUNT)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    labels = IndexedDataset(prefix.replace("_image_", "_label_")).tokens
    assert [int(plain[place]["labels"]) for place in range(COUNT)] == [int(labels[i]) for i in epochs[0]]


def test_labels_are_mixed_and_smoothed_as_in_timm(prefix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    second = Permutation(COUNT, SEED, 0)(1)
    monkeypatch.setattr(LabelledImages, "label", lambda self, index: 2 * (index == second))
    for mix, golden in zip((Mix(0.3), Mix(1 - 35 / 117, (1, 6, 2, 9))), GOLDEN["labels"], strict=True):
        monkeypatch.setattr(Mixing, "draw", lambda *_, mix=mix: mix)
        keys = options(mixup=1, label_smoothing=0.1)
        dataset = AugmentedImages(parts_of_pair(prefix), ImageShape(3, 16, 3), keys, SEED, 2)
        found = np.stack([dataset[number]["labels"].numpy() for number in range(2)])
        assert np.allclose(found, golden, atol=1e-7)


def test_a_mixed_sample_names_both_of_its_images(train: AugmentedImages, prefix: str) -> None:
    (one, other), again = train.origins(4), train.origins(5)
    assert again == [other, one] and one["set"] == prefix and one["index"] != other["index"]


def test_plain_options_leave_a_square_image_as_it_is(tmp_path: Path) -> None:
    array = pixels(1, 16, 16)
    with IndexedDatasetBuilder(tmp_path / "x_image_document", np.uint8) as images:
        images.add_document(np.frombuffer(encoded(array), np.uint8))
        images.finalize()
    with IndexedDatasetBuilder(tmp_path / "x_label_document", np.int32) as labels:
        labels.add_document([4])
        labels.finalize()
    parts = parts_of_pair(f"{tmp_path}/x_image_document")
    keys = options(scale=[1, 1], ratio=[1, 1], hflip=0, crop_pct=1)
    for dataset in (AugmentedImages(parts, SHAPE, keys, 1, 4), ImageDataset(parts, SHAPE, keys)):
        sample = dataset[0]
        assert np.array_equal(sample["images"].numpy(), array.transpose(2, 0, 1)) and int(sample["labels"]) == 4


def test_grey_models_get_one_channel(prefix: str) -> None:
    shape = ImageShape(1, 16, 5)
    keys = options(**{**ALL, "mixup": 0.0, "cutmix": 0.0})
    for dataset in (
        AugmentedImages(parts_of_pair(prefix), shape, keys, 1, 30),
        ImageDataset(parts_of_pair(prefix), shape, keys),
    ):
        assert all(dataset[number]["images"].shape == (1, 16, 16) for number in range(len(dataset)))


@pytest.mark.parametrize(("micro", "ranks"), [(1, 1), (4, 1), (3, 2), (4, 4), (16, 2)])
def test_an_evaluation_counts_every_image_once_on_any_grid(prefix: str, micro: int, ranks: int) -> None:
    dataset = ImageDataset(parts_of_pair(prefix), SHAPE, options())
    found = [stream(dataset, micro, 0, rank, ranks) for rank in range(ranks)]
    assert len({len(batches) for batches in found}) == 1
    rows = [row for rank in found for batch in rank for row in zip(batch["images"], batch["labels"], strict=True)]
    assert all(len(batch["labels"]) == micro for rank in found for batch in rank)
    counted = Counter(image.numpy().tobytes() for image, label in rows if label >= 0)
    assert counted == Counter(dataset[number]["images"].numpy().tobytes() for number in range(COUNT))


def test_sets_are_built_from_the_data_section(prefix: str) -> None:
    built = build_image_datasets(DataConfig(data_path=prefix, split="6,2,2"), options(), SHAPE, SEED, (100, 1, 1))
    assert [len(part) for part in (built.train, built.valid, built.test)] == [100, 2, 2] and not built.epoch_blocks
    indices = {name: {getattr(built, name).origins(i)[0]["index"] for i in range(2)} for name in ("valid", "test")}
    assert indices == {"valid": {6, 7}, "test": {8, 9}}
    assert {built.train.origins(i)[0]["index"] for i in range(100)} == set(range(6))
    paths = DataConfig(train_data_paths=[prefix, prefix], valid_data_paths=[prefix])
    built = build_image_datasets(paths, options(), SHAPE, SEED, (10, 1, 1))
    assert built.train.num_images == 20 and len(built.valid) == 10 and built.test is None
    assert build_image_datasets(paths, options(), SHAPE, SEED, (10, 0, 0)).valid is None


def test_mistakes_are_told(prefix: str, tmp_path: Path) -> None:
    def build(shape: ImageShape = SHAPE, **data: Any) -> None:
        build_image_datasets(DataConfig(**{"data_path": prefix, **data}), options(), shape, SEED, (10, 0, 0))

    with pytest.raises(
        UserError, match=r"label_document.bin: image \d has label [34], and num_classes 3 allows 0 to 2"
    ):
        build(ImageShape(3, 16, 3))
    with pytest.raises(UserError, match="in_channels: images are grey .1. or coloured .3., got 4"):
        build(ImageShape(4, 16, 5))
    with pytest.raises(UserError, match="set_label_document: not images, whose prefix ends in _image_document"):
        build(data_path=prefix.replace("_image_", "_label_"))
    with pytest.raises(UserError, match="weight_by_num_documents: every image of all sets is read once an epoch"):
        build(weight_by_num_documents=True)
    names = Path(prefix.removesuffix("_image_document") + "_classes.txt")
    names.write_text("a\nb\n")
    with pytest.raises(UserError, match="num_classes: .*set_classes.txt names 2 classes, got 5; set 2"):
        build()
    names.unlink()
    with IndexedDatasetBuilder(tmp_path / "x_label_document", np.int32) as labels:
        labels.add_document([0])
        labels.finalize()
    for ending in (".bin", ".idx"):
        (tmp_path / f"x_image_document{ending}").write_bytes(Path(prefix + ending).read_bytes())
    with pytest.raises(UserError, match="x_label_document.bin: 1 labels for 10 images"):
        build(data_path=f"{tmp_path}/x_image_document")


def test_sets_that_number_their_classes_differently_are_refused(tmp_path: Path) -> None:
    records = [ImageRecord(f"image {number}", pixels(number), number) for number in range(5)]
    classes = ["ape", "bee", "cat", "dog", "elk"]
    names = {"train": classes, "valid": [*classes[:3], "elk", "dog"], "test": None}
    sets = {}
    for name, own in names.items():
        found = prepare_images(Listing(records, own), tmp_path / name, TokenizerConfig(), Faults(False))
        sets[f"{name}_data_paths"] = [found.prefixes["image"]]
    message = r"valid_classes.txt: class 3 is elk, and dog in .*train_classes.txt; prepare these images again, with"
    with pytest.raises(UserError, match=message):
        build_image_datasets(DataConfig(**sets), options(), SHAPE, SEED, (10, 1, 1))
    assert build_image_datasets(DataConfig(**sets), options(), SHAPE, SEED, (10, 0, 1)).test is not None


@pytest.mark.launches
@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_broken_image_is_one_line_from_any_worker(tmp_path: Path, num_workers: int) -> None:
    with IndexedDatasetBuilder(tmp_path / "x_image_document", np.uint8) as images:
        for number in range(4):
            images.add_document(np.frombuffer(encoded(pixels(number))[: 300 if number == 2 else None], np.uint8))
        images.finalize()
    with IndexedDatasetBuilder(tmp_path / "x_label_document", np.int32) as labels:
        for number in range(4):
            labels.add_document([number])
        labels.finalize()
    indexed = IndexedDataset(tmp_path / "x_image_document")
    dataset = ImageDataset([LabelledImages(Part(indexed, (1, 4)), 5)], SHAPE, options())
    with pytest.raises(RankError, match=r"x_image_document.bin: image 2 cannot be decoded \(.*\); prepare") as error:
        stream(dataset, 1, 1, num_workers=num_workers)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("size", [1, 2, 3, 10, 64, 1000])
def test_an_order_has_every_number_once(size: int) -> None:
    order = Permutation(size, 1, 0)
    assert sorted(order(place) for place in range(size)) == list(range(size))
    with pytest.raises(IndexError):
        order(size)


def test_orders_are_random() -> None:
    orders = [Permutation(10, 1, epoch) for epoch in range(2000)]
    places = np.array([[order(place) for place in range(10)] for order in orders])
    counts = np.stack([np.bincount(places[:, place], minlength=10) for place in range(10)])
    assert np.abs(counts - 200).max() < 4.5 * np.sqrt(2000 * 0.1 * 0.9)
    large = Permutation(10**9, 1, 0)
    found = np.array([large(place) for place in range(2000)])
    assert np.corrcoef(found[1:], found[:-1])[0, 1] == pytest.approx(0, abs=0.1)
    assert found.mean() / 1e9 == pytest.approx(0.5, abs=0.03)
