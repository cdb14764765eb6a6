"""Where the logits behind the last token of every text come from: a cache of what was computed, or all anew.

An image may stand before each text, as vectors that take the places of tokens.

Legend: b rows of the batch, V rows of the embedding, T vectors of an image, d hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from megatron.inference.cache import KVCache
from megatron.model import LanguageModel

# Prompt tokens computed at a time: bounds activations at batch x 256 x the largest number of slots.
PREFILL_TOKENS = 256


class NextLogits(Protocol):
    """A batch of texts, and the logits of what may come next."""

    ahead: int
    """How many steps may be on their way before the tokens of the first of them are known to the host."""

    def first(self, sequences: Sequence[list[int]]) -> Tensor:
        """Logits [b, V] behind whole texts."""

    def next(self, tokens: Tensor, sequences: Sequence[list[int]]) -> Tensor:
        """Logits [b, V] behind one more token of each, int64 [b]; `sequences` have it already, but not those ahead."""

    def can_select(self, count: int, total: int) -> bool:
        """Is it worth while to go on with `count` rows of `total`? Else the others are computed on, for nothing."""

    def select(self, rows: list[int]) -> None:
        """Go on with these rows only."""


class Recomputed:
    """Whole texts each time: padding goes to the right, where causal attention never sees it."""

    ahead = 0

    def __init__(self, model: LanguageModel, images: Tensor | None = None) -> None:
        self.model, self.images = model, images  # [b, T, d]

    @torch.no_grad()
    def first(self, sequences: Sequence[list[int]]) -> Tensor:
        """Logits [b, V] behind whole texts."""
        device = next(self.model.parameters()).device
        longest = max(map(len, sequences))
        ids = torch.tensor([row + [0] * (longest - len(row)) for row in sequences], device=device)
        last = torch.tensor([len(row) - 1 for row in sequences], device=device)
        x = self.model.embedding(ids)
        if self.images is not None:
            x, last = torch.cat([self.images, x], dim=1), last + self.images.shape[1]
        hidden = self.model.through_blocks(x)
        return self.model.logits(hidden[torch.arange(len(sequences), device=device), last])

    def next(self, tokens: Tensor, sequences: Sequence[list[int]]) -> Tensor:
        """The same, of texts that have become longer."""
        return self.first(sequences)

    def can_select(self, count: int, total: int) -> bool:
        """A text that has ended leaves at once."""
        return count < total

    def select(self, rows: list[int]) -> None:
        """Go on with these rows only."""
        self.images = None if self.images is None else self.images[rows]


class Cached:
    """One token at a time: past ones come from a key-value cache, whose `slots` are allocated at once."""

    ahead = 0

    def __init__(self, model: LanguageModel, slots: int, images: Tensor | None = None) -> None:
        self.model, self.images = model, images  # [b, T, d]
        self.slots = slots if images is None else slots + images.shape[1]
        self.cache: KVCache | None = None

    @torch.no_grad()
    def first(self, sequences: Sequence[list[int]]) -> Tensor:
        """Logits [b, V] behind whole texts of any length; fills the cache."""
        device = next(self.model.parameters()).device
        longest = max(map(len, sequences))
        padding = [longest - len(row) for row in sequences]
        self.cache = KVCache(len(self.model.layers), torch.tensor(padding, device=device), self.slots)
        for part in self._embedded(sequences, padding, device).split(PREFILL_TOKENS, dim=1):
            hidden = self.model.through_blocks(part, self.cache.step(part.shape[1]))
        return self.model.logits(hidden[:, -1])

    def _embedded(self, sequences: Sequence[list[int]], padding: list[int], device: torch.device) -> Tensor:
        """Padding, image and text of each row, [b, slots, d]."""
        between = 0 if self.images is None else self.images.shape[1]
        rows = [[0] * (count + between) + row for count, row in zip(padding, sequences, strict=True)]
        x = self.model.embedding(torch.tensor(rows, device=device))
        if self.images is not None:
            for row, (first, image) in enumerate(zip(padding, self.images, strict=True)):
                x[row, first : first + between] = image
        return x

    @torch.no_grad()
    def next(self, tokens: Tensor, sequences: Sequence[list[int]]) -> Tensor:
        """Logits [b, V] behind one more token of each, int64 [b]."""
        assert self.cache is not None, "called after the first step"
        return self.model.logits(self.model.hidden(tokens[:, None], self.cache.step(1))[:, -1])

    def can_select(self, count: int, total: int) -> bool:
        """A text that has ended leaves at once."""
        return count < total

    def select(self, rows: list[int]) -> None:
        """Go on with these rows only."""
        assert self.cache is not None, "called after the first step"
        self.cache.select(torch.tensor(rows, device=self.cache.padding.device))
