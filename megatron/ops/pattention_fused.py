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
from megatron.ops.pattention import ParameterTokens, mask_scores, mask_weights, statistics_dtype
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
    """Layers with equally many tokens: x [T, d], then for each layer its keys [n, d], then its values [n, d_out].

    hidden: which scores are masked, bool [T, l, n] or [1, l, n].
    """

    @staticmethod
    def forward(
        ctx: Any, method: Method, tau2: Tensor, hidden: Tensor | None, x: Tensor, *tokens: Tensor
    ) -> tuple[Tensor, ...]:
        count = len(tokens) // 2
        scores = _scores(method, hidden, x, tokens[:count])
        weights, scale = _weights(method, hidden, scores, tau2)
        ctx.method, ctx.count = method, count
        ctx.save_for_backward(tau2, hidden, x, scale, *tokens, *(() if method.recompute_scores else (scores,)))
        return _outputs(weights, tokens[count:])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        method, count, activation = ctx.method, ctx.count, ctx.method.rows.activation
        tau2, hidden, x, scale, *saved = ctx.saved_tensors
        keys, values = saved[:count], saved[count : 2 * count]
        scores = _scores(method, hidden, x, keys) if method.recompute_scores else saved[-1]
        grad = torch.empty_like(scores)
        for i, value in enumerate(values):
            torch.mm(grads[i], value.T, out=grad[:, i])
        if method.is_whole:
            grad_scores, weights = method.rows.backward(scores, scale, grad, tau2)
            weights = mask_weights(weights, hidden, activation, in_place=True)
            grad_values = [weights[:, i].T @ grads[i] for i in range(count)]
        else:
            dots, weights = method.rows.dots(scores, scale, grad)
            pending = PendingSum(dots, method.axis)
            weights = mask_weights(weights, hidden, activation, in_place=True)
            # The sum over the ranks is on its way while the values' gradients are computed.
            grad_values = [weights[:, i].T @ grads[i] for i in range(count)]
            grad_scores = method.rows.grad_scores(scores, scale, grad, pending.wait() / tau2)
        del scores, weights
        if hidden is not None:
            grad_scores = grad_scores.masked_fill_(hidden, 0.0)
        grad_x, grad_keys = _key_gradients(x, keys, grad_scores)
        return None, None, None, grad_x, *grad_keys, *grad_values


def _stacks(x: Tensor, keys: Sequence[Tensor]) -> bool:
    """One product over the keys of all layers, which takes a copy of the keys?

    It pays on a GPU, where a launch counts, and on a CPU where there are more rows than keys: x is prepared once for
    all layers, and the gradients that they give it are summed on the way.
    """
    return len(keys) > 1 and (x.device.type != "cpu" or len(x) >= sum(map(len, keys)))


def _scores(method: Method, hidden: Tensor | None, x: Tensor, keys: Sequence[Tensor]) -> Tensor:
    """X K^T of each layer, masked, [T, l, n]."""
    if _stacks(x, keys):
        scores = (x @ torch.cat(tuple(keys)).T).view(len(x), len(keys), -1)
    else:
        scores = x.new_empty(len(x), len(keys), len(keys[0]))
        for i, key in enumerate(keys):
            torch.mm(x, key.T, out=scores[:, i])
    return mask_scores(scores, hidden, method.rows.activation, in_place=True)


def _weights(
    method: Method, hidden: Tensor | None, scores: Tensor, tau2: Tensor, out: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(masked weights, scale) from a rank's scores; see `Rows` for `out`."""
    rows = method.rows
    if method.is_whole:
        weights, scale = rows.forward(scores, tau2, out)
    else:
        scale = rows.scale(rows.combined(rows.statistics(scores), method.axis), tau2)
        weights = rows.weights(scores, scale, out)
    return mask_weights(weights, hidden, rows.activation, in_place=True), scale


def _unkept_weights(method: Method, hidden: Tensor | None, x: Tensor, keys: Sequence[Tensor], tau2: Tensor) -> Tensor:
    """Masked weights [T, l, n] for no backward pass: where it can be, they take the place of the scores."""
    scores = _scores(method, hidden, x, keys)
    return _weights(method, hidden, scores, tau2, scores if method.rows.works_in_place else None)[0]


def _outputs(weights: Tensor, values: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """[T, d_out] of each layer."""
    return tuple(weights[:, i] @ value for i, value in enumerate(values))


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
    if not _are_alike(layers):
        return [output for layer in layers for output in joint_rowwise(x, [layer], method)]
    method, tau2 = _with_norms(x, layers, method)
    tokens = [*(layer.key for layer in layers), *(layer.value for layer in layers)]
    hidden, rows = _hidden(x, layers), x.flatten(0, -2)
    if torch.is_grad_enabled():
        outputs = _Pattention.apply(method, tau2, hidden, rows, *tokens)
    else:
        outputs = _outputs(_unkept_weights(method, hidden, rows, tokens[: len(layers)], tau2), tokens[len(layers) :])
    return [output.view(*x.shape[:-1], -1) for output in outputs]


@torch.no_grad()
def joint_weights(x: Tensor, layers: Sequence[ParameterTokens], method: Method) -> list[Tensor]:
    """The weights that `joint_rowwise` multiplies by the values: [.., n] of each layer, without gradients or masks."""
    if not _are_alike(layers):
        return [weights for layer in layers for weights in joint_weights(x, [layer], method)]
    method, tau2 = _with_norms(x, layers, method)
    weights = _unkept_weights(method, None, x.flatten(0, -2), [layer.key for layer in layers], tau2)
    return [weights[:, i].unflatten(0, x.shape[:-1]) for i in range(len(layers))]


def _are_alike(layers: Sequence[ParameterTokens]) -> bool:
    """Have they equally many tokens, in equal norm groups, so that their scores are one matrix?"""
    return len({(len(layer.key), layer.norm_columns) for layer in layers}) == 1


def _with_norms(x: Tensor, layers: Sequence[ParameterTokens], method: Method) -> tuple[Method, Tensor]:
    """The method for the norm groups of the layers, and their tau^2: [l, 1], of several groups [groups, 1, l, 1]."""
    tau2 = torch.stack([layer.tau_tokens for layer in layers], -1).to(statistics_dtype(x)).unsqueeze(-1)
    if not (columns := layers[0].norm_columns):
        return method, tau2
    return Method(GroupedRows(method.rows, columns), method.axis, method.recompute_scores), tau2.unsqueeze(1)


def _hidden(x: Tensor, layers: Sequence[ParameterTokens]) -> Tensor | None:
    """Which scores of the layers are masked, bool [T, l, n], or [1, l, n] where all rows are masked alike."""
    masks = [layer.mask for layer in layers if layer.mask is not None]
    if not masks:
        return None
    rows = x.shape[:-1] if any(mask.dim() > 1 for mask in masks) else (1,)
    visible = masks[0].new_ones(1)
    shown = [(visible if layer.mask is None else layer.mask).expand(*rows, len(layer.key)) for layer in layers]
    return ~torch.stack([mask.flatten(0, -2) for mask in shown], dim=1)
