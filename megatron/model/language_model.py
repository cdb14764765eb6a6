"""The language model, written once as a list of layers.

    ids [b, s] -> embedding -> L blocks -> final norm -> logits [b, s, V_pad]

`layer_specs` is the list; `LanguageModel` runs it in one process, and a pipeline takes the same list apart. Canonical
parameter names are those of LanguageModel: `embedding.`, `layers.{i}.`, `final_norm.`, `head.`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megatron.config.sections.model import ModelConfig
from megatron.model.attention import LayerCache
from megatron.model.blocks import Block, BuildOptions
from megatron.model.embedding import Embedding, Head, tied_logits
from megatron.model.flops import flops_per_token
from megatron.model.init import initialize
from megatron.model.norms import build_norm
from megatron.model.pattention import Pattention
from megatron.mpu.layout import SINGLE, Layout
from megatron.mpu.shard import allocate, whole_shape


@dataclass(frozen=True)
class LayerSpec:
    """A layer that is not built yet.

    Attributes:
        name: canonical prefix of its parameters.
        build: makes the module.
        tie: layers with the same key share one module; the second one calls `forward(module, x)` instead of module(x).
    """

    name: str
    build: Callable[[], nn.Module]
    tie: str | None = None
    forward: Callable[[Any, Tensor], Tensor] | None = None


def layer_specs(config: ModelConfig, options: BuildOptions) -> list[LayerSpec]:
    """The model's layers in order: embedding, blocks, final norm, head."""
    embed = partial(Embedding, config, options)
    norm = partial(build_norm, config.final_norm_kind, config, options.device, options.layout)
    blocks = [LayerSpec(f"layers.{i}", partial(Block, config, i, options)) for i in range(config.num_layers)]
    if config.no_weight_tying:
        first, last = LayerSpec("embedding", embed), LayerSpec("head", partial(Head, config, options))
    else:
        first = LayerSpec("embedding", embed, tie="embedding")
        last = LayerSpec("embedding", embed, tie="embedding", forward=tied_logits)
    return [first, *blocks, LayerSpec("final_norm", norm), last]


class LanguageModel(nn.Module):
    """A decoder-only language model of TokenFormer or Transformer blocks.

    Args:
        config: `RunConfig.model`, with padded_vocab_size known (`config.with_vocabulary`).
        seed: seed of the initialisation, or None to leave parameters as they come (they will be loaded).
        device: where parameters live; `meta` allocates nothing.
        dtype: parameter dtype, fp32 by default.
        pattention_backend, attention_backend: as in the configuration.
        checkpoint_layers: blocks recomputed together in the backward pass; 0 keeps all activations.
        layout: the grid; each tensor rank builds its share. Its pipeline axis is megatron.engine.
        gather_logits: false leaves each tensor rank the logits of its share of the vocabulary, for the loss.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        seed: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        pattention_backend: str = "auto",
        attention_backend: str = "sdpa",
        checkpoint_layers: int = 0,
        layout: Layout = SINGLE,
        gather_logits: bool = True,
    ) -> None:
        super().__init__()
        if config.padded_vocab_size is None:
            raise ValueError("padded_vocab_size: unknown; use config.with_vocabulary(size of the tokenizer)")
        self.config, self.layout, self.checkpoint_layers = config, layout, checkpoint_layers
        # Layers are built without storage first: their own default init would be thrown away.
        specs = layer_specs(config, BuildOptions(pattention_backend, attention_backend, "meta", layout, gather_logits))
        self.embedding, *blocks, self.final_norm = (spec.build() for spec in specs[:-1])
        self.layers = nn.ModuleList(blocks)
        self.head = specs[-1].build() if config.no_weight_tying else None
        if dtype is not None:
            self.to(dtype)
        if torch.device(device or "cpu").type != "meta":
            allocate(self, device or "cpu")
            self.reset_tau()
        if seed is not None:
            initialize(self, config, seed, layout.tensor)

    def forward(self, input_ids: Tensor, cache: Sequence[LayerCache] | None = None) -> Tensor:
        """ids [b, s] -> logits [b, s, V_pad]; with a cache (one entry a block), ids are the new tokens only.

        Without `gather_logits`, each tensor rank gets its share of V_pad.
        """
        return self.logits(self.hidden(input_ids, cache))

    def hidden(self, input_ids: Tensor, cache: Sequence[LayerCache] | None = None) -> Tensor:
        """ids [b, s] -> what the head reads, [b, s, d], so that callers need not take logits at every position."""
        x = self.embedding(input_ids)
        if self.checkpoint_layers and self.training and cache is None:
            x = self._forward_blocks_recomputed(x)
        else:
            for i, layer in enumerate(self.layers):
                x = layer(x, None if cache is None else cache[i])
        return self.final_norm(x)

    def logits(self, x: Tensor) -> Tensor:
        """[.., d] of `hidden` -> logits [.., V_pad]."""
        return self.embedding(x, as_head=True) if self.head is None else self.head(x)

    def _forward_blocks_recomputed(self, x: Tensor) -> Tensor:
        for start in range(0, len(self.layers), self.checkpoint_layers):
            group = nn.Sequential(*self.layers[start : start + self.checkpoint_layers])
            x = checkpoint(group, x, use_reentrant=False)
        return x

    def parts(self) -> Iterator[tuple[str, nn.Module]]:
        """(canonical prefix, module) of embedding, blocks, final norm and head, in order."""
        yield "embedding", self.embedding
        yield from ((f"layers.{i}", layer) for i, layer in enumerate(self.layers))
        yield "final_norm", self.final_norm
        if self.head is not None:
            yield "head", self.head

    def reset_tau(self) -> None:
        """Write every layer's tau_tokens as given at construction (needed after `to_empty`)."""
        for module in self.modules():
            if isinstance(module, Pattention):
                module.reset_tau()

    def num_parameters(self) -> int:
        """Number of parameters, those of all tensor ranks; a tied embedding counts once."""
        return sum(whole_shape(parameter).numel() for parameter in self.parameters())

    def flops_per_token(self, seq_length: int) -> float:
        """Training FLOPs of one token at this sequence length (see megatron.model.flops)."""
        return flops_per_token(self, self.config, seq_length)
