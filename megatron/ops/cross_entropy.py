"""Cross entropy over a large vocabulary without an fp32 copy of all logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron.mpu import SINGLE, Layout

# Rows of logits taken through fp32 at a time: 2048 x 50304 x 4 bytes = 412 MB at most.
CHUNK_ROWS = 2048


class _TokenLosses(torch.autograd.Function):
    """-log softmax(logits)[label] row by row; keeps the logits and one log-sum-exp a row."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor) -> Tensor:
        wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
        log_sum = torch.cat([torch.logsumexp(rows.to(wide), dim=-1) for rows in logits.split(CHUNK_ROWS)])
        ctx.save_for_backward(logits, labels, log_sum)
        return log_sum - logits.gather(-1, labels[:, None]).squeeze(-1).to(wide)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        logits, labels, log_sum = ctx.saved_tensors
        grad_logits = torch.empty_like(logits)
        for start in range(0, len(logits), CHUNK_ROWS):
            rows = slice(start, start + CHUNK_ROWS)
            grad = torch.exp(logits[rows].to(log_sum.dtype) - log_sum[rows, None])
            grad.scatter_add_(-1, labels[rows, None], torch.full_like(grad[:, :1], -1.0))
            grad_logits[rows] = grad * grads[0][rows, None]
        return grad_logits, None


def token_losses(logits: Tensor, labels: Tensor, layout: Layout = SINGLE) -> Tensor:
    """Cross entropy of every token, in nats.

    Args:
        logits: [.., V_pad]; padded vocabulary rows take part in the softmax, as in the published models.
        labels: int64 [..].

    Returns: [..] in fp32 (fp64 for fp64 logits).
    """
    losses = _TokenLosses.apply(logits.flatten(0, -2), labels.flatten())
    return losses.view(labels.shape)


def cross_entropy(logits: Tensor, labels: Tensor, loss_mask: Tensor | None = None, layout: Layout = SINGLE) -> Tensor:
    """Mean of `token_losses` over the loss mask ([..], ones count); over all tokens without one."""
    losses = token_losses(logits, labels, layout)
    if loss_mask is None:
        return losses.mean()
    mask = loss_mask.to(losses.dtype)
    return (losses * mask).sum() / mask.sum().clamp(min=1.0)
