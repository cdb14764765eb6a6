"""Rotary position embedding on the first dimensions of each head, half-split form (GPT-NeoX, LLaMA)."""

from __future__ import annotations

import torch
from torch import Tensor


def rotary_tables(length: int, dim: int, base: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos and sin for positions 0..length-1, each [length, dim] in fp32."""
    return rotary_at(torch.arange(length, device=device), dim, base)


def rotary_at(positions: Tensor, dim: int, base: float) -> tuple[Tensor, Tensor]:
    """cos and sin for integer positions [..], each [.., dim] in fp32; frequency i is base^(-2i/dim)."""
    inverse = 1.0 / base ** (torch.arange(0, dim, 2, dtype=torch.float32, device=positions.device) / dim)
    angles = positions[..., None].to(torch.float32) * inverse
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the first r dimensions of x and pass the rest.

    Args:
        x: [b, h, s, head_dim].
        cos, sin: [s, r] or [b, 1, s, r], in fp32; the rotation is done in x's dtype.
    """
    rotated_dim = cos.shape[-1]
    turned, passed = x[..., :rotated_dim], x[..., rotated_dim:]
    first, second = turned.chunk(2, dim=-1)
    half_turn = torch.cat((-second, first), dim=-1)
    turned = turned * cos.to(x.dtype) + half_turn * sin.to(x.dtype)
    return torch.cat((turned, passed), dim=-1)
