"""One residual block for both kinds of model: only the projections and the feed-forward differ.

TokenFormer: five Pattentions. Transformer (the baseline): linear layers and the usual two-layer feed-forward.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron.config.sections.model import TOKENFORMER, BlocksSection
from megatron.model.attention import LayerCache, SelfAttention
from megatron.model.linear import ColumnParallelLinear, RowParallelLinear
from megatron.model.norms import build_norm
from megatron.model.pattention import Pattention
from megatron.mpu.collectives import Form
from megatron.mpu.layout import SINGLE, Layout
from megatron.mpu.random import drop_path, dropout
from megatron.mpu.roles import BlockProjection, Feeds

_PROJECTIONS: dict[str, BlockProjection] = {"query": "qkv", "key": "qkv", "value": "qkv", "proj": "proj", "mlp": "ffn"}
_FEEDS: dict[str, Feeds] = {"query": "scores", "proj": "residual", "mlp": "residual"}


@dataclass(frozen=True)
class BuildOptions:
    """How layers are built, as opposed to what they compute."""

    pattention_backend: str = "auto"
    attention_backend: str = "sdpa"
    device: torch.device | str | None = None
    layout: Layout = SINGLE
    gather_logits: bool = True
    """Whole logits on every tensor rank; else each rank has those of its share of the vocabulary (training)."""
    recompute_scores: bool = False
    """Keep a Pattention's input for the backward pass instead of its scores."""
    defer_logits: bool = False
    """The head gives a `HeadInput`, from which the loss computes the rank's share of logits in chunks (training)."""

    @property
    def stream(self) -> Form:
        """Form of the residual stream between tensor ranks."""
        return "tokens" if self.layout.sequence_parallel else "whole"


class MLP(nn.Module):
    """The Transformer's feed-forward: activation(x W_in + b) W_out + b."""

    def __init__(self, config: BlocksSection, options: BuildOptions) -> None:
        super().__init__()
        width, inner = config.hidden_size, config.intermediate_size or 4 * config.hidden_size
        axis, stream, device = options.layout.tensor, options.stream, options.device
        self.fc_in = ColumnParallelLinear(width, inner, True, axis, stream, "ffn", device)
        self.fc_out = RowParallelLinear(inner, width, True, axis, stream, "ffn", device)
        activations: dict[str, Callable[[Tensor], Tensor]] = {"gelu": F.gelu, "relu": F.relu, "silu": F.silu}
        self.activation = activations[config.activation]

    def forward(self, x: Tensor) -> Tensor:
        """x [.., d] -> [.., d]."""
        return self.fc_out(self.activation(self.fc_in(x)))


def token_segments(config: BlocksSection, block: int, name: str) -> list[int]:
    """Tokens of each stage of growth in the Pattention `query`, `key`, `value`, `proj` or `mlp` of a block."""
    if config.token_segments:
        return list(config.token_segments[_PROJECTIONS[name]][block])
    count: int | None = getattr(config, f"{_PROJECTIONS[name]}_slot_num")
    assert count is not None, "ModelConfig checks the token counts"
    return [count]


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); both from the same x with gpt_j_residual.

    Args:
        config: the model.
        index: which block of config.layer_kinds this is.
        options: backends and device.
        causal: attention is.
        drop_path: probability that a sample skips one of the branches in training.
    """

    attention_class: type[SelfAttention] = SelfAttention

    def __init__(
        self,
        config: BlocksSection,
        index: int,
        options: BuildOptions,
        causal: bool = True,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.parallel_residual, self.dropout, self.layout = config.gpt_j_residual, config.hidden_dropout, options.layout
        self.drop_path = drop_path
        width, device, stream = config.hidden_size, options.device, options.stream
        axis = self.layout.tensor

        def pattention(name: str) -> nn.Module:
            return Pattention(
                width,
                width,
                token_segments(config, index, name),
                config.norm_activation_type,
                backend=options.pattention_backend,
                recompute_scores=options.recompute_scores,
                row_norms=config.segment_norms,
                projection=_PROJECTIONS[name],
                feeds=_FEEDS.get(name),
                axis=axis,
                inputs="channels" if name == "proj" else stream,
                outputs=stream if name in ("proj", "mlp") else "channels",
                device=device,
            )

        def linear(name: str) -> nn.Module:
            bias = config.use_bias_in_attn_linear
            if name == "proj":
                return RowParallelLinear(width, width, bias, axis, stream, "proj", device)
            return ColumnParallelLinear(width, width, bias, axis, stream, "qkv", device, _FEEDS.get(name))

        is_tokenformer = config.layer_kinds[index] == TOKENFORMER
        projection = pattention if is_tokenformer else linear
        self.input_layernorm = build_norm(config.norm, config, device, self.layout)
        self.attention = self.attention_class(config, projection, options.attention_backend, axis, causal)
        self.post_attention_layernorm = build_norm(config.norm, config, device, self.layout)
        self.mlp = pattention("mlp") if is_tokenformer else MLP(config, options)

    def forward(self, x: Tensor, cache: LayerCache | None = None) -> Tensor:
        """x [b, s, d] -> [b, s, d]; with sequence parallelism both are this rank's share of the s tokens."""
        attended = self._drop(self.attention(self.input_layernorm(x), cache))
        if self.parallel_residual:
            return x + attended + self._drop(self.mlp(self.post_attention_layernorm(x)))
        x = x + attended
        return x + self._drop(self.mlp(self.post_attention_layernorm(x)))

    def _drop(self, x: Tensor) -> Tensor:
        return drop_path(dropout(x, self.dropout, self.training, self.layout), self.drop_path, self.training)
