"""The three norms of the configuration.

With sequence parallelism each tensor rank normalises its share of the tokens: parameters then get partial gradients,
which `_shared` sums.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron.config.sections.model import BlocksSection, Norm
from megatron.mpu.collectives import copy_to_ranks
from megatron.mpu.layout import SINGLE, Layout
from megatron.mpu.roles import Role, mark_role


def _shared(parameter: Tensor, layout: Layout) -> Tensor:
    """A parameter that all tensor ranks apply, each to tokens of its own if they are sharded."""
    return copy_to_ranks(parameter, layout.tensor) if layout.sequence_parallel else parameter


class LayerNorm(nn.LayerNorm):
    """nn.LayerNorm on activations of the residual stream."""

    def __init__(
        self, dim: int, eps: float, affine: bool, device: torch.device | str | None = None, layout: Layout = SINGLE
    ) -> None:
        super().__init__(dim, eps, elementwise_affine=affine, device=device)
        self.layout = layout
        mark_role(self.weight, Role("norm"))
        mark_role(self.bias, Role("bias"))

    def forward(self, input: Tensor) -> Tensor:
        """x [.., d] -> [.., d]."""
        if not self.elementwise_affine:
            return super().forward(input)
        weight, bias = _shared(self.weight, self.layout), _shared(self.bias, self.layout)
        return F.layer_norm(input, self.normalized_shape, weight, bias, self.eps)


class RMSNorm(nn.Module):
    """scale * x / (rms(x) + eps): the epsilon is outside the root, as in GPT-NeoX (torch's RMSNorm has it inside)."""

    def __init__(self, dim: int, eps: float, device: torch.device | str | None = None, layout: Layout = SINGLE) -> None:
        super().__init__()
        self.eps, self.layout = eps, layout
        self.scale = nn.Parameter(torch.ones(dim, device=device))
        mark_role(self.scale, Role("norm"))

    def forward(self, x: Tensor) -> Tensor:
        """x [.., d] -> [.., d]; statistics in fp32 for 16-bit inputs."""
        wide = x if x.dtype == torch.float64 else x.float()
        rms = wide.square().mean(-1, keepdim=True).sqrt()
        return _shared(self.scale, self.layout) * (wide / (rms + self.eps)).to(x.dtype)


def build_norm(
    kind: Norm, config: BlocksSection, device: torch.device | str | None = None, layout: Layout = SINGLE
) -> nn.Module:
    """The norm called `kind` over hidden_size; layernorm_nonparam has neither weight nor bias."""
    if kind == "rmsnorm":
        return RMSNorm(config.hidden_size, config.rms_norm_epsilon, device, layout)
    return LayerNorm(config.hidden_size, config.layernorm_epsilon, kind == "layernorm", device, layout)
