"""Several layers of one input computed together, each through its own forward.

Query, key and value read one input, and what tensor ranks exchange for the three fits one message. Yet a layer's
parameters may be used in its own forward only: hooks around it fetch them (ZeRO 3, offloading), replace them (LoRA,
quantisers), or read and change what goes in and comes out. So the forwards are nested. Each hands in its input and its
parameters and calls the next; the last computes all layers, and on the way back each returns its own output.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn


class JointLayer(nn.Module):
    """A layer that can be computed together with others of its kind."""

    def read_parameters(self) -> Any:
        """What `compute` needs of this layer; called in its forward."""
        raise NotImplementedError

    @staticmethod
    def compute(layers: Sequence[Any], parameters: Sequence[Any], x: Tensor) -> list[Tensor]:
        """Outputs of layers that read the same x, from what their `read_parameters` gave."""
        raise NotImplementedError

    def forward(self, x: Tensor, *, joint: JointCall | None = None) -> Tensor:
        """x [.., in] -> [.., out]; `joint` is the call that this layer is a part of."""
        return (joint or JointCall([self], x)).enter(self, x, self.read_parameters())


class JointCall:
    """One call of several layers with the same input.

    Args:
        layers: in the order in which they are entered; all of one class.
        x: their input.
    """

    def __init__(self, layers: Sequence[nn.Module], x: Tensor) -> None:
        self._layers, self._x = layers, x
        self._entered: list[tuple[JointLayer, Tensor, Any]] = []
        self._computed: list[Tensor] = []
        self._returned: list[Tensor] = []

    def run(self) -> list[Tensor]:
        """The outputs of all layers, as their calls return them."""
        first = self._layers[0](self._x, joint=self)
        return [first, *reversed(self._returned)]

    def enter(self, layer: JointLayer, x: Tensor, parameters: Any) -> Tensor:
        """Called in a layer's forward with its input, which a hook may have replaced; returns the layer's output."""
        self._entered.append((layer, x, parameters))
        place = len(self._entered)
        if place < len(self._layers):
            self._returned.append(self._layers[place](self._x, joint=self))
        else:
            self._computed = self._compute()
        return self._computed[place - 1]

    def _compute(self) -> list[Tensor]:
        layers, inputs, parameters = zip(*self._entered, strict=True)
        if all(x is inputs[0] for x in inputs):
            return layers[0].compute(layers, parameters, inputs[0])
        return [layer.compute([layer], [own], x)[0] for layer, x, own in self._entered]


def project(layers: Sequence[nn.Module], x: Tensor) -> list[Tensor]:
    """[layer(x) for layer in layers], in one message for each thing that tensor ranks exchange.

    Layers that someone has wrapped, or given another forward, are called one by one.
    """
    if all(isinstance(layer, JointLayer) and "forward" not in vars(layer) for layer in layers):
        return JointCall(layers, x).run()
    return [layer(x) for layer in layers]
