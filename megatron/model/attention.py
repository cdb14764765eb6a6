"""Self-attention, causal or of all tokens to all; its four projections are Pattention or linear layers.

Legend: b batch, s sequence, d hidden size, h heads of this tensor rank (all of them without tensor parallelism).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from megatron.config.sections.model import BlocksSection
from megatron.model.joint import project
from megatron.mpu.layout import ALONE, Axis
from megatron.mpu.random import own_stream
from megatron.ops.attention import select_attention
from megatron.ops.rotary import apply_rotary, rotary_tables


class LayerCache(Protocol):
    """What attention asks of a key-value cache: see megatron.inference.cache."""

    @property
    def positions(self) -> Tensor:
        """Position of each new token in its own text, [b, s]."""

    @property
    def mask(self) -> Tensor:
        """Which cached slot a new token may look at, bool [b, 1, s, s_kv]."""

    def extend(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Append [b, h, s, head_dim] keys and values; all of them back, [b, h, s_kv, head_dim]."""


# So that a nonsense length in a configuration takes no memory.
_LONGEST_AT_FIRST = 2**16


class RotaryEmbedding:
    """Rotary tables, made on first use for `length` positions, and longer on demand.

    Not a module: as buffers the tables would be rounded by model.bfloat16(), and no checkpoint needs them.
    """

    def __init__(self, dim: int, base: float, length: int) -> None:
        self.dim, self.base, self.length = dim, base, min(length, _LONGEST_AT_FIRST)
        self._tables: tuple[Tensor, Tensor] | None = None
        self._last: tuple[Tensor, tuple[Tensor, Tensor]] | None = None

    def __call__(self, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """cos and sin of positions 0..length-1, each [length, dim] in fp32."""
        if self._tables is None or self._tables[0].device != device or length > self.length:
            self.length = max(self.length, length)
            self._tables = rotary_tables(self.length, self.dim, self.base, device)
        return self._tables[0][:length], self._tables[1][:length]

    def at(self, positions: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """cos and sin at positions [b, s] below `length`, each [b, 1, s, dim].

        Layers that share this object look the same positions up once.
        """
        if self._last is None or self._last[0] is not positions:
            cos, sin = self(length, positions.device)
            self._last = positions, (cos[positions][:, None], sin[positions][:, None])
        return self._last[1]


def _rotary_of(config: Any) -> RotaryEmbedding | None:
    """The tables of a model section that has rotary positions."""
    if not getattr(config, "rotary_dim", 0):
        return None
    length = config.max_position_embeddings or config.seq_length
    return RotaryEmbedding(config.rotary_dim, config.rotary_emb_base, length)


class SelfAttention(nn.Module):
    """proj(attention(query(x), key(x), value(x))).

    Args:
        config: the model.
        projection: makes the projection called `query`, `key`, `value` or `proj` (d -> d). The first three give, the
            last takes this tensor rank's share of the channels: its heads.
        attention_backend: sdpa or flash_attn.
        axis: the tensor ranks, each of which computes a share of the heads.
        causal: tokens do not look at those behind them.
    """

    def __init__(
        self,
        config: BlocksSection,
        projection: Callable[[str], Any],
        attention_backend: str = "sdpa",
        axis: Axis = ALONE,
        causal: bool = True,
    ) -> None:
        super().__init__()
        self.axis, self.dropout = axis, config.attention_dropout
        first, last = axis.share(config.num_attention_heads)
        self.num_heads = last - first
        self.query, self.key, self.value, self.proj = (projection(name) for name in ("query", "key", "value", "proj"))
        self.rotary = _rotary_of(config)
        self._attend = select_attention(attention_backend, causal)

    def forward(self, x: Tensor, cache: LayerCache | None = None) -> Tensor:
        """x [b, s, d] -> [b, s, d]; with sequence parallelism both are this rank's share of the s tokens."""
        q, k, v = map(self._split_heads, self.projected(x))
        if self.rotary is not None:
            cos, sin = self._rotation(q, cache)
            q, k = apply_rotary(q, cos, sin), apply_rotary(k, cos, sin)
        context = self._attended(q, k, v, cache)
        return self.proj(context.transpose(1, 2).flatten(2))  # [b, h, s, head_dim] -> [b, s, h head_dim]

    def projected(self, x: Tensor) -> list[Tensor]:
        """Query, key and value of x, each [b, s, h head_dim]."""
        return project([self.query, self.key, self.value], x)

    def _attended(self, q: Tensor, k: Tensor, v: Tensor, cache: LayerCache | None) -> Tensor:
        """What attention gives for new tokens, [b, h, s, head_dim] as q, k and v are."""
        mask = None
        if cache is not None:
            k, v = cache.extend(k, v)
            mask = cache.mask
        if not self.dropout or not self.training:
            return self._attend(q, k, v, mask, 0.0)
        with own_stream(self.axis, q.device):  # the heads of different ranks drop different weights
            return self._attend(q, k, v, mask, self.dropout)

    def _split_heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # [b, s, h head_dim] -> [b, h, s, head_dim]

    def _rotation(self, q: Tensor, cache: LayerCache | None) -> tuple[Tensor, Tensor]:
        assert self.rotary is not None
        if cache is None:
            return self.rotary(q.shape[2], q.device)
        return self.rotary.at(cache.positions, cache.mask.shape[-1])
