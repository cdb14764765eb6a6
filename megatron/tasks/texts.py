"""Texts as models read them that make one vector of each."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron.model.clip_model import NO_TOKEN
from megatron.tokenizer import Tokenizer

START_OF_TEXT = "<|startoftext|>"


class Texts:
    """Token ids [b, seq_length]: the tokenizer's start of a text, if it has one, the text, and its end.

    What is too long is cut off before its end; NO_TOKEN stands behind the end.
    """

    def __init__(self, tokenizer: Tokenizer, seq_length: int) -> None:
        self._tokenizer = tokenizer
        self._start = [number for number, text in tokenizer.specials.items() if text == START_OF_TEXT][:1]
        self.eod_id, self.length = tokenizer.eod_id, seq_length - len(self._start)
        """Ids of a text and its end, at most: what is left of seq_length behind the start."""

    def of_texts(self, texts: Sequence[str]) -> Tensor:
        """[number of texts, seq_length]."""
        rows = [[*ids[: self.length - 1], self.eod_id] for ids in self._tokenizer.encode_all(texts)]
        ids = torch.tensor([[*row, *[NO_TOKEN] * (self.length - len(row))] for row in rows])
        return self._started(ids.view(len(texts), self.length))

    def of_ids(self, ids: Tensor, ends: Tensor) -> Tensor:
        """Of ids [b, length] whose last one that counts is at `ends` [b]."""
        places = torch.arange(ids.shape[1], device=ids.device)
        return self._started(torch.where(places > ends[:, None], NO_TOKEN, ids))

    def _started(self, ids: Tensor) -> Tensor:
        start = ids.new_tensor(self._start).expand(len(ids), -1)
        return torch.cat([start, ids], dim=1)
