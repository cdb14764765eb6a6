"""Models of equal FLOPs whose training steps are compared: each a module, and its loss for ids [b, s + 1].

Legend: d hidden size, n parameter tokens, i inner width of a feed-forward, L blocks, s sequence.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron.config import load_config
from megatron.config.sections.model import ModelConfig
from megatron.errors import UserError
from megatron.model.blocks import BuildOptions
from megatron.model.build import build_model
from megatron.model.embedding import HeadInput
from megatron.model.pattention import Pattention, named_pattentions
from megatron.mpu.layout import ALONE
from megatron.ops.cross_entropy import cross_entropy
from megatron.ops.linear_cross_entropy import linear_cross_entropy
from megatron.planner.counts import block_matrices
from megatron.planner.networks import flops_per_token


@dataclass(frozen=True)
class Shape:
    """A TokenFormer at the published ratios: d tokens for query, key, value and proj each, 4 d for the feed-forward."""

    layers: int = 12
    width: int = 768
    heads: int = 12
    vocabulary: int = 50304
    length: int = 512

    def tokenformer(self) -> ModelConfig:
        """The model section of a TokenFormer."""
        counts = {"qkv_slot_num": self.width, "proj_slot_num": self.width, "ffn_slot_num": 4 * self.width}
        return self._section({**counts, "output_layer_init_method": "wang_init"})

    def transformer(self) -> ModelConfig:
        """The model section of a Transformer with as many entries in its blocks' matrices: 4 d^2 + 2 d i = 16 d^2."""
        kinds = [[["global"], self.layers]]
        return self._section({"attention_config": kinds, "intermediate_size": self.inner, "norm": "layernorm"})

    @property
    def inner(self) -> int:
        """Inner width of the Transformer's feed-forward."""
        d, entries = self.width, block_matrices(self.tokenformer(), "tokenformer")
        return (entries - 4 * d * d) // (2 * d)

    def _section(self, keys: dict[str, Any]) -> ModelConfig:
        base: dict[str, Any] = {
            "num_layers": self.layers, "hidden_size": self.width, "num_attention_heads": self.heads,
            "seq_length": self.length, "padded_vocab_size": self.vocabulary, "rotary_pct": 0.25,
            "norm": "layernorm_nonparam", "final_norm": "layernorm",
        }  # fmt: skip
        return load_config([], {**base, **keys}).language

    @property
    def flops_per_token(self) -> float:
        """Training FLOPs of a token, equal for all contestants but for biases and norms."""
        return flops_per_token(self.tokenformer())


@dataclass
class Contestant:
    """A model and what is minimised."""

    model: nn.Module
    loss: Callable[[Tensor], Tensor]
    """ids [b, s + 1] -> mean loss."""


class OfficialPattention(nn.Module):
    """GELU(tau A / ||A||) V with A = X K^T (SPEC section 1), one torch operation after the other, as published."""

    def __init__(self, like: Pattention) -> None:
        super().__init__()
        self.key = nn.Parameter(like.key_param_tokens.detach().clone())
        self.value = nn.Parameter(like.value_param_tokens.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        """[.., d_in] -> [.., d_out]."""
        scores = x @ self.key.transpose(0, 1)
        norm = torch.norm(scores, p=2, dim=-1, keepdim=True)
        return F.gelu(scores / norm * self.key.shape[0] ** 0.5) @ self.value


class TwoMatrices(nn.Module):
    """The same without the normalisation of rows: a perceptron of equal FLOPs, without biases."""

    def __init__(self, like: Pattention) -> None:
        super().__init__()
        self.key = nn.Parameter(like.key_param_tokens.detach().clone())
        self.value = nn.Parameter(like.value_param_tokens.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        """[.., d_in] -> [.., d_out]."""
        return F.gelu(F.linear(x, self.key)) @ self.value


def ours(section: ModelConfig, device: torch.device, backend: str = "auto", recompute: bool = False) -> Contestant:
    """A model as a training run has it, with the loss that goes over chunks of the vocabulary's rows."""
    options = BuildOptions(pattention_backend=backend, gather_logits=False, defer_logits=True)
    model = build_model(section, options, seed=0, device=device, checkpoint_layers=int(recompute))
    rows = section.padded_vocab_size or 0

    def loss(ids: Tensor) -> Tensor:
        labels = ids[:, 1:]

        def reduced(outputs: Any) -> Tensor:
            if not isinstance(outputs, HeadInput):
                return cross_entropy(outputs, labels, None, ALONE, rows)
            return outputs.through(partial(_chunked, labels=labels, rows=rows))

        return model(ids[:, :-1], reduce=reduced)

    return Contestant(model, loss)


def _chunked(hidden: Tensor, weight: Tensor, labels: Tensor, rows: int) -> Tensor:
    return linear_cross_entropy(hidden, weight, labels, None, ALONE, rows)


def replaced(section: ModelConfig, device: torch.device, kind: Callable[[Pattention], nn.Module]) -> Contestant:
    """The same model with another module in the place of each Pattention, and torch's own head and loss."""
    model = build_model(section, seed=0, device=device)
    for name, layer in list(named_pattentions(model)):
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, kind(layer))

    def loss(ids: Tensor) -> Tensor:
        logits = model(ids[:, :-1])
        return F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())

    return Contestant(model, loss)


def gpt_neox(shape: Shape, device: torch.device) -> Contestant:
    """transformers' GPTNeoXForCausalLM of equal FLOPs. Raises UserError where transformers is not installed."""
    try:
        from transformers import GPTNeoXConfig, GPTNeoXForCausalLM
    except ImportError as error:
        raise UserError("--contestants: GPTNeoX needs transformers; install it, or name the others") from error
    keys: dict[str, Any] = {
        "vocab_size": shape.vocabulary, "hidden_size": shape.width, "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads, "intermediate_size": shape.inner, "rotary_pct": 0.25, "hidden_act": "gelu",
        "max_position_embeddings": shape.length, "tie_word_embeddings": True, "use_cache": False,
        "attn_implementation": "sdpa",
    }  # fmt: skip
    model: Any = GPTNeoXForCausalLM(GPTNeoXConfig(**keys))
    model.to(device)

    def loss(ids: Tensor) -> Tensor:
        logits = model(ids[:, :-1]).logits
        return F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())

    return Contestant(model, loss)


def contestants(shape: Shape, device: torch.device, backend: str) -> dict[str, Callable[[], Contestant]]:
    """How to make each, by name; the first is ours."""
    section = shape.tokenformer()
    return {
        "TokenFormer": lambda: ours(section, device, backend),
        "official": lambda: replaced(section, device, OfficialPattention),
        "MLPs": lambda: replaced(section, device, TwoMatrices),
        "Transformer": lambda: ours(shape.transformer(), device),
        "GPTNeoX": lambda: gpt_neox(shape, device),
    }
