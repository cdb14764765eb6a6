"""Token embedding and the output head, which is the transposed embedding or a matrix of its own.

Both matrices are shared by the tensor ranks along the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron.config.sections.model import ModelConfig
from megatron.model.blocks import BuildOptions
from megatron.mpu.collectives import enter, gather_shares, leave
from megatron.mpu.random import dropout
from megatron.mpu.roles import Role, mark_role
from megatron.mpu.shard import mark_sharded


class _Vocabulary(nn.Module):
    """What embedding and head have in common: this rank's share of the rows, and logits through them."""

    def __init__(self, config: ModelConfig, options: BuildOptions) -> None:
        super().__init__()
        assert config.padded_vocab_size is not None, "LanguageModel checks the vocabulary"
        self.size, self.options = config.padded_vocab_size, options
        self.start, self.stop = options.layout.tensor.share(self.size)

    def _logits(self, x: Tensor, matrix: Callable[[Tensor], Tensor]) -> Tensor:
        axis = self.options.layout.tensor
        logits = matrix(enter(x, self.options.stream, axis))
        return gather_shares(logits, self.size, axis) if self.options.gather_logits else logits


class TokenTable(nn.Embedding):
    """nn.Embedding that also multiplies by its weight: both uses are calls, around which hooks see to the weight."""

    def reset_parameters(self) -> None:
        """Draw no values where there is no storage for them: torch would import its compiler to do so."""
        if not self.weight.is_meta:
            super().reset_parameters()

    def forward(self, input: Tensor, as_head: bool = False) -> Tensor:
        """ids [..] -> rows [.., d]; as_head: [.., d] -> products with all rows."""
        return F.linear(input, self.weight) if as_head else super().forward(input)


class Embedding(_Vocabulary):
    """Token ids to vectors, and with `as_head` vectors to logits through the same matrix."""

    def __init__(self, config: ModelConfig, options: BuildOptions) -> None:
        super().__init__(config, options)
        self.dropout = config.hidden_dropout
        self.word_embeddings = TokenTable(self.stop - self.start, config.hidden_size, device=options.device)
        mark_sharded(self.word_embeddings.weight, 0, (self.size, config.hidden_size), options.layout.tensor)
        mark_role(self.word_embeddings.weight, Role("embedding"))

    def forward(self, x: Tensor, as_head: bool = False) -> Tensor:
        """ids [b, s] -> [b, s, d]; as_head: [b, s, d] -> logits [b, s, V_pad] (or this rank's share of V_pad)."""
        if as_head:
            return self._logits(x, partial(self.word_embeddings, as_head=True))
        layout = self.options.layout
        embedded = self.word_embeddings(x) if layout.tensor.size == 1 else self._look_up_share(x)
        return dropout(leave(embedded, self.options.stream, layout.tensor), self.dropout, self.training, layout)

    def _look_up_share(self, ids: Tensor) -> Tensor:
        """The rows of this rank's ids, and zeros for those of other ranks."""
        mine = (ids >= self.start) & (ids < self.stop)
        rows = self.word_embeddings(torch.where(mine, ids - self.start, 0))
        return torch.where(mine[..., None], rows, 0.0)


class Head(_Vocabulary):
    """Logits through a matrix of its own (no_weight_tying)."""

    def __init__(self, config: ModelConfig, options: BuildOptions) -> None:
        super().__init__(config, options)
        rows = self.stop - self.start
        self.final_linear = nn.Linear(config.hidden_size, rows, bias=False, device=options.device)
        mark_sharded(self.final_linear.weight, 0, (self.size, config.hidden_size), options.layout.tensor)
        mark_role(self.final_linear.weight, Role("head"))

    def forward(self, x: Tensor) -> Tensor:
        """[b, s, d] -> logits [b, s, V_pad] (or this rank's share of V_pad)."""
        return self._logits(x, self.final_linear)


def tied_logits(embedding: Embedding, x: Tensor) -> Tensor:
    """Logits through the transposed embedding."""
    return embedding(x, as_head=True)
