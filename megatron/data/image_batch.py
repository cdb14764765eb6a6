"""What a batch of images is, for code that also runs without Pillow: not every run has images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

PADDING = -1
"""Number that marks what fills up the last batch of an evaluation."""


@dataclass(frozen=True)
class ImageShape:
    """What a model takes and tells apart: square images of 1 (grey) or 3 channels, and classes."""

    channels: int
    size: int
    num_classes: int = 0
    """0 of a model that tells no classes apart."""

    def blank(self) -> Tensor:
        """A black image, uint8 [c, H, W]."""
        return torch.zeros(self.channels, self.size, self.size, dtype=torch.uint8)


@dataclass(frozen=True)
class TextShape:
    """What becomes of a caption: seq_length ids, padded with the end of the document."""

    seq_length: int
    eod_id: int


def images_of(samples: Sequence[dict[str, Tensor]], size: int, shape: ImageShape) -> dict[str, Tensor]:
    """{images: uint8 [size, c, H, W], labels} of samples; black images with the label PADDING (-1) fill it up."""
    missing = size - len(samples)
    images = [sample["images"] for sample in samples]
    images += [shape.blank()] * missing
    labels = [sample["labels"] for sample in samples] + [torch.tensor(PADDING)] * missing
    return {"images": torch.stack(images), "labels": torch.stack(labels)}


def image_texts_of(
    samples: Sequence[dict[str, Tensor]], size: int, shape: ImageShape, text: TextShape
) -> dict[str, Tensor]:
    """Samples in one dictionary of [size, ...]; black images with the end PADDING (-1) and no loss fill it up."""
    missing = {
        "images": shape.blank(), "ids": torch.full((text.seq_length,), text.eod_id), "end": torch.tensor(PADDING),
        "loss_mask": torch.zeros(text.seq_length, dtype=torch.bool),
    }  # fmt: skip
    rows = [*samples, *[missing] * (size - len(samples))]
    return {key: torch.stack([row[key] for row in rows]) for key in missing}
