"""The model as transformers wants it: the root of the modeling_tokenformer.py that an export carries.

megatron.inference.huggingface_source inlines everything that this file imports from the package, so the export runs
without it, and puts the export's TokenFormerConfig in the place of ModelConfig. A function defined here replaces the
package's function of the same name: an export has one implementation of Pattention and of attention, free of kernels,
and runs in one process, so that nothing is shared with other ranks.

Legend: b batch, s new tokens, s_kv cached slots, d hidden size, V rows of the embedding.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Cache, DynamicCache, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from megatron.config.schema import ModelConfig
from megatron.model.attention import LayerCache
from megatron.model.blocks import Block, BuildOptions
from megatron.model.embedding import Embedding
from megatron.model.norms import RMSNorm, build_norm
from megatron.model.pattention import Pattention
from megatron.ops.attention import AttentionFunction, sdpa_attention
from megatron.ops.pattention import PattentionFunction, joint_reference


class Layout:
    """One process."""

    tensor_size, tensor_rank, sequence_parallel = 1, 0, False

    def share(self, size: int) -> tuple[int, int]:
        """[start, stop): everything."""
        return 0, size


SINGLE = Layout()


def enter(x: Tensor, form: str, layout: Layout) -> Tensor:
    """Inputs are whole."""
    return x


def leave(x: Tensor, form: str, layout: Layout) -> Tensor:
    """Outputs are whole."""
    return x


def sum_scatter(parts: Sequence[Tensor], dim: int, layout: Layout) -> list[Tensor]:
    """Outputs are whole."""
    return list(parts)


def copy_to_ranks(x: Tensor, layout: Layout) -> Tensor:
    """Nothing is shared."""
    return x


def sum_statistics(x: Tensor, layout: Layout) -> Tensor:
    """Statistics are whole."""
    return x


def norm_over_ranks(norms: Tensor, layout: Layout) -> Tensor:
    """Norms are whole."""
    return norms


def max_over_ranks(x: Tensor, layout: Layout) -> Tensor:
    """Maxima are whole."""
    return x.detach()


def gather_shares(x: Tensor, size: int, layout: Layout) -> Tensor:
    """Logits are whole."""
    return x


def mark_sharded(parameter: nn.Parameter, dim: int, shape: tuple[int, ...], layout: Layout) -> None:
    """Parameters are whole."""


def take_share(whole: Tensor, parameter: Tensor, layout: Layout) -> Tensor:
    """Parameters are whole."""
    return whole


def whole_shape(parameter: Tensor) -> torch.Size:
    """Parameters are whole."""
    return parameter.shape


def dropout(x: Tensor, probability: float, training: bool, layout: Layout) -> Tensor:
    """F.dropout."""
    return F.dropout(x, probability, training) if probability else x


def own_stream(layout: Layout, device: torch.device) -> AbstractContextManager[None]:
    """The default generator."""
    return nullcontext()


def select_backend(name: str, device_type: str) -> tuple[str, PattentionFunction]:
    """Pattention by its formula, on every device."""
    return "reference", joint_reference


def select_attention(name: str) -> AttentionFunction:
    """torch's scaled_dot_product_attention, on every device."""
    return sdpa_attention


class JointLayer(nn.Module):
    """A layer that is computed alone."""

    compute: Any
    read_parameters: Any

    def forward(self, x: Tensor) -> Tensor:
        """x [.., in] -> [.., out]."""
        return self.compute([self], [self.read_parameters()], x)[0]


def project(layers: Sequence[nn.Module], x: Tensor) -> list[Tensor]:
    """Each layer's output."""
    return [layer(x) for layer in layers]


class CacheView:
    """One layer's part of a transformers Cache; without a cache, only positions and mask.

    Args:
        positions: of each new token in its own text, int64 [b or 1, s].
        mask: slots a new token may look at, bool [b or 1, 1, s, s_kv].
        past: the cache, or None.
        layer: index of the layer.
    """

    def __init__(self, positions: Tensor, mask: Tensor, past: Cache | None, layer: int) -> None:
        self.positions, self.mask, self.past, self.layer = positions, mask, past, layer

    def extend(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Append [b, h, s, head_dim] keys and values; all of them back, [b, h, s_kv, head_dim]."""
        return (key, value) if self.past is None else self.past.update(key, value, self.layer)


def visible_slots(attention_mask: Tensor | None, start: Any, num_new: int, num_slots: int, device: Any) -> Tensor:
    """Which slots each new token may look at, bool [b or 1, 1, s, s_kv]; a 4-d mask is taken as it is.

    Args:
        attention_mask: [b, slots], 0 for padding; slots beyond it are closed.
        start: slot of the first new token.
    """
    if attention_mask is not None and attention_mask.dim() == 4:
        return attention_mask[..., :num_slots]
    key_slot = torch.arange(num_slots, device=device)  # [s_kv]
    query_slot = start + torch.arange(num_new, device=device)[:, None]  # [s, 1]
    causal = (key_slot <= query_slot)[None]
    if attention_mask is None:
        return causal[:, None]
    real = F.pad(attention_mask.to(device=device, dtype=torch.bool), (0, num_slots - attention_mask.shape[1]))
    # Padding looks at itself: a softmax over nothing would be NaN.
    return (causal & real[:, None] | (key_slot == query_slot))[:, None]


def token_positions(attention_mask: Tensor | None, start: Any, num_new: int, device: Any) -> Tensor:
    """Position of each new token in its own text, padding not counted, int64 [b or 1, s]."""
    if attention_mask is None or attention_mask.dim() == 4:
        return (start + torch.arange(num_new, device=device))[None]
    counted = attention_mask.to(device=device, dtype=torch.int64).cumsum(-1) - 1
    slots = start + torch.arange(num_new, device=device)
    return counted.clamp(min=0)[:, slots]


class TokenFormerLayer(GradientCheckpointingLayer, Block):
    """A block that transformers can recompute in the backward pass."""

    def forward(self, x: Tensor, cache: LayerCache | None = None) -> Tensor:
        """x [b, s, d] -> [b, s, d]."""
        return Block.forward(self, x, cache)


class TokenFormerPreTrainedModel(PreTrainedModel):
    """What transformers needs to know about the model."""

    config_class: Any = ModelConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["TokenFormerLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, Pattention):
            init.normal_(module.get_parameter("key_tokens_0"), std=self.config.init_method_std)
            value_std = 2 / self.config.num_layers / self.config.hidden_size**0.5
            init.normal_(module.get_parameter("value_tokens_0"), std=value_std)
            init.constant_(module.tau_tokens, module.num_tokens)
        elif isinstance(module, RMSNorm):
            init.ones_(module.scale)
        else:
            super()._init_weights(module)


class TokenFormerModel(TokenFormerPreTrainedModel):
    """Embedding, blocks and final norm."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        options = BuildOptions()
        self.embedding = Embedding(config, options)
        self.layers = nn.ModuleList(TokenFormerLayer(config, i, options) for i in range(config.num_layers))
        self.final_norm = build_norm(config.final_norm_kind, config)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The token embedding."""
        return self.embedding.word_embeddings

    def set_input_embeddings(self, value: Any) -> None:
        """Replace the token embedding."""
        self.embedding.word_embeddings = value

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """ids [b, s] (or inputs_embeds [b, s, d]) -> last_hidden_state [b, s, d], after the final norm."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        x = self.embedding(input_ids) if inputs_embeds is None else inputs_embeds
        past = self._cache(past_key_values, use_cache)
        views = self._views(x, attention_mask, position_ids, past)
        keep = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        states = [x]
        for layer, view in zip(self.layers, views, strict=True):
            x = layer(x, view)
            states = [*states, x] if keep else states
        x = self.final_norm(x)
        hidden_states = (*states[:-1], x) if keep else None
        return BaseModelOutputWithPast(last_hidden_state=x, past_key_values=past, hidden_states=hidden_states)

    def _cache(self, past: Cache | None, use_cache: bool | None) -> Cache | None:
        if self.gradient_checkpointing and self.training:
            return None  # layers are run twice and must not be recorded twice
        wanted = self.config.use_cache if use_cache is None else use_cache
        return DynamicCache(config=self.config) if wanted and past is None else past

    def _views(
        self, x: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None, past: Cache | None
    ) -> list[CacheView] | list[None]:
        """What each layer's attention looks at; None is plain causal attention over x [b, s, d]."""
        num_new, device = x.shape[1], x.device
        start = 0 if past is None else past.get_seq_length()
        num_slots = num_new if past is None else past.get_mask_sizes(num_new, 0)[0]
        if past is None and position_ids is None and self._is_full(attention_mask):
            return [None] * len(self.layers)
        mask = visible_slots(attention_mask, start, num_new, num_slots, device)
        if position_ids is None:
            position_ids = token_positions(attention_mask, start, num_new, device)
        return [CacheView(position_ids, mask, past, i) for i in range(len(self.layers))]

    @staticmethod
    def _is_full(attention_mask: Tensor | None) -> bool:
        if attention_mask is None:
            return True
        return attention_mask.dim() == 2 and not torch.compiler.is_compiling() and bool(attention_mask.all())


class TokenFormerForCausalLM(TokenFormerPreTrainedModel, GenerationMixin):
    """The language model: TokenFormerModel and a head, which is the embedding when tie_word_embeddings is set."""

    _tied_weights_keys: Any = {"lm_head.weight": "model.embedding.word_embeddings.weight"}

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.model = TokenFormerModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.padded_vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The token embedding."""
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: Any) -> None:
        """Replace the token embedding."""
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        """The head."""
        return self.lm_head

    def set_output_embeddings(self, value: Any) -> None:
        """Replace the head."""
        self.lm_head = value

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """ids [b, s] -> logits [b, s, V]; with labels [b, s] (not shifted, -100 = ignore) the loss too."""
        outputs = self.model(
            input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, use_cache, output_hidden_states
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.padded_vocab_size, **kwargs)
        result = CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
        )
        return result if return_dict is None or return_dict else result.to_tuple()
