"""The head and its cross entropy over chunks of rows: the logits of all tokens never exist at once.

    logits = h W^T, loss = mean over the mask of (log-sum-exp(logits) - logits[label])

Shapes: hidden h [T, d], weight W [V, d] or this tensor rank's share of its rows, labels [T]. A chunk's logits become
its losses and, in place, their own gradient, from which come the chunk's rows of dh and its part of dW. So everything
is computed in the forward pass, and the backward pass only multiplies by the gradient of the loss.

Precision. Statistics are taken in fp32 (fp64 for fp64). dW is added up over the chunks in fp32 and rounded once. Rows
of the gradient carry a power of two, about the number of tokens, until the backward pass: without it the gradients of
16-bit logits, which are 1/T of a probability, would be too small for fp16 before the loss scale reaches them.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron.mpu.collectives import max_over_ranks, sum_over_ranks
from megatron.mpu.layout import ALONE, Axis
from megatron.ops.cross_entropy import label_columns, mean_over_mask

# Bytes of a chunk's logits. On a GPU each chunk reads and writes dW once, 4 % of the head's time at 5k rows of 50304 in
# 16 bits; on a CPU fewer rows make the matrix products slower, and more do not make them faster.
CHUNK_BYTES = {"cuda": 512 * 2**20, "cpu": 256 * 2**20}
# Bytes of the fp32 copy of a part of a chunk, which torch's own operations go through.
PIECE_BYTES = {"cuda": 64 * 2**20, "cpu": 16 * 2**20}


def chunk_rows(columns: int, element_bytes: int, device_type: str) -> int:
    """Rows of a chunk of logits with `columns` columns of `element_bytes`, a multiple of 128 where that is possible."""
    rows = CHUNK_BYTES["cpu" if device_type == "cpu" else "cuda"] // (columns * element_bytes)
    return rows // 128 * 128 or max(1, rows)


def piece_rows(columns: int, device_type: str) -> int:
    """Rows of a chunk that are taken through fp32 at a time."""
    return max(1, PIECE_BYTES["cpu" if device_type == "cpu" else "cuda"] // (4 * columns))


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    loss_mask: Tensor | None = None,
    axis: Axis = ALONE,
    vocabulary_size: int | None = None,
) -> Tensor:
    """`cross_entropy(hidden @ weight.T, ..)`, a scalar, without all logits at once.

    Args:
        hidden: [.., d], the same on every tensor rank; its gradient is this rank's partial sum.
        weight: [V_pad, d], or this tensor rank's share of its rows; in the dtype of `hidden`.
        labels: int64 [..].
        loss_mask: [..], ones count; without it all tokens do.
        axis: the ranks that share the vocabulary, by `Axis.share`.
        vocabulary_size: V_pad, needed where it is shared.

    Returns: the mean in fp32 (fp64 for fp64 inputs), the same on every tensor rank. Without gradients only losses are
    computed. Differentiable once.
    """
    if axis.size > 1 and vocabulary_size is None:
        raise ValueError("vocabulary_size: needed to know which share of the vocabulary the weight is")
    start, _ = axis.share(vocabulary_size or len(weight))
    # Ranks exchange the statistics of each chunk, so they need chunks of the same rows whatever their own share.
    rows = chunk_rows(-(-(vocabulary_size or len(weight)) // axis.size), hidden.element_size(), hidden.device.type)
    mask = None if loss_mask is None else loss_mask.flatten()
    return _MeanLoss.apply(
        hidden.flatten(0, -2), weight, labels.flatten(), mask, start, axis, rows, torch.is_grad_enabled()
    )


class _MeanLoss(torch.autograd.Function):
    """Keeps the gradients themselves, of a loss that is `scale` times as large."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, mask: Tensor | None,
        start: int, axis: Axis, rows: int, gradients: bool,
    ) -> Tensor:  # fmt: skip
        wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        for_hidden, for_weight = (gradients and needed for needed in ctx.needs_input_grad[:2])
        columns, mine = label_columns(labels, start, len(weight))
        factors, scale = _row_factors(labels, mask, wide)
        losses = torch.empty(labels.shape, dtype=wide, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if for_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=wide) if for_weight else None
        storage = hidden.new_empty(min(rows, len(hidden)), len(weight))
        for first in range(0, len(hidden), rows):
            part = slice(first, first + rows)
            logits = storage[: len(columns[part])]
            torch.mm(hidden[part], weight.t(), out=logits)
            log_sums, label_logits = _statistics(logits, columns[part], mine[part], wide, axis)
            losses[part] = log_sums - label_logits
            if for_hidden or for_weight:
                _logits_to_gradient(logits, log_sums, columns[part], mine[part], factors[part])
            if grad_hidden is not None:
                torch.mm(logits, weight, out=grad_hidden[part])
            if grad_weight is not None:
                _add_product(grad_weight, logits, hidden[part])
        ctx.save_for_backward(grad_hidden, grad_weight, scale)
        ctx.weight_dtype = weight.dtype
        return mean_over_mask(losses, mask)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight, scale = ctx.saved_tensors
        factor = (grads[0] / scale).view(1, 1)  # not a scalar, which would be rounded to 16 bits before it multiplies
        of_hidden = None if grad_hidden is None else _scaled(grad_hidden, factor, grad_hidden.dtype)
        of_weight = None if grad_weight is None else _scaled(grad_weight, factor, ctx.weight_dtype)
        return of_hidden, of_weight, None, None, None, None, None, None


def _scaled(x: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """x * factor, rounded to `dtype` once, without a wide copy of x."""
    result = torch.empty_like(x, dtype=dtype)
    for piece in _pieces(x):
        result[piece] = x[piece] * factor
    return result


def _row_factors(labels: Tensor, mask: Tensor | None, wide: torch.dtype) -> tuple[Tensor, Tensor]:
    """(what each row's gradient is multiplied with, [T]; the power of two that is in it and is divided out later)."""
    ones = torch.ones(labels.shape, dtype=wide, device=labels.device)
    counts = ones if mask is None else mask.to(wide)
    total = counts.sum().clamp(min=1.0)
    scale = torch.exp2(torch.log2(total).floor())
    return counts * (scale / total), scale


def _pieces(x: Tensor) -> list[slice]:
    """The rows of x [rows, columns], so many at a time as go through fp32 together."""
    size = piece_rows(x.shape[1], x.device.type)
    return [slice(first, first + size) for first in range(0, len(x), size)]


def _row_kernels(logits: Tensor) -> Any:
    """megatron.ops.cross_entropy_triton, or None where torch's operations do its work."""
    if not logits.is_cuda or logits.dtype == torch.float64 or find_spec("triton") is None:
        return None
    from megatron.ops import cross_entropy_triton

    return cross_entropy_triton


def _statistics(logits: Tensor, columns: Tensor, mine: Tensor, wide: torch.dtype, axis: Axis) -> tuple[Tensor, Tensor]:
    """(log-sum-exp, logit of the label) of each row over the columns of all ranks, [r] each."""
    if (kernels := _row_kernels(logits)) is not None:
        log_sums, label_logits = kernels.row_statistics(logits, columns, mine)
    else:
        log_sums = torch.cat([torch.logsumexp(logits[piece].to(wide), dim=-1) for piece in _pieces(logits)])
        label_logits = torch.where(mine, logits.gather(-1, columns[:, None]).squeeze(-1).to(wide), 0.0)
    if axis.size == 1:
        return log_sums, label_logits
    highest = max_over_ranks(log_sums, axis)
    total, label_logits = sum_over_ranks(torch.stack([torch.exp(log_sums - highest), label_logits]), axis)
    return highest + torch.log(total), label_logits


def _logits_to_gradient(logits: Tensor, log_sums: Tensor, columns: Tensor, mine: Tensor, factors: Tensor) -> None:
    """Logits become factor * (softmax - [column is the label]), in place; rounded once."""
    # exp(x - (log-sum-exp - log f)) is f times the probability, and 0 for f = 0: the factor needs no pass of its own.
    shifts, corrections = log_sums - torch.log(factors), torch.where(mine, factors, 0.0)
    if (kernels := _row_kernels(logits)) is not None:
        kernels.logits_to_gradient(logits, columns, corrections, shifts)
        return
    numbers = torch.arange(len(logits), device=logits.device)
    for piece in _pieces(logits):
        same = logits.dtype == shifts.dtype
        grad = (logits[piece] if same else logits[piece].to(shifts.dtype)).sub_(shifts[piece, None]).exp_()
        # One label a row, so that nothing is added twice: the same bits whatever the order.
        grad[numbers[: len(grad)], columns[piece]] -= corrections[piece]
        if not same:
            logits[piece] = grad


def _addmm_has_out_dtype() -> bool:
    """Can torch add a product of 16-bit matrices to an fp32 one (torch 2.8; on CUDA only)?"""
    return "dtype_out" in torch.ops.aten.addmm.overloads()


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total [V, d] += left [r, V]^T right [r, d], added up in the precision of `total`."""
    if left.dtype == total.dtype:
        total.addmm_(left.t(), right)
    elif left.is_cuda and _addmm_has_out_dtype():
        torch.addmm(total, left.t(), right, out_dtype=total.dtype, out=total)
    elif left.is_cuda:
        total.add_(torch.mm(left.t(), right))
    else:
        for piece in _pieces(left):
            total.addmm_(left[piece].to(total.dtype).t(), right[piece].to(total.dtype))
