"""The three norms of the configuration."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from megatron.config.schema import ModelConfig, Norm


class RMSNorm(nn.Module):
    """scale * x / (rms(x) + eps): the epsilon is outside the root, as in GPT-NeoX (torch's RMSNorm has it inside)."""

    def __init__(self, dim: int, eps: float, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.eps = eps
        self.scale = nn.Parameter(torch.ones(dim, device=device))

    def forward(self, x: Tensor) -> Tensor:
        """x [.., d] -> [.., d]; statistics in fp32 for 16-bit inputs."""
        wide = x if x.dtype == torch.float64 else x.float()
        rms = wide.square().mean(-1, keepdim=True).sqrt()
        return self.scale * (wide / (rms + self.eps)).to(x.dtype)


def build_norm(kind: Norm, config: ModelConfig, device: torch.device | str | None = None) -> nn.Module:
    """The norm called `kind` over hidden_size; layernorm_nonparam has neither weight nor bias."""
    if kind == "rmsnorm":
        return RMSNorm(config.hidden_size, config.rms_norm_epsilon, device)
    affine = kind == "layernorm"
    return nn.LayerNorm(config.hidden_size, config.layernorm_epsilon, elementwise_affine=affine, device=device)
