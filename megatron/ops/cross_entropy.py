"""Cross entropy over a large vocabulary without an fp32 copy of all logits, the vocabulary shared by tensor ranks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron.mpu.collectives import max_over_ranks, sum_over_ranks
from megatron.mpu.layout import ALONE, Axis

# Rows of logits taken through fp32 at a time: 2048 x 50304 x 4 bytes = 412 MB at most.
CHUNK_ROWS = 2048


def label_columns(labels: Tensor, start: int, width: int) -> tuple[Tensor, Tensor]:
    """(column of each label in a share [start, start + width) of the vocabulary, 0 where it is in another; is it here).

    labels: int64 [T].
    """
    columns = labels - start
    mine = (columns >= 0) & (columns < width)
    return torch.where(mine, columns, 0), mine


def mean_over_mask(losses: Tensor, loss_mask: Tensor | None) -> Tensor:
    """Mean of losses [..] where the mask [..] is one; of all without a mask; 0 where it is zero everywhere."""
    if loss_mask is None:
        return losses.mean()
    mask = loss_mask.to(losses.dtype)
    return (losses * mask).sum() / mask.sum().clamp(min=1.0)


class _ShareOfTokenLosses(torch.autograd.Function):
    """-log softmax(logits)[label] row by row; keeps the logits and one log-sum-exp a row.

    Each rank has columns [start, start + width) of the logits. Ranks exchange three numbers a row, forward only: the
    gradient of a rank's logits needs the whole row's log-sum-exp and nothing else.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, start: int, axis: Axis) -> Tensor:
        wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
        share_sum = torch.cat([torch.logsumexp(rows.to(wide), dim=-1) for rows in logits.split(CHUNK_ROWS)])
        columns, mine = label_columns(labels, start, logits.shape[1])
        label_logits = torch.where(mine, logits.gather(-1, columns[:, None]).squeeze(-1).to(wide), 0.0)
        highest = max_over_ranks(share_sum, axis)
        sums = torch.stack([torch.exp(share_sum - highest), label_logits])
        total, label_logits = sum_over_ranks(sums, axis)
        log_sum = highest + torch.log(total)
        ctx.save_for_backward(logits, columns, mine, log_sum)
        return log_sum - label_logits

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        logits, columns, mine, log_sum = ctx.saved_tensors
        grad_logits = torch.empty_like(logits)
        for start in range(0, len(logits), CHUNK_ROWS):
            rows = slice(start, start + CHUNK_ROWS)
            grad = torch.exp(logits[rows].to(log_sum.dtype) - log_sum[rows, None])
            # One label a row, so that nothing is added twice: the same bits whatever the order.
            grad[torch.arange(len(grad), device=grad.device), columns[rows]] -= mine[rows].to(grad.dtype)
            grad_logits[rows] = grad * grads[0][rows, None]
        return grad_logits, None, None, None


def token_losses(logits: Tensor, labels: Tensor, axis: Axis = ALONE, vocabulary_size: int | None = None) -> Tensor:
    """Cross entropy of every token, in nats.

    Args:
        logits: [.., V_pad], or this tensor rank's share of the vocabulary; padded vocabulary rows take part in the
            softmax, as in the published models.
        labels: int64 [..].
        axis: the ranks that share the vocabulary, by `Axis.share`.
        vocabulary_size: V_pad, needed where it is shared.

    Returns: [..] in fp32 (fp64 for fp64 logits), the same on every tensor rank.
    """
    if axis.size > 1 and vocabulary_size is None:
        raise ValueError("vocabulary_size: needed to know which share of the vocabulary the logits are")
    start, _ = axis.share(vocabulary_size or logits.shape[-1])
    losses = _ShareOfTokenLosses.apply(logits.flatten(0, -2), labels.flatten(), start, axis)
    return losses.view(labels.shape)


def cross_entropy(
    logits: Tensor,
    labels: Tensor,
    loss_mask: Tensor | None = None,
    axis: Axis = ALONE,
    vocabulary_size: int | None = None,
) -> Tensor:
    """Mean of `token_losses` over the loss mask ([..], ones count); over all tokens without one."""
    return mean_over_mask(token_losses(logits, labels, axis, vocabulary_size), loss_mask)
