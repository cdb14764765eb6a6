"""Images and their captions from .bin/.idx pairs: training samples with augmentation, and sets that are evaluated.

`X_image_document` holds encoded images, one a document of uint8; `X_text_document` the captions of each, every one a
sequence of token ids that ends with the end of the document; `X_prompt_length_document`, where there is one, how many
ids of each caption are a prompt, which is given and not learned.

What a training sample is depends on the seed and its number k alone: the image as megatron.data.images says, the
caption, of an image that has several, from the same generator of (seed, k).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from megatron.config.sections.data import DataConfig
from megatron.config.sections.images import ImagesConfig
from megatron.data.augment import sample_generator
from megatron.data.datasets import Datasets, Part
from megatron.data.image_batch import ImageShape, TextShape
from megatron.data.image_sets import Augmentation, EpochOrder, ImageParts, StoredImages, centre, image_parts
from megatron.data.indexed import IndexedDataset
from megatron.errors import ConfigError, UserError

TEXT_SUFFIX, PROMPT_SUFFIX = "_text_document", "_prompt_length_document"


@dataclass(frozen=True)
class StoredCaption:
    """Token ids of a caption, end of the document included, the first `prompt_length` of which are given."""

    ids: npt.NDArray[np.integer]
    prompt_length: int

    def padded(self, shape: TextShape) -> dict[str, Tensor]:
        """{ids, end, loss_mask}; see ImageTextDataset. What is too long is cut off before its end of the document."""
        length = min(len(self.ids), shape.seq_length)
        ids = torch.full((shape.seq_length,), shape.eod_id)
        ids[: length - 1] = torch.from_numpy(self.ids[: length - 1].astype(np.int64))
        mask = torch.zeros(shape.seq_length, dtype=torch.bool)
        # A text that was cut off does not end there.
        mask[self.prompt_length : length - (length < len(self.ids))] = True
        return {"ids": ids, "end": torch.tensor(length - 1), "loss_mask": mask}


class CaptionedImages(StoredImages):
    """The documents [first, end) of an image pair, with their captions. Raises UserError where these do not fit."""

    def __init__(self, part: Part) -> None:
        super().__init__(part)
        self._texts = self.beside(TEXT_SUFFIX, "captions")
        self._bounds, sizes = self._texts.document_indices, self._texts.sizes
        if not np.diff(self._bounds).all() or not sizes.all():
            raise UserError(f"{self._texts.idx_path}: an image has no caption, or an empty one; prepare both again")
        self._prompts = self._prompt_lengths(sizes)

    def _prompt_lengths(self, sizes: npt.NDArray[np.integer]) -> IndexedDataset | None:
        if not Path(f"{self._stem}{PROMPT_SUFFIX}.idx").exists():
            return None
        found = self.beside(PROMPT_SUFFIX, "lists of prompt lengths")
        if len(found.tokens) != len(sizes) or ((found.tokens < 0) | (found.tokens >= sizes)).any():
            raise UserError(f"{found.bin_path}: is not of the captions of {self._texts.bin_path}; prepare both again")
        return found

    def caption_counts(self) -> npt.NDArray[np.int64]:
        """How many captions each image of this part has."""
        return np.diff(self._bounds[self._first : self._end + 1])

    def captions(self, index: int) -> list[StoredCaption]:
        """All captions of image `index` of this part."""
        first, end = self._bounds[self._first + index : self._first + index + 2].tolist()
        lengths = self._prompts.tokens[first:end].tolist() if self._prompts else [0] * (end - first)
        return [StoredCaption(self._texts[first + number], length) for number, length in enumerate(lengths)]


class ImageTextDataset:
    """Every image once, in order, with its first caption; its centre, without augmentation.

    A sample is {images: uint8 [c, H, W], ids: int64 [seq_length], end: int64 scalar, the place of the last id of the
    caption, loss_mask: bool [seq_length], the ids that are to be predicted}. Behind the caption there are
    end-of-document ids; one that is longer is cut off, and its last id is an end that is not to be predicted.

    Args:
        every_caption: every caption once instead, each with its image.

    Raises: RankError, by an item, for an image that is broken.
    """

    def __init__(
        self,
        parts: Sequence[CaptionedImages],
        shape: ImageShape,
        text: TextShape,
        images: ImagesConfig,
        every_caption: bool = False,
    ) -> None:
        self._parts, self._shape, self._options = ImageParts(parts), shape, images
        self.text = text
        """What becomes of its captions."""
        counts = [part.caption_counts() if every_caption else np.ones(len(part), np.int64) for part in parts]
        self._ends = np.cumsum(np.concatenate(counts))

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        image, number = self._place(index)
        part, place = self._parts.place(image)
        pixels = centre(part.image(place, self._shape.channels), self._shape, self._options)
        return {"images": pixels, **part.captions(place)[number].padded(self.text)}

    def _place(self, index: int) -> tuple[int, int]:
        """(image, which of its captions)."""
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        image = int(np.searchsorted(self._ends, index, side="right"))
        return image, index - int(self._ends[image - 1] if image else 0)

    def captions(self, index: int) -> list[StoredCaption]:
        """All captions of the image of sample `index`."""
        part, place = self._parts.place(self._place(index)[0])
        return part.captions(place)

    def origins(self, index: int) -> list[dict[str, Any]]:
        """What sample `index` is made of."""
        return [self._parts.origin(self._place(index)[0])]


class AugmentedImageTexts:
    """Training samples as ImageTextDataset has them, epoch after epoch, each in another order.

    An epoch has every image once, augmented, with one of its captions.

    Args:
        seed: of the orders and of all that is drawn.
        num_samples: length of the set. A longer one begins with the same samples.
    """

    def __init__(
        self,
        parts: Sequence[CaptionedImages],
        shape: ImageShape,
        text: TextShape,
        images: ImagesConfig,
        seed: int,
        num_samples: int,
    ) -> None:
        self._parts, self._shape, self._text = ImageParts(parts), shape, text
        self._seed, self._num_samples = seed, num_samples
        self._image = EpochOrder(self._parts.num_images, seed)
        self._augment = Augmentation(shape, images)

    def __len__(self) -> int:
        return self._num_samples

    def __getitem__(self, sample: int) -> dict[str, Tensor]:
        if not 0 <= sample < len(self):
            raise IndexError(f"sample {sample} of {len(self)}")
        part, place = self._parts.place(self._image(sample))
        random = sample_generator(self._seed, sample)
        pixels = self._augment(part.image(place, self._shape.channels), random)
        captions = part.captions(place)
        chosen = captions[random.integers(len(captions))]
        return {"images": torch.from_numpy(pixels), **chosen.padded(self._text)}

    def origins(self, sample: int) -> list[dict[str, Any]]:
        """The image that sample `sample` is made of."""
        return [self._parts.origin(self._image(sample))]


def build_image_text_datasets(
    data: DataConfig,
    images: ImagesConfig,
    shape: ImageShape,
    text: TextShape,
    seed: int,
    samples: Sequence[int],
    every_caption: bool = False,
) -> Datasets:
    """The data sets of captioned images that a data section names.

    Args:
        samples: of training, validation and test that are needed (0: not built). The training set has as many.
        every_caption: sets that are evaluated have every caption of theirs once, else every image.

    Raises: UserError when data is missing or damaged, and for weights of a blend and options that mix labels.
    """
    for key in ("mixup", "cutmix", "label_smoothing"):
        if getattr(images, key):
            raise ConfigError(key, "is for labels, and captions cannot be mixed", "remove it")
    found = image_parts(data, shape, samples)
    parts = {name: [CaptionedImages(part) for part in split] for name, split in found.items()}
    train = AugmentedImageTexts(parts["train"], shape, text, images, seed, samples[0]) if parts["train"] else None
    valid, test = (
        ImageTextDataset(parts[name], shape, text, images, every_caption) if parts[name] else None
        for name in ("valid", "test")
    )  # fmt: skip
    return Datasets(train, valid, test)
