"""The loss of predicted tokens, as language models and models that speak of images have it."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from megatron.errors import UserError
from megatron.model.embedding import HeadInput
from megatron.mpu.layout import Layout
from megatron.ops.cross_entropy import cross_entropy
from megatron.ops.loss_packages import select_linear_loss


class TokenLoss:
    """Mean cross-entropy in nats a token.

    Args:
        package: value of the key cross_entropy.
        rows: V_pad.

    Raises: UserError, when it is made, for a package that is not installed.
    """

    def __init__(self, package: str, rows: int) -> None:
        self._linear_loss, self._rows = select_linear_loss(package), rows

    def __call__(self, outputs: Any, labels: Tensor, weights: Tensor | None, layout: Layout) -> Tensor:
        """A scalar.

        Args:
            outputs: this tensor rank's share of the logits [b, s, V_pad], or what they are computed from.
            labels: int64 [b, s].
            weights: of the predictions in the mean [b, s]; a mask is weights of 0 and 1. Default: all alike.
        """
        if isinstance(outputs, HeadInput):
            return outputs.through(
                lambda hidden, weight: self._linear_loss(hidden, weight, labels, weights, layout.tensor, self._rows)
            )
        return cross_entropy(outputs, labels, weights, layout.tensor, self._rows)

    def check_ids(self, tokens: Tensor, error: type[UserError]) -> None:
        """Raise an `error` for a token id that the embedding has no row for."""
        lowest, highest = int(tokens.min()), int(tokens.max())
        if highest >= self._rows or lowest < 0:
            raise error(
                f"data_path: the data has token id {lowest if lowest < 0 else highest}, the embedding {self._rows} "
                "rows (padded_vocab_size); was the data prepared with the tokenizer of vocab_file?"
            )
