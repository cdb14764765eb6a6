"""What a parameter is for. It is said where the parameter is made, and every rule about parameters reads it.

Initialisation, weight decay, Muon, FLOPs, freezing and growth go by roles: none looks at a name, or at the number of
dimensions, which ZeRO 3 takes from a parameter between its uses.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

BlockProjection = Literal["qkv", "proj", "ffn"]
"""Which of a block's projections: query, key or value; that of attention's output; the feed-forward."""

Projection = BlockProjection | Literal["connector"]
"""A block's, or what makes vectors for one network of those of another."""

What = Literal[
    "key_tokens", "value_tokens", "matrix", "output_matrix", "embedding", "input", "head", "norm", "bias", "position",
    "start", "logit_scale",
]  # fmt: skip

Feeds = Literal["scores", "residual", "logits"]
"""What a parameter's outputs go into: attention's scores, as queries; the residual stream; the model's logits."""

_VECTORS = ("norm", "bias", "position", "start", "logit_scale")
_OF_BLOCKS = ("key_tokens", "value_tokens", "matrix", "output_matrix")


@dataclass(frozen=True)
class Role:
    """What a parameter is.

    Attributes:
        what: key or value tokens of Pattention; a linear layer's matrix, or that of one whose output joins the residual
            stream; token embedding; head; scale of a norm; bias; matrix that data which are no ids are multiplied with;
            vectors of positions; vectors that stand before those of the data; logarithm of a factor on logits.
        projection: the projection it belongs to, of a block's matrices and tokens.
        segment: the growth it came with; 0 for what a model starts with.
        feeds: where its outputs go, where that matters for its size (megatron.model.mup).
    """

    what: What
    projection: Projection | None = None
    segment: int = 0
    feeds: Feeds | None = None

    @property
    def is_vector(self) -> bool:
        """Is it added or scaled with, row by row? Vectors do not decay, and are no factor of a matrix product."""
        return self.what in _VECTORS

    @property
    def is_block_matrix(self) -> bool:
        """Is it one of the matrices between the embedding and the head, tokens of Pattention included?"""
        return self.what in _OF_BLOCKS


def mark_role(parameter: Tensor | None, role: Role) -> None:
    """Say what a parameter is; nothing for a bias that is not there."""
    if parameter is not None:
        parameter.role = role  # type: ignore[attr-defined]


def role_of(parameter: Tensor) -> Role:
    """What a parameter was marked as; AttributeError for one that was not."""
    role: Role = parameter.role  # type: ignore[attr-defined]
    return role
