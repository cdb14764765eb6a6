"""Pattention, token-parameter attention: Pattention(X, K_P, V_P) = Theta(X K_P^T) V_P.

Shapes: x [.., d_in], key [n, d_in], value [n, d_out], scores A and weights [.., n], output [.., d_out].
Source: Wang et al., TokenFormer (ICLR 2025), section 3.2. Departure: a row of scores that is all zero
(the LayerNorm of a constant row) gives zeros and zero gradients where the plain quotient gives NaN.

`joint_reference` is the formula in autograd; megatron.ops.pattention_backends has other implementations of the same
function. All compute several layers that read the same x together (query, key and value), and all run on a tensor
rank's share of each layer's tokens: the row statistics of all layers are then summed over the ranks in one message,
and the outputs are partial sums.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron.mpu.collectives import max_over_ranks, norm_over_ranks, sum_statistics
from megatron.mpu.layout import ALONE, Axis


class ParameterTokens(NamedTuple):
    """What a Pattention layer learns: key [n, d_in], value [n, d_out]; and its int64 scalar tau_tokens = tau^2.

    Tokens in several norm groups have theta over the scores of each group alone: tau_tokens is then [groups], and
    norm_columns says how many of the n tokens each has, in order. () stands for one group of all.

    mask: bool, of a shape that broadcasts to the scores [.., n]; see `mask_scores`.
    """

    key: Tensor
    value: Tensor
    tau_tokens: Tensor
    norm_columns: tuple[int, ...] = ()
    mask: Tensor | None = None


PattentionFunction = Callable[[Tensor, Sequence[ParameterTokens], str, Axis], list[Tensor]]


def statistics_dtype(x: Tensor) -> torch.dtype:
    """Row statistics are taken in fp32, or in fp64 for fp64 inputs."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _tau(tau_tokens: Tensor, scores: Tensor) -> Tensor:
    # An int64 count and a root taken here: a floating buffer would lose digits under .to(bfloat16).
    return tau_tokens.to(statistics_dtype(scores)).sqrt()


def _row_scales(rows: Sequence[Tensor], tau_tokens: Sequence[Tensor], axis: Axis) -> list[Tensor]:
    """tau / ||row||_2 over the rows of all ranks, and 0 where the row is all zero; [.., 1] in the statistics dtype.

    The inner `where` keeps the quotient finite on the branch that is not taken, so its gradient is 0, not NaN.
    """
    norms = [torch.linalg.vector_norm(r, dim=-1, keepdim=True, dtype=statistics_dtype(r)) for r in rows]
    norms = list(norm_over_ranks(torch.stack(norms), axis).unbind())
    scales = []
    for norm, count in zip(norms, tau_tokens, strict=True):
        tau, nonzero = _tau(count, norm), norm > 0
        scales.append(torch.where(nonzero, tau / torch.where(nonzero, norm, 1.0), 0.0))
    return scales


def _softmax_numerators(rows: Sequence[Tensor], axis: Axis) -> list[tuple[Tensor, Tensor]]:
    """exp(A - max) and its row sum [.., 1], maximum and sum over the columns of all ranks."""
    highest = max_over_ranks(torch.stack([row.amax(-1, keepdim=True) for row in rows]), axis)
    numerators = [torch.exp(row - peak) for row, peak in zip(rows, highest, strict=True)]
    sums = sum_statistics(torch.stack([numerator.sum(-1, keepdim=True) for numerator in numerators]), axis)
    return list(zip(numerators, sums, strict=True))


def theta(scores: Tensor, tau_tokens: Tensor, activation: str) -> Tensor:
    """Weights of the parameter tokens from their scores, row by row (the paper's modified softmax).

    Args:
        scores: A = X K_P^T, [.., n].
        tau_tokens: int64 scalar, tau^2; the number of tokens the layer was created with.
        activation: `l2_norm_gelu` GELU(tau A / ||A||), `gelu_l2_norm` tau GELU(A) / ||GELU(A)||, or
            `softmax` tau^2 softmax(A).

    Returns: [.., n] in the dtype of `scores`; computed in fp32 for 16-bit scores.
    """
    return joint_theta([scores], [tau_tokens], activation, ALONE)[0]


def joint_theta(scores: Sequence[Tensor], tau_tokens: Sequence[Tensor], activation: str, axis: Axis) -> list[Tensor]:
    """`theta` of several layers with rows of equal number, each rank holding a share of the columns [.., n_rank]."""
    wide = [score.to(statistics_dtype(score)) for score in scores]
    if activation == "l2_norm_gelu":
        weights = [F.gelu(w * r) for w, r in zip(wide, _row_scales(wide, tau_tokens, axis), strict=True)]
    elif activation == "gelu_l2_norm":
        gelus = [F.gelu(w) for w in wide]
        weights = [gelu * r for gelu, r in zip(gelus, _row_scales(gelus, tau_tokens, axis), strict=True)]
    elif activation == "softmax":
        parts = _softmax_numerators(wide, axis)
        weights = [e * (count.to(e.dtype) / total) for (e, total), count in zip(parts, tau_tokens, strict=True)]
    else:
        raise ValueError(f"activation: unknown '{activation}'; choose l2_norm_gelu, gelu_l2_norm or softmax")
    return [weight.to(score.dtype) for weight, score in zip(weights, scores, strict=True)]


def joint_reference(x: Tensor, layers: Sequence[ParameterTokens], activation: str, axis: Axis = ALONE) -> list[Tensor]:
    """Theta(X K_P^T) V_P of each layer as written in the paper (section 3.2).

    Args:
        x: [.., d_in], whole on every tensor rank.
        layers: tokens of the layers, this rank's share of them.
        activation: see `theta`.
        axis: the ranks that share the tokens: row statistics are summed over them.

    Returns: for each layer [.., d_out]; over the tensor ranks they are partial sums.
    """
    weights = joint_weights_reference(x, layers, activation, axis)
    return [weight @ layer.value for weight, layer in zip(weights, layers, strict=True)]


def joint_weights_reference(
    x: Tensor, layers: Sequence[ParameterTokens], activation: str, axis: Axis = ALONE
) -> list[Tensor]:
    """Theta(X K_P^T) of each layer, [.., n]."""
    hidden = [None if layer.mask is None else ~layer.mask for layer in layers]
    scores = [mask_scores(x @ layer.key.T, h, activation) for layer, h in zip(layers, hidden, strict=True)]
    groups = [_by_norm(score, layer.norm_columns) for score, layer in zip(scores, layers, strict=True)]
    counts = [count for layer in layers for count in layer.tau_tokens.view(-1).unbind()]
    found = iter(joint_theta([part for parts in groups for part in parts], counts, activation, axis))
    weights = [torch.cat([next(found) for _ in parts], -1) if len(parts) > 1 else next(found) for parts in groups]
    return [mask_weights(weight, h, activation) for weight, h in zip(weights, hidden, strict=True)]


def mask_scores(scores: Tensor, hidden: Tensor | None, activation: str, in_place: bool = False) -> Tensor:
    """Scores of rows in which the `hidden` tokens, bool, have no part: neither in the row norm nor in the output.

    As in the official code a score is multiplied by its mask before theta: GELU of 0 is 0, and 0 adds nothing to a
    norm. Its comment on softmax is to add -inf; the lowest number does the same, and gives no NaN where all tokens of
    a row are hidden. tau stays that of the layer. So a hidden token is one that the layer does not have, tau apart.
    """
    if hidden is None:
        return scores
    fill = torch.Tensor.masked_fill_ if in_place else torch.masked_fill
    return fill(scores, hidden, torch.finfo(scores.dtype).min if activation == "softmax" else 0.0)


def mask_weights(weights: Tensor, hidden: Tensor | None, activation: str, in_place: bool = False) -> Tensor:
    """Weights for scores of `mask_scores`; those of a softmax over nothing but hidden tokens become zeros too."""
    if hidden is None or activation != "softmax":
        return weights
    return weights.masked_fill_(hidden, 0.0) if in_place else weights.masked_fill(hidden, 0.0)


def _by_norm(scores: Tensor, norm_columns: tuple[int, ...]) -> Sequence[Tensor]:
    """The columns of each norm group."""
    return scores.split(norm_columns, -1) if norm_columns else (scores,)


def pattention_reference(x: Tensor, key: Tensor, value: Tensor, tau_tokens: Tensor, activation: str) -> Tensor:
    """`joint_reference` of one layer in one process; [.., d_in] -> [.., d_out]."""
    return joint_reference(x, [ParameterTokens(key, value, tau_tokens)], activation)[0]
