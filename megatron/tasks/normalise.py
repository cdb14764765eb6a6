"""Images as models read them."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron.config.sections.images import ImagesConfig


class Normalise:
    """Subtracts the mean of each channel and divides by its standard deviation, with pixels from 0 to 255.

    Raises: ConfigError, when it is made, for means and deviations of another number of channels.
    """

    def __init__(self, images: ImagesConfig, channels: int) -> None:
        mean, std = images.normalisation(channels)
        self._mean, self._std = (255 * torch.tensor(values)[:, None, None] for values in (mean, std))

    def __call__(self, images: Tensor, device: torch.device) -> Tensor:
        """Images [b, c, H, W], uint8, to fp32 on `device`."""
        images = images.to(device, non_blocking=True)
        return (images - self._mean.to(device)) / self._std.to(device)
