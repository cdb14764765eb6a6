"""The model as transformers wants it: the root of the modeling_tokenformer.py that an export carries.

megatron.exchange.huggingface_source inlines everything that this file imports from the package, so the export runs
without it, and puts the export's TokenFormerConfig in the place of ModelConfig.

Legend: b batch, s new tokens, s_kv cached slots, d hidden size, V rows of the embedding.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, GenerationMixin, PreTrainedModel
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from megatron.config.sections.model import ModelConfig
from megatron.exchange.huggingface_attention import AttentionCall, TokenFormerAttention, token_positions
from megatron.exchange.huggingface_one_process import SINGLE, dropout, initialise
from megatron.model.blocks import Block, BuildOptions
from megatron.model.embedding import Embedding
from megatron.model.norms import build_norm
from megatron.ops.rotary import rotary_at


class TokenFormerLayer(GradientCheckpointingLayer, Block):
    """A block that transformers can recompute in the backward pass."""

    attention_class = TokenFormerAttention

    def __init__(self, config: Any, index: int, options: BuildOptions) -> None:
        super().__init__(config, index, options)
        attention: Any = self.attention
        attention.config, attention.layer_idx = config, index

    def forward(  # type: ignore[override]
        self,
        x: Tensor,
        attention_mask: Any = None,
        position_embeddings: Any = None,
        past_key_values: Cache | None = None,
        output_attentions: bool = False,
        **kwargs: Any,
    ) -> Any:
        """x [b, s, d] -> [b, s, d]; with output_attentions also the attention weights, or None."""
        options = {**kwargs, "output_attentions": output_attentions}
        call = AttentionCall(position_embeddings, attention_mask, past_key_values, options)
        x = Block.forward(self, x, call)  # type: ignore[arg-type]
        return (x, call.weights) if output_attentions else x


class TokenFormerPreTrainedModel(PreTrainedModel):
    """What transformers needs to know about the model."""

    config_class: Any = ModelConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["TokenFormerLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True
    _supports_attention_backend = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if not initialise(module, self.config):
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

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """ids [b, s] (or inputs_embeds [b, s, d]) -> last_hidden_state [b, s, d], after the final norm."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        if inputs_embeds is None:
            x = self.embedding(input_ids)
        else:
            x = dropout(inputs_embeds, self.config.hidden_dropout, self.training, SINGLE)
        past = self._cache(past_key_values, use_cache)
        keep_states = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        keep_weights = self.config.output_attentions if output_attentions is None else output_attentions
        mask, rotation = self._mask_and_rotation(x, attention_mask, position_ids, past)
        options = {"attention_mask": mask, "position_embeddings": rotation, "past_key_values": past, **kwargs}
        states, weights = [x], list[Any]()
        for layer in self.layers:
            given = layer(x, output_attentions=bool(keep_weights), **options)
            x, weight = given if keep_weights else (given, None)
            states = [*states, x] if keep_states else states
            weights.append(weight)
        x = self.final_norm(x)
        return BaseModelOutputWithPast(
            last_hidden_state=x,
            past_key_values=past,
            hidden_states=(*states[:-1], x) if keep_states else None,
            attentions=tuple(weights) if keep_weights and weights[0] is not None else None,
        )

    def _cache(self, past: Cache | None, use_cache: bool | None) -> Cache | None:
        if self.gradient_checkpointing and self.training:
            return None  # layers are run twice and must not be recorded twice
        wanted = self.config.use_cache if use_cache is None else use_cache
        return DynamicCache(config=self.config) if wanted and past is None else past

    def _mask_and_rotation(
        self, x: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None, past: Cache | None
    ) -> tuple[Any, tuple[Tensor, Tensor] | None]:
        """What every layer's attention to the tokens x [b, s, d] is given: see AttentionCall."""
        mask = create_causal_mask(self.config, x, attention_mask, past, position_ids)
        if not self.config.rotary_dim:
            return mask, None
        if position_ids is None:
            start = 0 if past is None else past.get_seq_length()
            position_ids = token_positions(attention_mask, start, x.shape[1], x.device)
        cos, sin = rotary_at(position_ids, self.config.rotary_dim, self.config.rotary_emb_base)
        return mask, (cos[:, None], sin[:, None])


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

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """ids [b, s] -> logits [b, s, V]; with labels [b, s] (not shifted, -100 = ignore) the loss too."""
        outputs = self.model(
            input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, return_dict=True, **kwargs
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.padded_vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )
