"""A model whose parameters are the averages of its weights (EMA) that a run has kept."""

from __future__ import annotations

from torch import Tensor

from megatron.checkpoint.state import EMA
from megatron.checkpoint.tensors import Tensors, TensorView


class AveragedTensors(TensorView):
    """The tensors of a model with the average of every parameter in its place; buffers are those of the model.

    Args:
        source: has tensors of kind `ema`.
    """

    def __init__(self, source: Tensors) -> None:
        super().__init__(source)
        self._averages = set(source.names(EMA))

    def names(self, kind: str) -> list[str]:
        """Names of the model's tensors; nothing but a model is there."""
        return self.source.names(kind) if kind == "model" else []

    def tensor(self, kind: str, name: str) -> Tensor:
        """A whole tensor."""
        return self.source.tensor(self._kind(name), name)

    def part(self, kind: str, name: str, *ranges: slice) -> Tensor:
        """A range of the first dimensions of a tensor."""
        return self.source.part(self._kind(name), name, *ranges)

    def verify(self, *kinds: str) -> None:
        """Compare the files of a model and its averages with their checksums."""
        self.source.verify(*kinds, *([EMA] if "model" in kinds else []))

    def _kind(self, name: str) -> str:
        return EMA if name in self._averages else "model"
