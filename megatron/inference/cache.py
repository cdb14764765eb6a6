"""The key-value cache of generation: keys and values of past tokens, so that each token is computed once.

Texts of different length share a batch by padding on the left: slot j of row b holds a token when j >= padding[b], at
position j - padding[b]. Legend: b batch, h heads, s new tokens, s_kv filled slots.
"""

from __future__ import annotations

import torch
from torch import Tensor


class KVCache:
    """Keys and values of all layers, and which slots of them the tokens of the current step may look at.

    Each forward pass is one step, of a whole prompt, a part of it, or one token:

        cache = KVCache(num_layers, padding)
        logits = model(ids, cache=cache.step(ids.shape[1]))

    Args:
        num_layers: blocks of the model.
        padding: slots to the left of each row's first token, int64 [b], on the model's device.
        capacity: slots allocated at first; they double when they are full.
    """

    def __init__(self, num_layers: int, padding: Tensor, capacity: int = 256) -> None:
        self.padding, self.capacity = padding, capacity
        self.length = 0
        self.positions: Tensor = padding.new_empty(0)
        self.mask: Tensor = padding.new_empty(0, dtype=torch.bool)
        self.layers = [CachedLayer(self) for _ in range(num_layers)]

    def step(self, num_tokens: int) -> list[CachedLayer]:
        """Make room for `num_tokens` [s] more in every row; the layers' entries for one forward pass come back."""
        start, self.length = self.length, self.length + num_tokens
        while self.capacity < self.length:
            self.capacity *= 2
        key_slot = torch.arange(self.length, device=self.padding.device)  # [s_kv]
        query_slot = key_slot[start:, None]  # [s, 1]
        padding = self.padding[:, None, None]  # [b, 1, 1]
        self.positions = (query_slot[:, 0] - self.padding[:, None]).clamp(min=0)  # [b, s]
        visible = (key_slot >= padding) & (key_slot <= query_slot)  # [b, s, s_kv]
        # Padding looks at itself: a softmax over nothing would be NaN.
        self.mask = (visible | (key_slot == query_slot))[:, None]
        return self.layers

    def select(self, rows: Tensor) -> None:
        """Keep only these rows of the batch, int64 [b']; the others are finished."""
        self.padding = self.padding[rows]
        for layer in self.layers:
            layer.select(rows)


class CachedLayer:
    """One layer's part of a KVCache (a megatron.model.attention.LayerCache)."""

    def __init__(self, cache: KVCache) -> None:
        self._cache = cache
        self._key: Tensor | None = None
        self._value: Tensor | None = None

    @property
    def positions(self) -> Tensor:
        """Position of each new token in its own text, int64 [b, s]; 0 for padding."""
        return self._cache.positions

    @property
    def mask(self) -> Tensor:
        """Slots a new token may look at, bool [b, 1, s, s_kv]: the tokens of its row up to itself."""
        return self._cache.mask

    def extend(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Append [b, h, s, head_dim] keys and values; all of them back, [b, h, s_kv, head_dim]."""
        self._key, keys = self._append(self._key, key)
        self._value, values = self._append(self._value, value)
        return keys, values

    def _append(self, stored: Tensor | None, new: Tensor) -> tuple[Tensor, Tensor]:
        end = self._cache.length
        start = end - new.shape[2]
        if stored is None or stored.shape[2] < end:
            grown = new.new_empty(*new.shape[:2], self._cache.capacity, new.shape[3])
            if stored is not None:
                grown[:, :, :start] = stored[:, :, :start]
            stored = grown
        stored[:, :, start:end] = new
        return stored, stored[:, :, :end]

    def select(self, rows: Tensor) -> None:
        """Keep only these rows of the batch."""
        if self._key is not None and self._value is not None:
            self._key, self._value = self._key[rows], self._value[rows]

    @property
    def buffers(self) -> tuple[Tensor, Tensor]:
        """All allocated slots of keys and values, each [b, h, capacity, head_dim], filled or not."""
        assert self._key is not None and self._value is not None, "filled by a first step"
        return self._key, self._value


class FixedStep:
    """A step of one token whose sizes and memory do not depend on how many slots are filled.

    Attention looks at the first `span` slots and masks those beyond the new token. What a step needs to know is in
    tensors, so that it can be recorded once and replayed for another slot.

    Args:
        cache: filled by a first step; its length must be kept by the caller.
        span: slots that are looked at, at most the cache's capacity.
    """

    def __init__(self, cache: KVCache, span: int) -> None:
        self._padding = cache.padding
        self.slot = cache.padding.new_zeros(1)
        self._slots = torch.arange(span, device=cache.padding.device)
        self.positions: Tensor = cache.padding
        self.mask: Tensor = cache.padding
        self.layers = [FixedLayer(self, *(buffer[:, :, :span] for buffer in layer.buffers)) for layer in cache.layers]
        for buffer in (buffer for layer in cache.layers for buffer in layer.buffers):
            buffer[:, :, cache.length : span] = 0  # what is masked has weight 0, but 0 times anything may be NaN

    def go_to(self, slot: int) -> None:
        """The next step fills this slot. Its tensor is written, nothing is read."""
        self.slot.fill_(slot)

    def begin(self) -> list[FixedLayer]:
        """The layers' entries for one forward pass of one token a row; part of what is recorded."""
        self.positions = (self.slot - self._padding)[:, None]  # [b, 1]
        visible = (self._slots >= self._padding[:, None]) & (self._slots <= self.slot)
        self.mask = visible[:, None, None]  # [b, 1, 1, span]
        return self.layers


class FixedLayer:
    """One layer's part of a FixedStep (a megatron.model.attention.LayerCache)."""

    def __init__(self, step: FixedStep, key: Tensor, value: Tensor) -> None:
        self._step, self._key, self._value = step, key, value

    @property
    def positions(self) -> Tensor:
        """Position of each new token in its own text, int64 [b, 1]."""
        return self._step.positions

    @property
    def mask(self) -> Tensor:
        """Slots a new token may look at, bool [b, 1, 1, span]."""
        return self._step.mask

    def extend(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Put [b, h, 1, head_dim] keys and values into the slot; those of `span` slots back."""
        self._key.index_copy_(2, self._step.slot, key)
        self._value.index_copy_(2, self._step.slot, value)
        return self._key, self._value
