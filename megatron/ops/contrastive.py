"""Softmax contrastive loss of pairs over the batch of all data ranks (CLIP: Radford et al., 2021, figure 3).

Legend: b pairs of this rank, B pairs of all ranks, e width of the features.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron.mpu.collectives import gather
from megatron.mpu.layout import ALONE, Axis


def contrastive_logits(image: Tensor, text: Tensor, scale: Tensor, axis: Axis = ALONE) -> tuple[Tensor, Tensor, Tensor]:
    """(own images against all texts [b, B], own texts against all images [b, B], the column of each one's partner [b]).

    Args:
        image, text: features [b, e] of this rank's pairs; every rank has as many.
        scale: factor on their products, [1].
        axis: the data ranks.

    The gradients of what is gathered are summed over the ranks (not averaged), so that the mean of the ranks' gradients
    of a mean over own rows is the gradient of the mean over all B rows.
    """
    images, texts = gather(torch.stack([image, text], dim=1), 0, axis).unbind(1)  # in one message
    partners = axis.rank * len(image) + torch.arange(len(image), device=image.device)
    return scale * image @ texts.T, scale * text @ images.T, partners


def contrastive_loss(image: Tensor, text: Tensor, scale: Tensor, axis: Axis = ALONE) -> Tensor:
    """Cross-entropy in nats of each image's own text among all texts and each text's own image, the mean of both.

    The mean over this rank's pairs; over the ranks, its mean is the loss of all B pairs. See contrastive_logits for the
    arguments.
    """
    return loss_of_logits(*contrastive_logits(image, text, scale, axis))


def loss_of_logits(of_images: Tensor, of_texts: Tensor, partners: Tensor) -> Tensor:
    """The loss of what contrastive_logits gives."""
    return (F.cross_entropy(of_images, partners) + F.cross_entropy(of_texts, partners)) / 2


def capped(x: Tensor, limit: float) -> Tensor:
    """min(x, limit), with the gradient of x wherever a step against it leads below the limit.

    A parameter that is above the limit can come back, as one could that was cut off after each update.
    """
    result: Tensor = _Capped.apply(x, limit)
    return result


class _Capped(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, limit: float) -> Tensor:
        ctx.above = x > limit
        return x.clamp(max=limit)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return torch.where(ctx.above & (grads[0] < 0), 0.0, grads[0]), None
