"""Attention of an exported model: by the functions, masks and caches of transformers.

A part of modeling_tokenformer.py, see megatron.exchange.huggingface_model.

Legend: b batch, s new tokens, s_kv cached slots, h heads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from megatron.model.attention import SelfAttention
from megatron.ops.pattention import statistics_dtype


def token_positions(attention_mask: Tensor | None, start: Any, num_new: int, device: Any) -> Tensor:
    """Position of each new token in its own text, padding not counted, int64 [b or 1, s].

    Args:
        attention_mask: [b, slots], 0 for padding; a 4-d one does not tell.
        start: slot of the first new token.
    """
    if attention_mask is None or attention_mask.dim() == 4:
        return (start + torch.arange(num_new, device=device))[None]
    counted = attention_mask.to(device=device, dtype=torch.int64).cumsum(-1) - 1
    slots = start + torch.arange(num_new, device=device)
    return counted.clamp(min=0)[:, slots]


def eager_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """softmax(q k^T scaling) v, [b, s, h, head_dim], and its weights [b, h, s, s_kv], with dropout.

    attention_mask: [b or 1, 1, s, s_kv], added to the scores, or bool; it makes attention causal.
    """
    scores = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
    elif attention_mask is not None:
        scores = scores + attention_mask
    weights = scores.softmax(-1, dtype=statistics_dtype(scores)).to(query.dtype)
    weights = F.dropout(weights, dropout, module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


@dataclass
class AttentionCall:
    """What transformers gives a layer's attention with its input, and the weights that come back.

    Attributes:
        rotation: cos and sin of the new tokens' positions, [b or 1, 1, s, rotary_dim] each; None without rotary ones.
        mask: in the form of the attention implementation.
        past: the cache, or None.
        options: further arguments of the attention function.
        weights: [b, h, s, s_kv] where the attention function gives them.
    """

    rotation: Any
    mask: Any
    past: Cache | None
    options: dict[str, Any]
    weights: Tensor | None = None


class TokenFormerAttention(SelfAttention):
    """Self-attention by the functions that transformers knows: attn_implementation sdpa, eager, or a registered one."""

    is_causal = True
    config: Any
    layer_idx: int

    def _rotation(self, q: Tensor, cache: Any) -> tuple[Tensor, Tensor]:
        return cache.rotation

    def _attended(self, q: Tensor, k: Tensor, v: Tensor, cache: Any) -> Tensor:
        if cache.past is not None:
            k, v = cache.past.update(k, v, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention)
        options = {**cache.options, "scaling": q.shape[-1] ** -0.5, "dropout": self.dropout if self.training else 0.0}
        context, cache.weights = attend(self, q, k, v, cache.mask, **options)
        return context.transpose(1, 2)
