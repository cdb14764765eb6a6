"""Attention over heads, causal or not: torch's SDPA, or flash-attn where it is installed and asked for."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron.errors import UserError

AttentionFunction = Callable[[Tensor, Tensor, Tensor, Tensor | None, float], Tensor]


def sdpa_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, dropout: float = 0.0, causal: bool = True
) -> Tensor:
    """softmax(q k^T / sqrt(head_dim)) v.

    Args:
        q, k, v: [b, h, s_q | s_kv | s_kv, head_dim].
        mask: bool [b, 1, s_q, s_kv], true = may look; None means what `causal` says.
        dropout: probability on the attention weights.
        causal: without a mask, a token looks at itself and those before it, s_q == s_kv; else at all of them.

    Returns: [b, h, s_q, head_dim].
    """
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=causal and mask is None)


def _flash_attention(causal: bool) -> AttentionFunction:
    try:
        from flash_attn import flash_attn_func
    except ImportError as error:
        raise UserError(
            "attention_backend: flash_attn is not installed; "
            "pip install -r requirements/requirements-flashattention.txt, or set attention_backend: sdpa"
        ) from error

    def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, dropout: float = 0.0) -> Tensor:
        if mask is not None or not q.is_cuda or q.dtype not in (torch.float16, torch.bfloat16):
            return sdpa_attention(q, k, v, mask, dropout, causal)
        # flash-attn wants [b, s, h, head_dim]
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        # Its default backward adds in the order in which blocks happen to finish.
        exact = torch.are_deterministic_algorithms_enabled()
        return flash_attn_func(q, k, v, dropout_p=dropout, causal=causal, deterministic=exact).transpose(1, 2)

    return attention


def select_attention(name: str, causal: bool = True) -> AttentionFunction:
    """The implementation called `name`, `sdpa` or `flash_attn`; UserError when it is not installed.

    causal: without a mask, tokens do not look at those behind them.
    """
    if name == "sdpa":
        return sdpa_attention if causal else partial(sdpa_attention, causal=False)
    if name == "flash_attn":
        return _flash_attention(causal)
    raise ValueError(f"attention_backend: unknown '{name}'; choose sdpa or flash_attn")
