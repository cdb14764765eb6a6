"""Whole tensors by kind and canonical name, wherever they come from: what all that reads a checkpoint reads."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class Tensors(Protocol):
    """Tensors of a checkpoint, of a model in memory, or yet to be made.

    Kinds are `model` (parameters and buffers under the names they have in the model), `optimizer`
    (`{moment}/{parameter}`), `ema` (parameters), `rng`, and any further ones; there are no names of a kind that is not
    there.
    """

    def names(self, kind: str) -> list[str]:
        """Names of the tensors of a kind."""

    def shape(self, kind: str, name: str) -> tuple[int, ...]:
        """Full shape of a tensor, without reading it."""

    def tensor(self, kind: str, name: str) -> Tensor:
        """A whole tensor, on the CPU."""

    def part(self, kind: str, name: str, *ranges: slice) -> Tensor:
        """A range of the first dimensions of a tensor; no more than that is read where the file allows it."""
        return self.tensor(kind, name)[ranges]

    def verify(self, *kinds: str) -> None:
        """Compare files with their checksums, and look at all values, of these kinds or all, where there are any."""
        return  # what is not said to be in files has none


class TensorView(Tensors):
    """Tensors as another source has them; a subclass changes `tensor`, or all of it."""

    def __init__(self, source: Tensors) -> None:
        self.source = source

    def names(self, kind: str) -> list[str]:
        """Names of the tensors of a kind."""
        return self.source.names(kind)

    def shape(self, kind: str, name: str) -> tuple[int, ...]:
        """Full shape of a tensor."""
        return self.source.shape(kind, name)

    def tensor(self, kind: str, name: str) -> Tensor:
        """A whole tensor."""
        return self.source.tensor(kind, name)

    def verify(self, *kinds: str) -> None:
        """What the source does."""
        self.source.verify(*kinds)
