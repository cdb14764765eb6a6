"""Pattention, token-parameter attention: Pattention(X, K_P, V_P) = Theta(X K_P^T) V_P.

Shapes: x [.., d_in], key [n, d_in], value [n, d_out], scores A and weights [.., n], output [.., d_out].
Source: Wang et al., TokenFormer (ICLR 2025), section 3.2. Departure: a row of scores that is all zero
(the LayerNorm of a constant row) gives zeros and zero gradients where the plain quotient gives NaN.

Two implementations of the same function: `pattention_reference` is the formula in autograd, `pattention_fused`
keeps only the scores and one number a row for the backward pass. `select_backend` picks one by name.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

PattentionFunction = Callable[[Tensor, Tensor, Tensor, Tensor, str], Tensor]


def statistics_dtype(x: Tensor) -> torch.dtype:
    """Row statistics are taken in fp32, or in fp64 for fp64 inputs."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _tau(tau_tokens: Tensor, scores: Tensor) -> Tensor:
    # An int64 count and a root taken here: a floating buffer would lose digits under .to(bfloat16).
    return tau_tokens.to(statistics_dtype(scores)).sqrt()


def _row_scale(rows: Tensor, tau: Tensor) -> Tensor:
    """tau / ||row||_2, and 0 where the row is all zero; [.., 1] in the statistics dtype.

    The inner `where` keeps the quotient finite on the branch that is not taken, so its gradient is 0, not NaN.
    """
    norm = torch.linalg.vector_norm(rows, dim=-1, keepdim=True, dtype=statistics_dtype(rows))
    nonzero = norm > 0
    return torch.where(nonzero, tau / torch.where(nonzero, norm, 1.0), 0.0)


def theta(scores: Tensor, tau_tokens: Tensor, activation: str) -> Tensor:
    """Weights of the parameter tokens from their scores, row by row (the paper's modified softmax).

    Args:
        scores: A = X K_P^T, [.., n].
        tau_tokens: int64 scalar, tau^2; the number of tokens the layer was created with.
        activation: `l2_norm_gelu` GELU(tau A / ||A||), `gelu_l2_norm` tau GELU(A) / ||GELU(A)||, or
            `softmax` tau^2 softmax(A).

    Returns: [.., n] in the dtype of `scores`; computed in fp32 for 16-bit scores.
    """
    wide = scores.to(statistics_dtype(scores))
    if activation == "l2_norm_gelu":
        weights = F.gelu(wide * _row_scale(wide, _tau(tau_tokens, wide)))
    elif activation == "gelu_l2_norm":
        gelu = F.gelu(wide)
        weights = gelu * _row_scale(gelu, _tau(tau_tokens, wide))
    elif activation == "softmax":
        weights = torch.softmax(wide, dim=-1) * tau_tokens.to(wide.dtype)
    else:
        raise ValueError(f"activation: unknown '{activation}'; choose l2_norm_gelu, gelu_l2_norm or softmax")
    return weights.to(scores.dtype)


def pattention_reference(x: Tensor, key: Tensor, value: Tensor, tau_tokens: Tensor, activation: str) -> Tensor:
    """Theta(X K_P^T) V_P as written in the paper (section 3.2); [.., d_in] -> [.., d_out]."""
    return theta(x @ key.T, tau_tokens, activation) @ value


class _FusedL2NormGelu(torch.autograd.Function):
    """l2_norm_gelu that keeps A and r = tau / ||A|| only (1 u instead of the 3 u of autograd; u = one score matrix)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, key: Tensor, value: Tensor, tau_tokens: Tensor) -> Tensor:
        scores = x @ key.T
        scale = _row_scale(scores, _tau(tau_tokens, scores))
        ctx.save_for_backward(x, key, value, scores, scale, tau_tokens)
        return F.gelu(scores * scale).to(x.dtype) @ value

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, key, value, scores, scale, tau_tokens = ctx.saved_tensors
        grad_out = grads[0]
        z = scores * scale
        weights = F.gelu(z).to(x.dtype)
        grad_z = torch.ops.aten.gelu_backward((grad_out @ value.T).to(z.dtype), z)
        # A -> Z = tau A/||A|| projects: dA = r (dZ - Z (dZ.Z) / tau^2).
        row_dot = (grad_z * z).sum(-1, keepdim=True) / tau_tokens.to(z.dtype)
        grad_scores = ((grad_z - z * row_dot) * scale).to(x.dtype)
        grad_x = grad_scores @ key
        grad_key = grad_scores.flatten(0, -2).T @ x.flatten(0, -2)
        grad_value = weights.flatten(0, -2).T @ grad_out.flatten(0, -2)
        return grad_x, grad_key, grad_value, None


def pattention_fused(x: Tensor, key: Tensor, value: Tensor, tau_tokens: Tensor, activation: str) -> Tensor:
    """`pattention_reference` with a hand-written backward for l2_norm_gelu; the other two activations use autograd."""
    if activation == "l2_norm_gelu":
        return _FusedL2NormGelu.apply(x, key, value, tau_tokens)
    return pattention_reference(x, key, value, tau_tokens, activation)


_BACKENDS: dict[str, PattentionFunction] = {"reference": pattention_reference, "fused": pattention_fused}


def select_backend(name: str, device_type: str) -> tuple[str, PattentionFunction]:
    """The implementation called `name` and its resolved name.

    `auto` takes the memory-saving one on accelerators. On CPUs memory traffic is not the limit and autograd, which
    recomputes nothing, is faster.
    """
    resolved = name if name != "auto" else ("reference" if device_type in ("cpu", "meta") else "fused")
    if resolved not in _BACKENDS:
        raise ValueError(f"pattention_backend: unknown '{name}'; choose auto, {', '.join(_BACKENDS)}")
    return resolved, _BACKENDS[resolved]
