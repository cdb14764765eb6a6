"""The language model, written once as a list of layers.

    ids [b, s] -> embedding -> L blocks -> final norm -> logits [b, s, V_pad]

`layer_specs` is the list; `LanguageModel` runs it in one process, and a pipeline takes the same list apart. Canonical
parameter names are those of LanguageModel: `embedding.`, `layers.{i}.`, `final_norm.`, `head.`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from megatron.config.sections.model import ModelConfig
from megatron.model.attention import LayerCache
from megatron.model.blocks import Block, BuildOptions
from megatron.model.embedding import Embedding, Head, tied_logits
from megatron.model.flops import flops_per_token
from megatron.model.layered import LayeredModel, LayerSpec, run_layers
from megatron.model.norms import build_norm
from megatron.mpu.layout import SINGLE, Layout
from megatron.mpu.roles import mark_role, role_of


def layer_specs(config: ModelConfig, options: BuildOptions) -> list[LayerSpec]:
    """The model's layers in order: embedding, blocks, final norm, head."""
    embed = partial(Embedding, config, options)
    norm = partial(_final_norm, config, options)
    blocks = [LayerSpec(f"layers.{i}", partial(Block, config, i, options)) for i in range(config.num_layers)]
    if config.no_weight_tying:
        first, last = LayerSpec("embedding", embed), LayerSpec("head", partial(Head, config, options))
    else:
        tied = partial(LayerSpec, "embedding", embed, tied_weight="word_embeddings.weight")
        first, last = tied(), tied(forward=tied_logits)
    return [first, *blocks, LayerSpec("final_norm", norm), last]


def _final_norm(config: ModelConfig, options: BuildOptions) -> nn.Module:
    norm = build_norm(config.final_norm_kind, config, options.device, options.layout)
    for parameter in norm.parameters():
        mark_role(parameter, replace(role_of(parameter), feeds="logits"))
    return norm


class LanguageModel(LayeredModel):
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
        defer_logits: the model gives a `HeadInput` in place of logits, for a loss that computes them in chunks.
    """

    config: ModelConfig
    embedding: Embedding
    layers: nn.ModuleList
    final_norm: nn.Module
    head: Head | None

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
        recompute_scores: bool = False,
        defer_logits: bool = False,
    ) -> None:
        if config.padded_vocab_size is None:
            raise ValueError("padded_vocab_size: unknown; use config.with_vocabulary(size of the tokenizer)")
        options = BuildOptions(
            pattention_backend, attention_backend, "meta", layout, gather_logits, recompute_scores, defer_logits
        )
        specs = layer_specs(config, options)
        super().__init__(
            config, {"": specs}, seed=seed, device=device, dtype=dtype, checkpoint_layers=checkpoint_layers,
            layout=layout,
        )  # fmt: skip
        if not config.no_weight_tying:
            self.head = None

    def _in_file_order(self, specs: list[LayerSpec]) -> list[LayerSpec]:
        embedding, *blocks, final_norm, head = specs
        return [embedding, final_norm, *blocks, head]

    def forward(  # type: ignore[override]
        self,
        input_ids: Tensor,
        cache: Sequence[LayerCache] | None = None,
        reduce: Callable[[Any], Any] | None = None,
    ) -> Any:
        """ids [b, s] -> logits [b, s, V_pad]; with a cache (one entry a block), ids are the new tokens only.

        Without `gather_logits`, each tensor rank gets its share of V_pad; with `defer_logits`, a `HeadInput`.
        """
        logits = self.logits(self.hidden(input_ids, cache))
        return logits if reduce is None else reduce(logits)

    def hidden(self, input_ids: Tensor, cache: Sequence[LayerCache] | None = None) -> Tensor:
        """ids [b, s] -> what the head reads, [b, s, d], so that callers need not take logits at every position."""
        return self.through_blocks(self.embedding(input_ids), cache)

    def through_blocks(self, x: Tensor, cache: Sequence[LayerCache] | None = None) -> Tensor:
        """Embedded tokens [b, s, d], or what stands in their place -> what the head reads, [b, s, d]."""
        if cache is None:
            blocks = [(layer, True) for layer in self.layers]
            x = run_layers(blocks, x, self.checkpoint_layers if self.training else 0)
        else:
            for layer, entry in zip(self.layers, cache, strict=True):
                x = layer(x, entry)
        return self.final_norm(x)

    def logits(self, x: Tensor) -> Any:
        """[.., d] of `hidden` -> logits [.., V_pad]."""
        return self.embedding(x, as_head=True) if self.head is None else self.head(x)

    def flops_per_token(self, tokens: int | None = None) -> float:
        """Training FLOPs of one token of a sequence of `tokens`, default seq_length (see megatron.model.flops)."""
        return flops_per_token(self, self.config, tokens or self.config.seq_length)
