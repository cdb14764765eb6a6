"""Pattention, token-parameter attention: Pattention(X, K_P, V_P) = Theta(X K_P^T) V_P.

Shapes: x [.., d_in], key [n, d_in], value [n, d_out], scores A and weights [.., n], output [.., d_out].
Source: Wang et al., TokenFormer (ICLR 2025), section 3.2. Departure: a row of scores that is all zero
(the LayerNorm of a constant row) gives zeros and zero gradients where the plain quotient gives NaN.

Two implementations of the same function: `joint_reference` is the formula in autograd, `joint_fused` keeps only the
scores and one number a row for the backward pass. `select_backend` picks one by name. Both compute several layers
that read the same x together (query, key and value), and both run on a tensor rank's share of each layer's tokens:
the row statistics of all layers are then summed over the ranks in one message, and the outputs are partial sums.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron.mpu.collectives import PendingSum, max_over_ranks, norm_over_ranks, sum_statistics
from megatron.mpu.layout import ALONE, Axis


class ParameterTokens(NamedTuple):
    """What a Pattention layer learns: key [n, d_in], value [n, d_out]; and its int64 scalar tau_tokens = tau^2."""

    key: Tensor
    value: Tensor
    tau_tokens: Tensor


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
    scores = [x @ layer.key.T for layer in layers]
    weights = joint_theta(scores, [layer.tau_tokens for layer in layers], activation, axis)
    return [weight @ layer.value for weight, layer in zip(weights, layers, strict=True)]


class _FusedL2NormGelu(torch.autograd.Function):
    """l2_norm_gelu that keeps A and r = tau / ||A|| only (1 u instead of the 3 u of autograd; u = one score matrix)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis, *flat: Tensor) -> tuple[Tensor, ...]:
        layers = [ParameterTokens(*flat[i : i + 3]) for i in range(0, len(flat), 3)]
        scores = [x @ layer.key.T for layer in layers]
        scales = _row_scales(scores, [layer.tau_tokens for layer in layers], axis)
        ctx.axis = axis
        ctx.save_for_backward(x, *flat, *scores, *scales)
        return tuple(
            F.gelu(score * scale).to(x.dtype) @ layer.value
            for score, scale, layer in zip(scores, scales, layers, strict=True)
        )

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, *saved = ctx.saved_tensors
        count = len(grads)
        layers = [ParameterTokens(*saved[i : i + 3]) for i in range(0, 3 * count, 3)]
        scores, scales = saved[3 * count : 4 * count], saved[4 * count :]
        z = [score * scale for score, scale in zip(scores, scales, strict=True)]
        grad_z = [
            torch.ops.aten.gelu_backward((grad @ layer.value.T).to(zi.dtype), zi)
            for grad, layer, zi in zip(grads, layers, z, strict=True)
        ]
        row_dots = torch.stack([(dz * zi).sum(-1, keepdim=True) for dz, zi in zip(grad_z, z, strict=True)])
        pending = PendingSum(row_dots, ctx.axis)
        # The sum over the ranks is on its way while the values' gradients are computed.
        grad_values = [
            F.gelu(zi).to(x.dtype).flatten(0, -2).T @ grad.flatten(0, -2) for zi, grad in zip(z, grads, strict=True)
        ]
        row_dots = pending.wait()
        grad_x, flat_grads = None, list[Tensor | None]()
        for i, layer in enumerate(layers):
            # A -> Z = tau A/||A|| projects: dA = r (dZ - Z (dZ.Z) / tau^2).
            row_dot = row_dots[i] / layer.tau_tokens.to(row_dots.dtype)
            grad_scores = ((grad_z[i] - z[i] * row_dot) * scales[i]).to(x.dtype)
            grad_x = grad_scores @ layer.key if grad_x is None else grad_x + grad_scores @ layer.key
            flat_grads += [grad_scores.flatten(0, -2).T @ x.flatten(0, -2), grad_values[i], None]
        return grad_x, None, *flat_grads


def joint_fused(x: Tensor, layers: Sequence[ParameterTokens], activation: str, axis: Axis = ALONE) -> list[Tensor]:
    """`joint_reference` with a hand-written backward for l2_norm_gelu; the other two activations use autograd."""
    if activation != "l2_norm_gelu":
        return joint_reference(x, layers, activation, axis)
    flat = [tensor for layer in layers for tensor in layer]
    return list(_FusedL2NormGelu.apply(x, axis, *flat))


def pattention_reference(x: Tensor, key: Tensor, value: Tensor, tau_tokens: Tensor, activation: str) -> Tensor:
    """`joint_reference` of one layer in one process; [.., d_in] -> [.., d_out]."""
    return joint_reference(x, [ParameterTokens(key, value, tau_tokens)], activation)[0]


def pattention_fused(x: Tensor, key: Tensor, value: Tensor, tau_tokens: Tensor, activation: str) -> Tensor:
    """`joint_fused` of one layer in one process; [.., d_in] -> [.., d_out]."""
    return joint_fused(x, [ParameterTokens(key, value, tau_tokens)], activation)[0]


_BACKENDS: dict[str, PattentionFunction] = {"reference": joint_reference, "fused": joint_fused}


def select_backend(name: str, device_type: str) -> tuple[str, PattentionFunction]:
    """The implementation called `name` and its resolved name.

    `auto` takes the memory-saving one on accelerators. On CPUs memory traffic is not the limit and autograd, which
    recomputes nothing, is faster.
    """
    resolved = name if name != "auto" else ("reference" if device_type in ("cpu", "meta") else "fused")
    if resolved not in _BACKENDS:
        raise ValueError(f"pattention_backend: unknown '{name}'; choose auto, {', '.join(_BACKENDS)}")
    return resolved, _BACKENDS[resolved]
