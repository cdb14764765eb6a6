"""A model as lists of layers, whatever it computes.

One process runs the lists as they are; a pipeline takes a list apart, and the proof of a growth runs it layer by layer.
Names of parameters are the layers' names: they belong to the checkpoint and are the same in all three.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megatron.config.sections.model import ModelSection
from megatron.model.fill import fill
from megatron.model.flops import matmul_parameters
from megatron.model.init import InitialTensors
from megatron.model.pattention import named_pattentions
from megatron.mpu.layout import SINGLE, Layout
from megatron.mpu.shard import allocate, whole_shape

_BLOCK = re.compile(r"(?P<list>.*\.)?layers\.(?P<number>\d{1,9})(\..+)?")


def block_of(name: str) -> tuple[str, int] | None:
    """(what its list's names begin with, number) of the block that a layer or tensor of this name is, or is in."""
    match = _BLOCK.fullmatch(name)
    return (match["list"] or "", int(match["number"])) if match else None


@dataclass(frozen=True)
class LayerSpec:
    """A layer that is not built yet."""

    name: str
    """Canonical prefix of its parameters. Blocks, whose activations may be recomputed, are `layers.{i}`."""
    build: Callable[[], nn.Module]
    """Makes the module."""
    tied_weight: str | None = None
    """What it shares with the other layer of the same name, the path of a parameter in the module; the second one
    calls `forward(module, x)` instead of module(x)."""
    forward: Callable[[Any, Tensor], Tensor] | None = None
    reads_input: bool = False
    """It is called `module(x, input)`, the input being that of its list. Not in a model that is cut into stages."""

    joins: str | None = None
    """It is called `module(x, output)` with the output of the list of this name, which comes before its own and gives
    no output of the model then. Not in a model that is cut into stages."""

    def bound(
        self, module: nn.Module, source: Tensor, outputs: Mapping[str, Tensor] = MappingProxyType({})
    ) -> Callable[[Tensor], Tensor]:
        """The layer, built as `module`, as a function of what the one before it gives.

        Args:
            source: the input of its list.
            outputs: of the lists before, by their names.
        """
        if self.joins is not None:
            return lambda x: module(x, outputs[self.joins or ""])
        if self.reads_input:
            return lambda x: module(x, source)
        return module if self.forward is None else partial(self.forward, module)

    @property
    def is_block(self) -> bool:
        """Is it one of the blocks?"""
        return block_of(self.name) is not None


LayerLists = Mapping[str, Sequence[LayerSpec]]
"""The layers of a model in order: one list, under any name, or a list for each of its inputs."""


class LayeredModel(nn.Module):
    """Runs each of its lists on an input of its own.

    Args:
        config: the model section.
        lists: made for the device `meta`.
        beside: further layers, likewise, that belong to no list: `forward` of a subclass calls them.
        seed: seed of the initialisation, or None to leave parameters as they come (they will be loaded).
        device: where parameters live; `meta` allocates nothing.
        dtype: parameter dtype, fp32 by default.
        checkpoint_layers: blocks recomputed together in the backward pass; 0 keeps all activations.
        layout: the grid that the lists are made for.
    """

    def __init__(
        self,
        config: ModelSection,
        lists: LayerLists,
        *,
        beside: Sequence[LayerSpec] = (),
        seed: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        checkpoint_layers: int = 0,
        layout: Layout = SINGLE,
    ) -> None:
        super().__init__()
        self.config, self.layout, self.checkpoint_layers = config, layout, checkpoint_layers
        # Without what they were built with, which may hold process groups.
        self._lists = {name: [replace(spec, build=_is_built) for spec in specs] for name, specs in lists.items()}
        self._joined = {spec.joins for specs in lists.values() for spec in specs}
        self._beside = [spec.name for spec in beside]
        for spec in self._in_file_order([*(spec for specs in lists.values() for spec in specs), *beside]):
            if spec.forward is None:
                self._add(spec.name.split("."), spec.build())
        if dtype is not None:
            self.to(dtype)
        if torch.device(device or "cpu").type != "meta":
            allocate(self, device or "cpu")  # layers come without storage: their own default init would be thrown away
            self.reset_tau()
        if seed is not None:
            tensors = InitialTensors(self, config, seed)
            fill(self, tensors, layout)

    def _in_file_order(self, specs: list[LayerSpec]) -> list[LayerSpec]:
        """The order in which parameters are listed, and written to checkpoints."""
        return specs

    def _add(self, path: list[str], module: nn.Module) -> None:
        parent: nn.Module = self
        for name, inner in zip(path, path[1:], strict=False):
            if not hasattr(parent, name):
                parent.add_module(name, nn.ModuleList() if inner.isdecimal() else nn.Module())
            parent = getattr(parent, name)
        parent.add_module(path[-1], module)

    def forward(self, *inputs: Tensor, reduce: Callable[[Any], Any] | None = None) -> Any:
        """The output of each list for its input, but for those that others join; a single one is no tuple.

        reduce: what is made of the outputs and returned in their place, such as a loss. Where it needs parameters, it
            has to run in here: ZeRO 3 gathers them for calls in the model's forward.
        """
        found = dict[str, Tensor]()
        for (name, specs), x in zip(self._lists.items(), inputs, strict=True):
            found[name] = self._run(specs, x, found)
        outputs = tuple(output for name, output in found.items() if name not in self._joined)
        result = outputs[0] if len(outputs) == 1 else outputs
        return result if reduce is None else reduce(result)

    def _run(
        self, specs: Sequence[LayerSpec], x: Tensor, outputs: Mapping[str, Tensor] = MappingProxyType({})
    ) -> Tensor:
        calls = [(spec.bound(self.get_submodule(spec.name), x, outputs), spec.is_block) for spec in specs]
        return run_layers(calls, x, self.checkpoint_layers if self.training else 0)

    def parts(self) -> Iterator[tuple[str, nn.Module]]:
        """(canonical name, module) of every layer, in order; one that is shared comes once."""
        names = dict.fromkeys([*(spec.name for specs in self._lists.values() for spec in specs), *self._beside])
        yield from ((name, self.get_submodule(name)) for name in names)

    def reset_tau(self) -> None:
        """Write every layer's tau_tokens as given at construction (needed after `to_empty`)."""
        for _, layer in named_pattentions(self):
            layer.reset_tau()

    def num_parameters(self) -> int:
        """Number of parameters, those of all tensor ranks; a tied one counts once."""
        return sum(whole_shape(parameter).numel() for parameter in self.parameters())

    def flops_per_token(self, tokens: int | None = None) -> float:
        """Training FLOPs of one of a sample's tokens: 6 per entry of a matrix that each of them meets.

        tokens: of a sample; default those of the model's section.
        """
        return 6.0 * matmul_parameters(self)


def _is_built() -> nn.Module:
    raise RuntimeError("a layer is built once")


def run_layers(layers: Sequence[tuple[Callable[[Tensor], Tensor], bool]], x: Tensor, recomputed: int) -> Tensor:
    """x through the layers, each with whether it is a block; `recomputed` blocks at a time keep no activations.

    0 keeps all of them.
    """
    position = 0
    while position < len(layers):
        stop = position + 1
        if recomputed and layers[position][1]:
            while stop < min(len(layers), position + recomputed) and layers[stop][1]:
                stop += 1
            x = checkpoint(_chain([layer for layer, _ in layers[position:stop]]), x, use_reentrant=False)
        else:
            x = layers[position][0](x)
        position = stop
    return x


def _chain(layers: Sequence[Callable[[Tensor], Tensor]]) -> Callable[[Tensor], Tensor]:
    def run(x: Tensor) -> Tensor:
        for layer in layers:
            x = layer(x)
        return x

    return run
