"""Images made ready for an exported model, as an evaluation does it: the root of image_processing_tokenformer.py.

It becomes a file of its own as megatron.exchange.huggingface_model does. Needs Pillow and transformers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from transformers.image_processing_utils import BaseImageProcessor, BatchFeature
from transformers.image_transforms import to_pil_image
from transformers.image_utils import make_flat_list_of_images

from megatron.data.augment import centre_crop
from megatron.data.decode import MODES, converted


class TokenFormerImageProcessor(BaseImageProcessor):
    """The centre of an image, once its shorter edge is image_size / crop_pct (bicubic), normalised.

    Args:
        image_size: height and width of what comes out, in pixels.
        in_channels: 3 of colours, 1 of greys.
        crop_pct: share of the shorter edge that is kept.
        image_mean, image_std: of each channel, with pixels from 0 to 1.
    """

    model_input_names = ["pixel_values"]

    def __init__(
        self,
        image_size: int = 224,
        in_channels: int = 3,
        crop_pct: float = 0.875,
        image_mean: Sequence[float] = (0.5, 0.5, 0.5),
        image_std: Sequence[float] = (0.5, 0.5, 0.5),
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.image_size, self.in_channels, self.crop_pct = image_size, in_channels, crop_pct
        self.image_mean, self.image_std = list(image_mean), list(image_std)

    def preprocess(self, images: Any, return_tensors: Any = None, **kwargs: Any) -> BatchFeature:
        """One image or several, of Pillow or arrays -> pixel_values, float32 [b, c, image_size, image_size].

        return_tensors: pt or np; without it a list of arrays.
        """
        flat: Any = make_flat_list_of_images(images)
        pixels = [self._pixels(to_pil_image(image)) for image in flat]
        return BatchFeature(data={"pixel_values": pixels}, tensor_type=return_tensors)

    def _pixels(self, image: Any) -> Any:
        cropped = centre_crop(converted(image, MODES[self.in_channels]), self.image_size, self.crop_pct)
        pixels = np.array(cropped, dtype=np.float32).reshape(self.image_size, self.image_size, -1).transpose(2, 0, 1)
        return (pixels - _scaled(self.image_mean)) / _scaled(self.image_std)


def _scaled(values: Sequence[float]) -> Any:
    """[c, 1, 1], of pixels from 0 to 255."""
    return np.float32(255) * np.array(values, dtype=np.float32)[:, None, None]
