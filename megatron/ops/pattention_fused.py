"""Pattention with a backward pass of its own, which keeps the scores and one number a row, or not even the scores.

Between the matrix products stand the row functions (megatron.ops.pattention_rows), in one of several forms. u = one
score matrix, T n entries: autograd keeps 3 u of a Pattention, this 1 u, and nothing with `recompute_scores`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron.mpu.collectives import PendingSum
from megatron.mpu.layout import ALONE, Axis
from megatron.ops.pattention import ParameterTokens, statistics_dtype
from megatron.ops.pattention_rows import GroupedRows, Rows


@dataclass(frozen=True)
class Method:
    """How a Pattention is computed.

    rows: its row functions, of its activation.
    axis: the ranks that share its tokens.
    recompute_scores: multiply by the keys again in the backward pass instead of keeping the scores.
    """

    rows: Rows
    axis: Axis = ALONE
    recompute_scores: bool = False

    @property
    def is_whole(self) -> bool:
        """Does this process have whole rows?"""
        return self.axis.size == 1


class _Pattention(torch.autograd.Function):
    """Layers with equally many tokens: x [T, d], then for each layer its keys [n, d], then its values [n, d_out]."""

    @staticmethod
    def forward(ctx: Any, method: Method, tau2: Tensor, x: Tensor, *tokens: Tensor) -> tuple[Tensor, ...]:
        count = len(tokens) // 2
        scores = _scores(x, tokens[:count])
        if method.is_whole:
            weights, scale = method.rows.forward(scores, tau2)
        else:
            scale = method.rows.scale(method.rows.combined(method.rows.statistics(scores), method.axis), tau2)
            weights = method.rows.weights(scores, scale)
        ctx.method, ctx.count = method, count
        ctx.save_for_backward(tau2, x, scale, *tokens, *(() if method.recompute_scores else (scores,)))
        return tuple(weights[:, i] @ value for i, value in enumerate(tokens[count:]))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        method, count = ctx.method, ctx.count
        tau2, x, scale, *saved = ctx.saved_tensors
        keys, values = saved[:count], saved[count : 2 * count]
        scores = _scores(x, keys) if method.recompute_scores else saved[-1]
        grad = torch.empty_like(scores)
        for i, value in enumerate(values):
            torch.mm(grads[i], value.T, out=grad[:, i])
        if method.is_whole:
            grad_scores, weights = method.rows.backward(scores, scale, grad, tau2)
            grad_values = [weights[:, i].T @ grads[i] for i in range(count)]
        else:
            dots, weights = method.rows.dots(scores, scale, grad)
            pending = PendingSum(dots, method.axis)
            # The sum over the ranks is on its way while the values' gradients are computed.
            grad_values = [weights[:, i].T @ grads[i] for i in range(count)]
            grad_scores = method.rows.grad_scores(scores, scale, grad, pending.wait() / tau2)
        del scores, weights
        grad_x, grad_keys = _key_gradients(x, keys, grad_scores)
        return None, None, grad_x, *grad_keys, *grad_values


def _stacks(x: Tensor, keys: Sequence[Tensor]) -> bool:
    """One product over the keys of all layers? A copy of the keys pays on a GPU, where a launch counts."""
    return len(keys) > 1 and x.device.type != "cpu"


def _scores(x: Tensor, keys: Sequence[Tensor]) -> Tensor:
    """X K^T of each layer, [T, l, n]."""
    if _stacks(x, keys):
        return (x @ torch.cat(tuple(keys)).T).view(len(x), len(keys), -1)
    scores = x.new_empty(len(x), len(keys), len(keys[0]))
    for i, key in enumerate(keys):
        torch.mm(x, key.T, out=scores[:, i])
    return scores


def _key_gradients(x: Tensor, keys: Sequence[Tensor], grad_scores: Tensor) -> tuple[Tensor, Sequence[Tensor]]:
    """Gradients of x, summed over the layers, and of the keys of each."""
    if _stacks(x, keys):
        flat = grad_scores.flatten(1)
        return flat @ torch.cat(tuple(keys)), (flat.T @ x).split(len(keys[0]))
    grad_x = grad_scores[:, -1] @ keys[-1]
    for i in reversed(range(len(keys) - 1)):  # autograd's order, and so the bits of layers computed one by one
        grad_x += grad_scores[:, i] @ keys[i]
    return grad_x, [grad_scores[:, i].T @ x for i in range(len(keys))]


def joint_rowwise(x: Tensor, layers: Sequence[ParameterTokens], method: Method) -> list[Tensor]:
    """`megatron.ops.pattention.joint_reference` by a `Method`: x [.., d_in] -> [.., d_out] of each layer."""
    if len({(len(layer.key), layer.norm_columns) for layer in layers}) > 1:
        return [output for layer in layers for output in joint_rowwise(x, [layer], method)]
    tau2 = torch.stack([layer.tau_tokens for layer in layers], -1).to(statistics_dtype(x)).unsqueeze(-1)  # [l, 1]
    if columns := layers[0].norm_columns:
        tau2 = tau2.unsqueeze(1)  # [groups, 1, l, 1]
        method = Method(GroupedRows(method.rows, columns), method.axis, method.recompute_scores)
    tokens = [*(layer.key for layer in layers), *(layer.value for layer in layers)]
    outputs = _Pattention.apply(method, tau2, x.flatten(0, -2), *tokens)
    return [output.view(*x.shape[:-1], -1) for output in outputs]
