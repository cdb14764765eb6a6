"""Communication between the ranks of an axis, as autograd pairs: each operation knows its backward.

Volumes are elements that one rank sends in a ring, N being the elements of the whole tensor and t the ranks:
an all-gather or a reduce-scatter moves N (t-1)/t, an all-reduce twice that. Every function takes an `Axis`, and on an
axis of one returns its input.

A tensor is *whole* (the same on every rank), *partial* (the ranks' tensors sum to the whole one), or *sharded* along a
dimension. What a layer takes and gives between the ranks is named by a `Form`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from megatron.mpu.layout import Axis

Form = Literal["whole", "channels", "tokens"]
"""Activations [b, s, d]: whole; sharded by channels, [b, s, d/t]; sharded by tokens, [b, s/t, d]."""

Item = TypeVar("Item")

_TOKENS, _CHANNELS = 1, -1  # dimensions of [b, s, d]


def enter(x: Tensor, form: Form, axis: Axis) -> Tensor:
    """The whole input of a layer that every rank has a share of; gradients come back as partial sums.

    From `form`: whole -> `copy_to_ranks`; channels, tokens -> `gather`.
    """
    if form == "whole":
        return copy_to_ranks(x, axis)
    return gather(x, _TOKENS if form == "tokens" else _CHANNELS, axis)


def leave(x: Tensor, form: Form, axis: Axis) -> Tensor:
    """The sum of the ranks' partial outputs in `form`: whole -> `sum_over_ranks`; else -> `sum_scatter`."""
    if form == "whole":
        return sum_over_ranks(x, axis)
    return sum_scatter([x], _TOKENS if form == "tokens" else _CHANNELS, axis)[0]


def copy_to_ranks(x: Tensor, axis: Axis) -> Tensor:
    """Whole -> whole. Forward: nothing; 0. Backward: all-reduce of the partial gradients; 2 N (t-1)/t."""
    return x if axis.size == 1 else _CopyToRanks.apply(x, axis)


def sum_over_ranks(x: Tensor, axis: Axis) -> Tensor:
    """Partial -> whole. Forward: all-reduce; 2 N (t-1)/t. Backward: nothing; 0."""
    return x if axis.size == 1 else _SumOverRanks.apply(x, axis)


def sum_statistics(x: Tensor, axis: Axis) -> Tensor:
    """Partial -> whole, for a number that each rank goes on to use for a part of its own.

    Forward: all-reduce; 2 N (t-1)/t. Backward: all-reduce of the partial gradients; 2 N (t-1)/t.
    """
    return x if axis.size == 1 else _SumOverRanks.apply(_CopyToRanks.apply(x, axis), axis)


@torch.no_grad()
def max_over_ranks(x: Tensor, axis: Axis) -> Tensor:
    """The largest of the ranks' values, element by element; no gradient. Forward: all-reduce; 2 N (t-1)/t."""
    if axis.size == 1:
        return x.detach()
    x = x.detach().clone()
    dist.all_reduce(x, op=dist.ReduceOp.MAX, group=axis.group)
    return x


def norm_over_ranks(norms: Tensor, axis: Axis) -> Tensor:
    """Norms of whole rows from the norms of the ranks' parts of them; a row of zeros has norm 0 and gradient 0.

    Forward and backward: `sum_statistics`.
    """
    if axis.size == 1:
        return norms
    squares = sum_statistics(norms.square(), axis)
    nonzero = squares > 0
    return torch.where(nonzero, torch.where(nonzero, squares, 1.0).sqrt(), 0.0)


def gather(x: Tensor, dim: int, axis: Axis) -> Tensor:
    """Sharded along `dim` -> whole, of which each rank uses a part of its own.

    Forward: all-gather; N (t-1)/t. Backward: reduce-scatter of the partial gradients; N (t-1)/t.
    """
    return x if axis.size == 1 else _Gather.apply(x, dim % x.dim(), axis)


def sum_scatter(parts: Sequence[Tensor], dim: int, axis: Axis) -> list[Tensor]:
    """Partial tensors of one shape -> their sums, sharded along `dim`, in one message.

    Forward: reduce-scatter; N (t-1)/t for each. Backward: all-gather; N (t-1)/t for each.
    """
    if axis.size == 1:
        return list(parts)
    return list(_SumScatter.apply(dim % parts[0].dim(), axis, *parts))


def gather_shares(x: Tensor, size: int, axis: Axis) -> Tensor:
    """Last dimension in shares of `size` (`Axis.share`, they may differ by one) -> whole, [.., size].

    For results that every rank uses alike. Forward: all-gather; N (t-1)/t. Backward: nothing (each rank keeps its share
    of the gradient); 0.
    """
    return x if axis.size == 1 else _GatherShares.apply(x, size, axis)


def from_first_rank(x: Tensor, axis: Axis) -> Tensor:
    """The first rank's tensor, on every rank; no gradient. Forward: broadcast; N (t-1)/t at most."""
    if axis.size > 1:
        x = x.contiguous()
        dist.broadcast(x, group=axis.group, group_src=0)
    return x


def object_from_first_rank(value: Item, axis: Axis) -> Item:
    """The first rank's value, pickled, on every rank: what was typed, drawn or read there."""
    box = [value]
    if axis.size > 1:
        dist.broadcast_object_list(box, group=axis.group, group_src=0)
    return box[0]


def gather_objects(value: Item, axis: Axis) -> list[Item]:
    """The value of every rank, pickled, by rank."""
    values = [value] * axis.size
    if axis.size > 1:
        dist.all_gather_object(values, value, group=axis.group)
    return values


class PendingSum:
    """An all-reduce on its way, so that computation can go on meanwhile; 2 N (t-1)/t."""

    def __init__(self, x: Tensor, axis: Axis) -> None:
        self._x, self._work = x, None
        if axis.size > 1:
            self._work = dist.all_reduce(x, group=axis.group, async_op=True)

    def wait(self) -> Tensor:
        """The sum over the ranks; it is in the tensor that was given."""
        if self._work is not None:
            self._work.wait()
        return self._x


def _all_reduce(x: Tensor, axis: Axis) -> Tensor:
    x = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(x, group=axis.group)
    return x


def _all_gather(x: Tensor, axis: Axis) -> Tensor:
    """[..] of each rank -> [t, ..]."""
    everyone = x.new_empty(axis.size, *x.shape)
    # torch 2.13 has renamed all_gather_into_tensor.
    call = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    call(everyone.view(-1), x.contiguous().view(-1), group=axis.group)
    return everyone


def _reduce_scatter(x: Tensor, axis: Axis) -> Tensor:
    """[t, ..] of each rank -> the sum of the ranks' [r, ..]."""
    mine = x.new_empty(x.shape[1:])
    call = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
    call(mine.view(-1), x.contiguous().view(-1), group=axis.group)
    return mine


def _join(shards: Tensor, dim: int) -> Tensor:
    """[t, ..] -> the shards side by side along `dim` of [..]; no copy for dim 0."""
    return shards.movedim(0, dim).flatten(dim, dim + 1)


def _split(x: Tensor, dim: int, axis: Axis) -> Tensor:
    """The inverse of `_join`, as a view; ValueError when the dimension does not divide."""
    if x.shape[dim] % axis.size:
        raise ValueError(f"dimension {dim} of {list(x.shape)} cannot be sharded evenly over {axis.size} ranks")
    return x.unflatten(dim, (axis.size, -1)).movedim(dim, 0)


class _CopyToRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _all_reduce(grads[0], ctx.axis), None


class _SumOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        return _all_reduce(x, axis)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, axis: Axis) -> Tensor:
        ctx.dim, ctx.axis = dim, axis
        return _join(_all_gather(x, axis), dim)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return _reduce_scatter(_split(grads[0], ctx.dim, ctx.axis), ctx.axis), None, None


class _SumScatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, dim: int, axis: Axis, *parts: Tensor) -> tuple[Tensor, ...]:
        ctx.dim, ctx.axis = dim, axis
        message = torch.stack([_split(part, dim, axis) for part in parts], dim=1)  # [t, parts, ..]
        return _reduce_scatter(message, axis).unbind(0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        everyone = _all_gather(torch.stack(grads), ctx.axis)  # [t, parts, ..]
        return None, None, *(_join(everyone[:, i], ctx.dim) for i in range(len(grads)))


class _GatherShares(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, size: int, axis: Axis) -> Tensor:
        ctx.bounds = axis.share(size)
        ranks = axis.size
        longest = -(-size // ranks)
        padded = torch.nn.functional.pad(x, (0, longest - x.shape[-1]))
        everyone = _all_gather(padded, axis)
        starts = [size * rank // ranks for rank in range(ranks + 1)]
        return torch.cat([everyone[r, ..., : starts[r + 1] - starts[r]] for r in range(ranks)], dim=-1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        start, stop = ctx.bounds
        return grads[0][..., start:stop], None, None
