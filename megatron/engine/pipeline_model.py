"""A model as a DeepSpeed pipeline: the same list of layers, cut into stages.

Stage boundaries carry one tensor, the hidden state [b, s, d] (with sequence parallelism this rank's tokens of it).
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from deepspeed.pipe import LayerSpec as DeepSpeedLayerSpec
from deepspeed.pipe import PipelineModule as DeepSpeedPipelineModule
from deepspeed.pipe import TiedLayerSpec as DeepSpeedTiedLayerSpec
from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology
from torch import Tensor, nn

from megatron.config.sections.model import ModelSection
from megatron.errors import UserError
from megatron.model.blocks import BuildOptions
from megatron.model.build import layer_lists
from megatron.model.layered import LayerSpec, run_layers
from megatron.model.stages import partition
from megatron.mpu import Layout
from megatron.mpu.roles import role_of
from megatron.mpu.shard import allocate

_TIED = "tied_modules"


def layer_weights(config: ModelSection) -> list[int]:
    """Matmul parameters of each layer of the model's list; what comes before and after its blocks weighs nothing."""
    return [_matrix_entries(spec.build()) for spec in _only_list(config, BuildOptions(device="meta"))]


def _only_list(config: ModelSection, options: BuildOptions) -> list[LayerSpec]:
    lists = layer_lists(config, options)
    if len(lists) > 1:
        raise UserError(
            f"pipe_parallel_size: a model of the lists {', '.join(lists)} cannot be cut into stages; set it to 0"
        )
    return list(*lists.values())


def _matrix_entries(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters() if role_of(parameter).is_block_matrix)


def _build(spec: LayerSpec, device: torch.device) -> nn.Module:
    """The layer with storage on `device`; its parameters hold nothing yet."""
    module = spec.build()
    allocate(module, device)
    return module


class _Layer(DeepSpeedLayerSpec):
    """A LayerSpec that DeepSpeed builds on the stage it belongs to."""

    def __init__(self, spec: LayerSpec, device: torch.device) -> None:
        super().__init__(nn.Module)
        self.spec, self.device = spec, device

    def build(self, log: bool = False) -> nn.Module:
        """The module, on this process's device."""
        return _build(self.spec, self.device)


class _TiedLayer(DeepSpeedTiedLayerSpec):
    """A layer that shares its weight with the other one of its name."""

    def __init__(self, spec: LayerSpec, device: torch.device) -> None:
        super().__init__(spec.name, nn.Module, forward_fn=spec.forward, tied_weight_attr=spec.tied_weight)
        self.spec, self.device = spec, device

    def build(self, log: bool = False) -> nn.Module:
        """The module, on this process's device."""
        return _build(self.spec, self.device)


class PipelineModel(DeepSpeedPipelineModule):
    """This process's stage of the model, with parameters that hold nothing yet. Collective.

    `named_parameters` and `named_buffers` give canonical names, those of LayeredModel; a tied layer has the same
    name on both of its stages.

    Args:
        config: the model section.
        layout: a connected grid with pipeline_size above 1.
        options: backends of the layers; its device and layout are set here.
        device: where parameters live.
        checkpoint_layers: blocks recomputed together in the backward pass; 0 keeps all activations.
    """

    def __init__(
        self,
        config: ModelSection,
        layout: Layout,
        options: BuildOptions,
        device: torch.device,
        checkpoint_layers: int = 0,
    ) -> None:
        specs = _only_list(config, replace(options, device="meta", layout=layout))
        self._bounds = partition(layer_weights(config), layout.pipeline.size)
        mine = range(self._bounds[layout.pipeline.rank], self._bounds[layout.pipeline.rank + 1])
        self._is_block = [specs[i].is_block for i in mine]
        self._prefixes = {str(i): specs[i].name for i in mine}
        topology = PipeModelDataParallelTopology(
            num_pp=layout.pipeline.size, num_mp=layout.tensor.size, num_dp=layout.data.size
        )
        layers = [(_Layer if spec.tied_weight is None else _TiedLayer)(spec, device) for spec in specs]
        # DeepSpeed prints its topology and every layer, and broadcasts the tied parameter (not its data).
        with contextlib.redirect_stdout(io.StringIO()), torch.no_grad():
            super().__init__(layers, topology=topology)
        self.config, self.checkpoint_layers = config, checkpoint_layers
        assert (self.stage_id, self._grid.data_parallel_id) == (layout.pipeline.rank, layout.data.rank)

    def _partition_layers(self, method: str = "") -> None:
        """Take the bounds computed here: DeepSpeed balances parameters, in which the look-up table would count."""
        self.parts = self._bounds
        stage = self._topo.get_coord(self.global_rank).pipe
        self._set_bounds(start=self.parts[stage], stop=self.parts[stage + 1])

    def forward(self, forward_input: Tensor) -> Tensor:
        """The model's input (first stage) or hidden state -> hidden state or the model's output (last stage)."""
        layers = list(zip(self.forward_funcs, self._is_block, strict=True))
        return run_layers(layers, forward_input, self.checkpoint_layers if self.training else 0)

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        """As nn.Module's, with canonical names."""
        for name, parameter in super().named_parameters(*args, **kwargs):
            yield self._canonical(name), parameter

    def named_buffers(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, Tensor]]:
        """As nn.Module's, with canonical names."""
        for name, buffer in super().named_buffers(*args, **kwargs):
            yield self._canonical(name), buffer

    def layers(self) -> Iterator[nn.Module]:
        """The layers of this stage; one that is shared comes once."""
        for name, child in self.named_children():
            yield from child.children() if name == _TIED else [child]

    def blocks(self) -> Iterator[nn.Module]:
        """Those of the layers whose activations may be recomputed."""
        yield from (layer for layer, is_block in zip(self.forward_funcs, self._is_block, strict=True) if is_block)

    def _canonical(self, name: str) -> str:
        head, _, rest = name.partition(".")
        # DeepSpeed calls modules by their place in the list and tied ones `tied_modules.{tie}`, by their name.
        return rest if head == _TIED else f"{self._prefixes[head]}.{rest}"
