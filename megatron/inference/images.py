"""Images that a model reads before a text: from a file to the vectors that take the places of tokens."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from megatron.config.sections.images import ImagesConfig
from megatron.data.decode import BrokenImageError, decode
from megatron.data.image_batch import ImageShape
from megatron.data.image_sets import centre
from megatron.errors import UserError
from megatron.inference.answers import add_tensors
from megatron.model.image_text_model import ImageTextModel
from megatron.tasks.normalise import Normalise


class ImageReader:
    """What a model makes of an image before it speaks of it.

    Args:
        model: in any dtype, on any device.
        images: how images are cut and normalised.
    """

    def __init__(self, model: ImageTextModel, images: ImagesConfig) -> None:
        self._model, self._options, tower = model, images, model.config.image_tower
        self._shape = ImageShape(tower.in_channels, tower.image_size)
        self._normalise = Normalise(images, tower.in_channels)

    def __call__(self, files: Sequence[str]) -> Tensor:
        """[number of files, T, d]. Raises UserError for one that is not there or broken."""
        return self.of_pixels(torch.stack([centre(self._decoded(file), self._shape, self._options) for file in files]))

    @torch.no_grad()
    def of_pixels(self, pixels: Tensor) -> Tensor:
        """Images uint8 [b, c, H, W] -> [b, T, d]."""
        parameter = next(self._model.parameters())
        return self._model.image_vectors(self._normalise(pixels, parameter.device).to(parameter.dtype))

    def _decoded(self, file: str) -> Image.Image:
        return _decoded(file, _content(file), self._shape.channels)

    def digest(self, file: str) -> str:
        """SHA-256 of an image file and of what reads it. Raises UserError for one that is not there or broken."""
        content = _content(file)
        _decoded(file, content, self._shape.channels)
        digest = self._own_digest.copy()
        digest.update(content)
        return digest.hexdigest()

    @cached_property
    def _own_digest(self) -> hashlib._Hash:
        digest = hashlib.sha256()
        add_tensors(digest, self._model)
        return digest


def _content(file: str) -> bytes:
    try:
        return Path(file).read_bytes()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"image: {file} cannot be read: {reason}; name an image file") from None


def _decoded(file: str, content: bytes, channels: int) -> Image.Image:
    try:
        return decode(content, channels)
    except BrokenImageError as error:
        raise UserError(f"image: {file} {error}; name another image file") from None
