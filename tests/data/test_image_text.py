"""Captioned images: samples that depend on their number only, padded captions, and evaluation of each once."""

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
from megatron.data.captions import Caption
from megatron.data.datasets import Part
from megatron.data.image_batch import ImageShape, TextShape, image_texts_of
from megatron.data.image_sources import ImageRecord, Listing
from megatron.data.image_text import (
    AugmentedImageTexts,
    CaptionedImages,
    ImageTextDataset,
    StoredCaption,
    build_image_text_datasets,
)
from megatron.data.prepare_images import Faults, prepare_images
from megatron.errors import UserError
from megatron.tokenizer import build_tokenizer
from tests.data.image_files import pixels

COUNT, SEED = 10, 7
SHAPE, TEXT = ImageShape(3, 16), TextShape(12, 0)
OPTIONS = ImagesConfig(auto_augment="rand-m9-mstd0.5-inc1", reprob=0.5)
TOKENIZER = TokenizerConfig(tokenizer_type="CharLevelTokenizer")


def texts_of(image: int) -> list[str]:
    return [f"{'abc'[number]} {image}" for number in range(1 + image % 3)]


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Images of one to three captions each; those with an even number answer the prompt `q`."""
    records = []
    for image in range(COUNT):
        captions = tuple(Caption(text, "q" * (image % 2 == 0)) for text in texts_of(image))
        records.append(ImageRecord(f"image {image}", pixels(image), None, captions))
    folder = tmp_path_factory.mktemp("captions")
    return prepare_images(Listing(records), folder / "set", TOKENIZER, Faults(False)).prefixes["image"]


def parts_of(prefix: str) -> list[CaptionedImages]:
    indexed = IndexedDataset(prefix)
    return [CaptionedImages(Part(indexed, (0, len(indexed))))]


@pytest.fixture(scope="module")
def train(prefix: str) -> AugmentedImageTexts:
    return AugmentedImageTexts(parts_of(prefix), SHAPE, TEXT, OPTIONS, SEED, 48)


def text_of(sample: dict[str, Tensor]) -> str:
    """The text that a sample's ids say, up to its end."""
    assert int(sample["ids"][sample["end"]]) == TEXT.eod_id
    return build_tokenizer(TOKENIZER).decode(sample["ids"][: int(sample["end"])].tolist())


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def stream(dataset: Any, *layout: int, num_workers: int = 0, start: int = 0) -> list[dict[str, Tensor]]:
    collate = functools.partial(image_texts_of, shape=SHAPE, text=TEXT)
    return list(batches(dataset, *layout, start_sample=start, num_workers=num_workers, collate=collate))


def test_a_sample_is_an_image_with_one_of_its_captions(train: AugmentedImageTexts) -> None:
    seen = Counter[str]()
    for number in range(48):
        sample = train[number]
        assert sample["images"].dtype == torch.uint8 and sample["images"].shape == (3, 16, 16)
        text = text_of(sample)
        image = int(text[-1])
        prompt = "q" * (image % 2 == 0)
        assert text.removeprefix(prompt) in texts_of(image)
        learned = [number for number in range(len(prompt), len(text) + 1)]
        assert sample["loss_mask"].nonzero()[:, 0].tolist() == learned, "the text and its end, not the prompt"
        assert not sample["ids"][int(sample["end"]) :].any()
        seen[text.removeprefix(prompt)] += 1
    assert len(seen) > COUNT + 5, "more than one of each image"


def test_a_sample_depends_on_its_number_only(prefix: str, train: AugmentedImageTexts) -> None:
    samples = [train[number] for number in range(48)]
    longer = AugmentedImageTexts(parts_of(prefix), SHAPE, TEXT, OPTIONS, SEED, 1000)
    order = np.random.default_rng(0).permutation(48).tolist()
    assert all(same(longer[number], samples[number]) for number in order)
    other = AugmentedImageTexts(parts_of(prefix), SHAPE, TEXT, OPTIONS, SEED + 1, 48)
    assert not any(same(other[number], samples[number]) for number in range(48))
    epochs = [[train.origins(e * COUNT + place)[0]["index"] for place in range(COUNT)] for e in range(4)]
    assert all(sorted(epoch) == list(range(COUNT)) for epoch in epochs)


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.launches
def test_workers_ranks_and_a_resume_change_no_bit(train: AugmentedImageTexts) -> None:
    whole = stream(train, 4, 2)
    assert len(whole) == 12
    rest = stream(train, 4, 2, num_workers=2, start=24)
    assert len(rest) == 6 and all(map(same, rest, whole[6:]))
    found = [stream(train, 2, 1, rank, 4)[0] for rank in range(4)]
    assert same({key: torch.cat([part[key] for part in found]) for key in found[0]},
                {key: torch.cat([part[key] for part in whole[:2]]) for key in whole[0]})  # fmt: skip


def test_a_caption_that_is_too_long_is_cut_off() -> None:
    ids = np.array([5, 6, 7, 8, 0], np.uint16)
    whole = StoredCaption(ids, 1).padded(TextShape(5, 0))
    assert whole["ids"].tolist() == [5, 6, 7, 8, 0] and whole["loss_mask"].tolist() == [False, *[True] * 4]
    cut = StoredCaption(ids, 1).padded(TextShape(4, 0))
    assert cut["ids"].tolist() == [5, 6, 7, 0] and int(cut["end"]) == 3
    assert cut["loss_mask"].tolist() == [False, True, True, False], "it does not end there"
    assert not StoredCaption(ids, 4).padded(TextShape(3, 0))["loss_mask"].any()


def test_an_evaluation_has_every_image_or_every_caption_once(prefix: str) -> None:
    first = ImageTextDataset(parts_of(prefix), SHAPE, TEXT, OPTIONS)
    assert len(first) == COUNT
    assert {text_of(first[number]).removeprefix("q") for number in range(COUNT)} == {f"a {i}" for i in range(COUNT)}
    every = ImageTextDataset(parts_of(prefix), SHAPE, TEXT, OPTIONS, every_caption=True)
    rows = [row for rank in range(2) for row in stream(every, 3, 0, rank, 2)]
    assert all(len(batch["end"]) == 3 for batch in rows)
    samples = [{key: batch[key][row] for key in batch} for batch in rows for row in range(3)]
    counted = Counter(text_of(sample).removeprefix("q") for sample in samples if sample["end"] >= 0)
    assert counted == Counter(text for image in range(COUNT) for text in texts_of(image))
    for number in range(len(every)):
        image = first.origins(0)[0] | {"index": every.origins(number)[0]["index"]}
        assert torch.equal(every[number]["images"], first[image["index"]]["images"])
        assert len(every.captions(number)) == 1 + int(text_of(every[number])[-1]) % 3


def test_sets_are_built_from_the_data_section(prefix: str) -> None:
    data = DataConfig(data_path=prefix, split="6,2,2")
    built = build_image_text_datasets(data, OPTIONS, SHAPE, TEXT, SEED, (100, 1, 1))
    assert [len(part) for part in (built.train, built.valid, built.test)] == [100, 2, 2]
    assert {built.train.origins(i)[0]["index"] for i in range(100)} == set(range(6))
    assert [built.valid.origins(i)[0]["index"] for i in range(2)] == [6, 7]
    none = build_image_text_datasets(data, OPTIONS, SHAPE, TEXT, SEED, (0, 0, 0))
    assert none.train is None and none.valid is None
    with pytest.raises(UserError, match="mixup: is for labels, and captions cannot be mixed; remove it"):
        build_image_text_datasets(data, ImagesConfig(mixup=0.5), SHAPE, TEXT, SEED, (1, 0, 0))


def test_captions_of_other_images_are_told(prefix: str, tmp_path: Path) -> None:
    def copied(kind: str, documents: list[list[list[int]]]) -> None:
        with IndexedDatasetBuilder(tmp_path / f"x_{kind}_document", np.int32) as builder:
            for sequences in documents:
                builder.add_sequences(sequences)
            builder.finalize()

    for ending in (".bin", ".idx"):
        (tmp_path / f"x_image_document{ending}").write_bytes(Path(prefix + ending).read_bytes())
    image = f"{tmp_path}/x_image_document"
    with pytest.raises(UserError, match="x_text_document.idx: no such file: the images have no captions; prepare"):
        parts_of(image)
    copied("text", [[[1, 0]]] * 9)
    with pytest.raises(UserError, match="x_text_document.bin: 9 captions for 10 images; prepare both again"):
        parts_of(image)
    for odd in ([], [[]]):
        copied("text", [[[1, 0]]] * 9 + [odd])
        with pytest.raises(UserError, match="x_text_document.idx: an image has no caption, or an empty one"):
            parts_of(image)
    copied("text", [[[1, 0]]] * 10)
    assert len(parts_of(image)[0]) == 10
    for lengths in ([[0]] * 9 + [[0, 0]], [[0]] * 9 + [[2]], [[0]] * 9 + [[-1]]):
        copied("prompt_length", [[length] for length in lengths])
        with pytest.raises(UserError, match="x_prompt_length_document.bin: is not of the captions of"):
            parts_of(image)
