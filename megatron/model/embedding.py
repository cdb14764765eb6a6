"""Token embedding and the output head, which is the transposed embedding or a matrix of its own.

Both matrices are shared by the tensor ranks along the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron.config.sections.model import VocabularySection
from megatron.model.blocks import BuildOptions
from megatron.mpu.collectives import enter, gather_shares, leave
from megatron.mpu.random import dropout
from megatron.mpu.roles import Role, mark_role
from megatron.mpu.shard import mark_sharded

Product = Callable[[Tensor, Tensor], Tensor]
"""What is made of a head's input [.., d] and its matrix [rows, d]."""


class HeadInput(NamedTuple):
    """Logits that are left to the loss, which computes them a chunk at a time."""

    hidden: Tensor
    """[b, s, d], the same on every tensor rank; its gradients are partial sums."""
    matrix: nn.Module
    """`matrix(hidden, product=product)` is product(hidden, weight), the weight being this rank's share of the rows."""

    def through(self, product: Product) -> Tensor:
        """product(hidden, weight), in a call of the module that owns the weight: around it, hooks see to the weight."""
        result: Tensor = self.matrix(self.hidden, product=product)
        return result


class _Vocabulary(nn.Module):
    """What embedding and head have in common: this rank's share of the rows, and logits through them."""

    def __init__(self, config: VocabularySection, options: BuildOptions) -> None:
        super().__init__()
        assert config.padded_vocab_size is not None, "LanguageModel checks the vocabulary"
        self.size, self.options = config.padded_vocab_size, options
        self.start, self.stop = options.layout.tensor.share(self.size)

    def _logits(self, x: Tensor, matrix: nn.Module, **how: Product) -> Tensor | HeadInput:
        axis = self.options.layout.tensor
        x = enter(x, self.options.stream, axis)
        if self.options.defer_logits:
            return HeadInput(x, matrix)
        logits: Tensor = matrix(x, **how)
        return gather_shares(logits, self.size, axis) if self.options.gather_logits else logits


class TokenTable(nn.Embedding):
    """nn.Embedding whose weight is a head's as well: both uses are calls, around which hooks see to the weight."""

    def reset_parameters(self) -> None:
        """Draw no values where there is no storage for them: torch would import its compiler to do so."""
        if not self.weight.is_meta:
            super().reset_parameters()

    def forward(self, input: Tensor, product: Product | None = None) -> Tensor:
        """ids [..] -> rows [.., d]; with a product, [.., d] -> what it makes of that and all rows."""
        return super().forward(input) if product is None else product(input, self.weight)


class HeadMatrix(nn.Linear):
    """nn.Linear that can also be used in another product than its own."""

    def forward(self, input: Tensor, product: Product = F.linear) -> Tensor:
        """[.., d] -> what the product makes of that and the weight."""
        return product(input, self.weight)


class Embedding(_Vocabulary):
    """Token ids to vectors, and with `as_head` vectors to logits through the same matrix."""

    def __init__(self, config: VocabularySection, options: BuildOptions) -> None:
        super().__init__(config, options)
        self.dropout = config.hidden_dropout
        self.word_embeddings = TokenTable(self.stop - self.start, config.hidden_size, device=options.device)
        mark_sharded(self.word_embeddings.weight, 0, (self.size, config.hidden_size), options.layout.tensor)
        mark_role(self.word_embeddings.weight, Role("embedding"))

    def forward(self, x: Tensor, as_head: bool = False) -> Tensor | HeadInput:
        """ids [b, s] -> [b, s, d]; as_head: [b, s, d] -> logits, as `Head` gives them."""
        if as_head:
            return self._logits(x, self.word_embeddings, product=F.linear)
        return dropout(self._embedded(x), self.dropout, self.training, self.options.layout)

    def _embedded(self, ids: Tensor) -> Tensor:
        """ids [b, s] -> [b, s, d], in the form of the residual stream."""
        axis = self.options.layout.tensor
        embedded = self.word_embeddings(ids) if axis.size == 1 else self._look_up_share(ids)
        return leave(embedded, self.options.stream, axis)

    def _look_up_share(self, ids: Tensor) -> Tensor:
        """The rows of this rank's ids, and zeros for those of other ranks."""
        mine = (ids >= self.start) & (ids < self.stop)
        rows = self.word_embeddings(torch.where(mine, ids - self.start, 0))
        return torch.where(mine[..., None], rows, 0.0)


class Head(_Vocabulary):
    """Logits through a matrix of its own (no_weight_tying)."""

    def __init__(self, config: VocabularySection, options: BuildOptions) -> None:
        super().__init__(config, options)
        rows = self.stop - self.start
        self.final_linear = HeadMatrix(config.hidden_size, rows, bias=False, device=options.device)
        mark_sharded(self.final_linear.weight, 0, (self.size, config.hidden_size), options.layout.tensor)
        mark_role(self.final_linear.weight, Role("head"))

    def forward(self, x: Tensor) -> Tensor | HeadInput:
        """[b, s, d] -> logits [b, s, V_pad], this rank's share of them, or what they are computed from (training)."""
        return self._logits(x, self.final_linear)


def tied_logits(embedding: Embedding, x: Tensor) -> Any:
    """Logits through the transposed embedding."""
    return embedding(x, as_head=True)
