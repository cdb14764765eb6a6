"""Token embedding and the output head, which is the transposed embedding or a matrix of its own."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron.config.schema import ModelConfig


class Embedding(nn.Module):
    """Token ids to vectors, and with `as_head` vectors to logits through the same matrix.

    Both uses go through forward, so that ZeRO 3 gathers the weight for either.
    """

    def __init__(self, config: ModelConfig, device: torch.device | str | None = None) -> None:
        super().__init__()
        assert config.padded_vocab_size is not None, "LanguageModel checks the vocabulary"
        self.dropout = config.hidden_dropout
        self.word_embeddings = nn.Embedding(config.padded_vocab_size, config.hidden_size, device=device)

    def forward(self, x: Tensor, as_head: bool = False) -> Tensor:
        """ids [b, s] -> [b, s, d]; as_head: [b, s, d] -> logits [b, s, V_pad]."""
        if as_head:
            return F.linear(x, self.word_embeddings.weight)
        embedded = self.word_embeddings(x)
        return F.dropout(embedded, self.dropout, self.training) if self.dropout else embedded


class Head(nn.Module):
    """Logits through a matrix of its own (no_weight_tying)."""

    def __init__(self, config: ModelConfig, device: torch.device | str | None = None) -> None:
        super().__init__()
        assert config.padded_vocab_size is not None, "LanguageModel checks the vocabulary"
        self.final_linear = nn.Linear(config.hidden_size, config.padded_vocab_size, bias=False, device=device)

    def forward(self, x: Tensor) -> Tensor:
        """[b, s, d] -> logits [b, s, V_pad]."""
        return self.final_linear(x)


def tied_logits(embedding: Embedding, x: Tensor) -> Tensor:
    """Logits through the transposed embedding."""
    return embedding(x, as_head=True)
