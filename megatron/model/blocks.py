"""One residual block for both kinds of model: only the projections and the feed-forward differ.

TokenFormer: five Pattentions. Transformer (the baseline): linear layers and the usual two-layer feed-forward.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron.config.schema import TOKENFORMER, ModelConfig
from megatron.model.attention import LayerCache, SelfAttention
from megatron.model.norms import build_norm
from megatron.model.pattention import Pattention
from megatron.mpu import SINGLE, Layout


@dataclass(frozen=True)
class BuildOptions:
    """How layers are built, as opposed to what they compute."""

    pattention_backend: str = "auto"
    attention_backend: str = "sdpa"
    device: torch.device | str | None = None
    layout: Layout = SINGLE
    gather_logits: bool = True
    """Whole logits on every tensor rank; else each rank has those of its share of the vocabulary (training)."""


class MLP(nn.Module):
    """The Transformer's feed-forward: activation(x W_in + b) W_out + b."""

    def __init__(self, config: ModelConfig, device: torch.device | str | None = None) -> None:
        super().__init__()
        inner = config.intermediate_size or 4 * config.hidden_size
        self.fc_in = nn.Linear(config.hidden_size, inner, device=device)
        self.fc_out = nn.Linear(inner, config.hidden_size, device=device)
        activations: dict[str, Callable[[Tensor], Tensor]] = {"gelu": F.gelu, "relu": F.relu, "silu": F.silu}
        self.activation = activations[config.activation]

    def forward(self, x: Tensor) -> Tensor:
        """x [.., d] -> [.., d]."""
        return self.fc_out(self.activation(self.fc_in(x)))


def _token_count(config: ModelConfig, name: str) -> int:
    count = {"proj": config.proj_slot_num, "mlp": config.ffn_slot_num}.get(name, config.qkv_slot_num)
    assert count is not None, "ModelConfig checks the token counts"
    return count


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); both from the same x with gpt_j_residual.

    Args:
        config: the model.
        kind: `tokenformer` or `global`, an entry of config.layer_kinds.
        options: backends and device.
    """

    def __init__(self, config: ModelConfig, kind: str, options: BuildOptions) -> None:
        super().__init__()
        self.parallel_residual, self.dropout = config.gpt_j_residual, config.hidden_dropout
        width, device = config.hidden_size, options.device

        def pattention(name: str) -> nn.Module:
            tokens, activation = _token_count(config, name), config.norm_activation_type
            return Pattention(width, width, tokens, activation, backend=options.pattention_backend, device=device)

        def linear(name: str) -> nn.Module:
            return nn.Linear(width, width, bias=config.use_bias_in_attn_linear, device=device)

        is_tokenformer = kind == TOKENFORMER
        self.input_layernorm = build_norm(config.norm, config, device)
        self.attention = SelfAttention(config, pattention if is_tokenformer else linear, options.attention_backend)
        self.post_attention_layernorm = build_norm(config.norm, config, device)
        self.mlp = pattention("mlp") if is_tokenformer else MLP(config, device)

    def forward(self, x: Tensor, cache: LayerCache | None = None) -> Tensor:
        """x [b, s, d] -> [b, s, d]."""
        attended = self._drop(self.attention(self.input_layernorm(x), cache))
        if self.parallel_residual:
            return x + attended + self._drop(self.mlp(self.post_attention_layernorm(x)))
        x = x + attended
        return x + self._drop(self.mlp(self.post_attention_layernorm(x)))

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training) if self.dropout else x
