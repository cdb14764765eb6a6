"""The language model as a DeepSpeed pipeline: the same list of layers, cut into stages.

Stage boundaries carry one tensor, the hidden state [b, s, d] (with sequence parallelism this rank's tokens of it).
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from deepspeed.pipe import LayerSpec as DeepSpeedLayerSpec
from deepspeed.pipe import PipelineModule as DeepSpeedPipelineModule
from deepspeed.pipe import TiedLayerSpec as DeepSpeedTiedLayerSpec
from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megatron.config.sections.model import ModelConfig
from megatron.model.blocks import BuildOptions
from megatron.model.language_model import LayerSpec, layer_specs
from megatron.model.pattention import Pattention
from megatron.model.stages import partition
from megatron.mpu import Layout
from megatron.mpu.roles import role_of
from megatron.mpu.shard import allocate

_BLOCK_PREFIX = "layers."
_TIED_WEIGHT = "word_embeddings.weight"


def layer_weights(config: ModelConfig) -> list[int]:
    """Matmul parameters of each layer of `layer_specs`; the embedding, the final norm and the head weigh nothing."""
    specs = layer_specs(config, BuildOptions(device="meta"))
    return [_matrix_entries(spec.build()) for spec in specs]


def _matrix_entries(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters() if role_of(parameter).is_block_matrix)


def _build(spec: LayerSpec, device: torch.device) -> nn.Module:
    """The layer with storage on `device`; its parameters hold nothing yet."""
    module = spec.build()
    allocate(module, device)
    for part in module.modules():
        if isinstance(part, Pattention):
            part.reset_tau()
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
    """A layer that shares its weight with the other layers of the same tie."""

    def __init__(self, spec: LayerSpec, device: torch.device) -> None:
        super().__init__(spec.tie, nn.Module, forward_fn=spec.forward, tied_weight_attr=_TIED_WEIGHT)
        self.spec, self.device = spec, device

    def build(self, log: bool = False) -> nn.Module:
        """The module, on this process's device."""
        return _build(self.spec, self.device)


class PipelineModel(DeepSpeedPipelineModule):
    """This process's stage of the model, with parameters that hold nothing yet. Collective.

    `named_parameters` and `named_buffers` give canonical names, those of LanguageModel; a tied embedding has the same
    name on both of its stages.

    Args:
        config: `RunConfig.model`, with padded_vocab_size known.
        layout: a connected grid with pipeline_size above 1.
        options: backends of the layers; its device and layout are set here.
        device: where parameters live.
        checkpoint_layers: blocks recomputed together in the backward pass; 0 keeps all activations.
    """

    def __init__(
        self,
        config: ModelConfig,
        layout: Layout,
        options: BuildOptions,
        device: torch.device,
        checkpoint_layers: int = 0,
    ) -> None:
        specs = layer_specs(config, replace(options, device="meta", layout=layout))
        self._bounds = partition(layer_weights(config), layout.pipeline.size)
        mine = range(self._bounds[layout.pipeline.rank], self._bounds[layout.pipeline.rank + 1])
        self._is_block = [specs[i].name.startswith(_BLOCK_PREFIX) for i in mine]
        self._prefixes = {str(i): specs[i].name for i in mine}
        topology = PipeModelDataParallelTopology(
            num_pp=layout.pipeline.size, num_mp=layout.tensor.size, num_dp=layout.data.size
        )
        layers = [(_Layer if spec.tie is None else _TiedLayer)(spec, device) for spec in specs]
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
        """Token ids [b, s] (first stage) or hidden state -> hidden state or logits (last stage)."""
        x = forward_input
        for layers, recompute in self._runs():
            x = checkpoint(_chain(layers), x, use_reentrant=False) if recompute else _chain(layers)(x)
        return x

    def _runs(self) -> Iterator[tuple[list[Callable[[Tensor], Tensor]], bool]]:
        """Consecutive layers, and whether their activations are recomputed: blocks by `checkpoint_layers`."""
        size = self.checkpoint_layers if self.training else 0
        first, stop = self._is_block.index(True), len(self._is_block) - self._is_block[::-1].index(True)
        if not size:
            yield self.forward_funcs, False
            return
        yield self.forward_funcs[:first], False
        for start in range(first, stop, size):
            yield self.forward_funcs[start : min(start + size, stop)], True
        yield self.forward_funcs[stop:], False

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        """As nn.Module's, with canonical names."""
        for name, parameter in super().named_parameters(*args, **kwargs):
            yield self._canonical(name), parameter

    def named_buffers(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, Tensor]]:
        """As nn.Module's, with canonical names."""
        for name, buffer in super().named_buffers(*args, **kwargs):
            yield self._canonical(name), buffer

    def _canonical(self, name: str) -> str:
        head, _, rest = name.partition(".")
        # DeepSpeed calls modules by their place in the list and tied ones `tied_modules.{tie}`, the tie being the name.
        return rest if head == "tied_modules" else f"{self._prefixes[head]}.{rest}"


def _chain(layers: Sequence[Callable[[Tensor], Tensor]]) -> Callable[[Tensor], Tensor]:
    def run(x: Tensor) -> Tensor:
        for layer in layers:
            x = layer(x)
        return x

    return run
