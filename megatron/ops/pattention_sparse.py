"""Pattention with a part of its tokens, for each row of the input those of the largest weights; not for training.

    out = sum of W_i V_i over the kept tokens,  W = Theta(X K_P^T) over all tokens

The row norm is that of all tokens, so the weights that are kept are what they are without selection. On a CPU the
product with the values has three forms: few weights add up their own tokens' values one by one; a batch that leaves
many tokens out takes a copy of the values of the others; else all values are multiplied, some by zero.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron.mpu.collectives import gather
from megatron.mpu.layout import ALONE, Axis


class Limits(NamedTuple):
    """Up to where a form of the product takes less time than those behind it."""

    summed: float
    """Kept weights of all rows, as a multiple of the number of tokens, whose values are added up one by one."""
    gathered: float
    """Part of the tokens that a batch uses, whose values are copied."""


LIMITS = Limits(2.0, 0.5)


@dataclass(frozen=True)
class Selection:
    """Which weights of a row are kept; zeros never are.

    count: as many of the largest size, over the tokens of all tensor ranks, and those as large as the last of them; or
    threshold: all that are at least as large.
    widest: the most tokens that a tensor rank holds.
    """

    count: int | None = None
    threshold: float = 0.0
    widest: int = 0


@torch.no_grad()
def kept(weights: Sequence[Tensor], selections: Sequence[Selection], axis: Axis = ALONE) -> list[Tensor]:
    """Which of a rank's weights [.., n] are kept, bool [.., n], layer by layer.

    The choice among the tokens of all ranks is one, so that the result depends on no layout: each rank sends its
    largest weights, as many as could be kept, for all layers in one message.
    """
    sizes = [weight.abs() for weight in weights]
    counts = [selection.count for selection in selections]
    limits: list[Tensor | float] = [selection.threshold for selection in selections]
    chosen = [i for i, count in enumerate(counts) if count is not None]
    tops = [_largest(sizes[i], selections[i], axis) for i in chosen]
    for i, top in zip(chosen, _of_all_ranks(tops, axis), strict=True):
        limits[i] = _smallest_of(top, counts[i] or 0)
    return [size >= _above_zero(limit, size.dtype) for size, limit in zip(sizes, limits, strict=True)]


def _above_zero(limit: Tensor | float, dtype: torch.dtype) -> Tensor | float:
    smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    return max(limit, smallest) if isinstance(limit, float) else limit.clamp_min(smallest)


def _largest(sizes: Tensor, selection: Selection, axis: Axis) -> Tensor:
    """The largest of a rank's weights, as many as may be among the largest of all; zeros fill up to as many on each."""
    assert selection.count is not None
    if axis.size == 1:
        return sizes
    wanted = min(selection.count, selection.widest)
    found = sizes.topk(min(wanted, sizes.shape[-1]), sorted=False).values
    return F.pad(found, (0, wanted - found.shape[-1]))


def _of_all_ranks(tops: Sequence[Tensor], axis: Axis) -> list[Tensor]:
    if axis.size == 1 or not tops:
        return list(tops)
    widths = [top.shape[-1] for top in tops]
    everyone = gather(torch.cat(list(tops), -1)[None], 0, axis)  # [ranks, .., sum of widths]
    return [part.movedim(0, -2).flatten(-2) for part in everyone.split(widths, -1)]


def _smallest_of(sizes: Tensor, count: int) -> Tensor:
    """The `count`-th largest of each row, [.., 1]."""
    return sizes.topk(min(count, sizes.shape[-1]), sorted=False).values.amin(-1, keepdim=True)


def product_of_kept(
    weights: Tensor, keep: Tensor, values: Tensor, product: Callable[[Tensor], Tensor] | None = None
) -> Tensor:
    """The kept weights times the values of their tokens, [.., n] and [n, d_out] -> [.., d_out].

    product: multiplies by all values, where something does so faster than a plain product.
    """
    if weights.device.type == "cpu":  # elsewhere the host would wait to hear how many there are
        if keep.sum() <= LIMITS.summed * len(values):
            return _summed(weights.flatten(0, -2), keep.flatten(0, -2), values).unflatten(0, weights.shape[:-1])
        used = keep.flatten(0, -2).any(0).nonzero().squeeze(-1)
        if len(used) <= LIMITS.gathered * len(values):
            return weights.masked_fill(~keep, 0.0).index_select(-1, used) @ values.index_select(0, used)
    weights = weights.masked_fill(~keep, 0.0)
    return product(weights) if product else weights @ values


def _summed(weights: Tensor, keep: Tensor, values: Tensor) -> Tensor:
    """The product row by row, from the kept tokens' values alone; [T, n] -> [T, d_out].

    A row is cut into parts where there are fewer rows than threads, each of which takes whole sums.
    """
    parts = -(-torch.get_num_threads() // max(1, len(keep)))
    counts = keep.sum(-1, keepdim=True)
    starts = counts.cumsum(0) - counts + counts * torch.arange(parts) // parts  # [T, parts]
    tokens = keep.nonzero()[:, 1]
    sums = F.embedding_bag(tokens, values, starts.flatten(), mode="sum", per_sample_weights=weights[keep])
    return sums.unflatten(0, (-1, parts)).sum(1) if parts > 1 else sums
