"""The contrastive loss: value and gradients against formulas written out, open_clip's, and one process."""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron.mpu.layout import ALONE, Axis
from megatron.ops.contrastive import capped, contrastive_logits, contrastive_loss
from tests.open_clip_weights import need_open_clip
from tests.ranks import run_ranks

PAIRS, WIDTH = 8, 5


def features(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Of all pairs, fp64, with gradients."""
    random = torch.Generator().manual_seed(seed)
    image, text = (torch.randn(PAIRS, WIDTH, dtype=torch.float64, generator=random) for _ in range(2))
    return image.requires_grad_(), text.requires_grad_(), torch.tensor([3.0], dtype=torch.float64, requires_grad=True)


def by_the_book(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    """-log of each one's share among all, pair by pair."""
    total = torch.zeros((), dtype=image.dtype)
    for i in range(len(image)):
        own = scale[0] * image[i].dot(text[i])
        of_image = torch.stack([torch.exp(scale[0] * image[i].dot(text[j])) for j in range(len(text))]).sum()
        of_text = torch.stack([torch.exp(scale[0] * image[j].dot(text[i])) for j in range(len(image))]).sum()
        total = total + (of_image.log() - own) + (of_text.log() - own)
    return total / (2 * len(image))


def with_gradients(function: object, *tensors: Tensor) -> list[Tensor]:
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    assert callable(function)
    loss = function(*leaves)
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


def test_it_is_the_cross_entropy_of_partners_both_ways() -> None:
    found, expected = (with_gradients(function, *features()) for function in (contrastive_loss, by_the_book))
    for a, b in zip(found, expected, strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-12)
    of_images, of_texts, partners = contrastive_logits(*features())
    assert torch.allclose(of_images, of_texts.T) and partners.tolist() == list(range(PAIRS))


def test_open_clip_has_the_same_loss_and_gradients() -> None:
    open_clip = need_open_clip()

    def theirs(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
        loss: Tensor = open_clip.ClipLoss()(image, text, scale)
        return loss

    for found, expected in zip(
        with_gradients(contrastive_loss, *features()), with_gradients(theirs, *features()), strict=True
    ):
        assert torch.allclose(found, expected, rtol=0, atol=1e-12)


def of_share() -> list[list[float]]:
    """A rank's loss, and gradients of its pairs and of the scale, of a world of pairs."""
    dist.init_process_group("gloo")
    axis = Axis(dist.get_world_size(), dist.get_rank(), dist.group.WORLD)
    image, text, scale = features()
    mine = slice(*axis.share(PAIRS))
    found = with_gradients(lambda i, t, s: contrastive_loss(i, t, s, axis), image[mine], text[mine], scale)
    return [tensor.flatten().tolist() for tensor in found]


@pytest.mark.processes
def test_the_mean_over_data_ranks_is_the_loss_of_all_pairs_in_value_and_gradient() -> None:
    """What is gathered gets the sum of the ranks' gradients; a mean of them, or none, would be another loss."""
    loss, of_image, of_text, of_scale = with_gradients(contrastive_loss, *features())
    losses, images, texts, scales = (list(parts) for parts in zip(*run_ranks(4, of_share), strict=True))
    assert torch.tensor(losses, dtype=torch.float64).mean().item() == pytest.approx(loss.item(), abs=1e-12)
    assert torch.tensor(scales, dtype=torch.float64).mean().item() == pytest.approx(of_scale.item(), abs=1e-12)
    for parts, whole in ((images, of_image), (texts, of_text)):
        mean = torch.tensor(parts, dtype=torch.float64).flatten() / 4  # as data parallelism averages
        assert torch.allclose(mean, whole.flatten(), rtol=0, atol=1e-12)


def test_a_capped_value_can_only_come_back() -> None:
    limit = math.log(100)
    for value, slope, expected in ((4.0, -1.0, -1.0), (4.0, 1.0, 1.0), (5.0, -1.0, 0.0), (5.0, 1.0, 1.0)):
        x = torch.tensor([value], requires_grad=True)
        y = capped(x, limit)
        assert y.item() == pytest.approx(min(value, limit))
        (slope * y).backward()
        assert x.grad is not None and x.grad.item() == expected, (value, slope)


def test_one_rank_alone_needs_no_process_group() -> None:
    assert contrastive_loss(*features(), ALONE).item() == contrastive_loss(*features()).item()
