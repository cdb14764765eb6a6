"""The image classifier as transformers wants it: the root of the modeling_tokenformer_image.py that an export carries.

It becomes a file of its own as megatron.exchange.huggingface_model does.

Legend: b batch, c channels, H height and width, T tokens of an image, d hidden size.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPooling, ImageClassifierOutput
from transformers.utils import can_return_tuple

from megatron.config.sections.vision import ImageConfig
from megatron.exchange.huggingface_attention import AttentionCall, TokenFormerAttention
from megatron.exchange.huggingface_one_process import initialise
from megatron.model.blocks import Block, BuildOptions
from megatron.model.norms import build_norm
from megatron.model.vision_model import PatchEmbedding, Pool


class TokenFormerImageAttention(TokenFormerAttention):
    """Every token looks at all of them."""

    is_causal = False


class TokenFormerImageLayer(GradientCheckpointingLayer, Block):
    """A block that transformers can recompute in the backward pass."""

    attention_class = TokenFormerImageAttention

    def __init__(self, config: Any, index: int, options: BuildOptions) -> None:
        super().__init__(config, index, options, causal=False, drop_path=config.drop_path(index))
        attention: Any = self.attention
        attention.config, attention.layer_idx = config, index

    def forward(self, x: Tensor, output_attentions: bool = False, **kwargs: Any) -> Any:  # type: ignore[override]
        """x [b, T, d] -> [b, T, d]; with output_attentions also the attention weights, or None."""
        call = AttentionCall(None, None, None, {**kwargs, "output_attentions": output_attentions})
        x = Block.forward(self, x, call)  # type: ignore[arg-type]
        return (x, call.weights) if output_attentions else x


class TokenFormerImagePreTrainedModel(PreTrainedModel):
    """What transformers needs to know about the model."""

    config_class: Any = ImageConfig
    base_model_prefix = "model"
    main_input_name = "pixel_values"
    input_modalities = ["image"]
    supports_gradient_checkpointing = True
    _no_split_modules = ["PatchEmbedding", "TokenFormerImageLayer"]
    _supports_sdpa = True
    _supports_attention_backend = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, PatchEmbedding):
            init.normal_(module.positions, std=self.config.init_method_std)
            if module.class_token is not None:
                init.zeros_(module.class_token)
        elif not initialise(module, self.config):
            super()._init_weights(module)


class TokenFormerImageModel(TokenFormerImagePreTrainedModel):
    """Patches, blocks, and the final norm of what the head reads."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        options = BuildOptions()
        self.embedding = PatchEmbedding(config, options)
        self.pre_norm = build_norm(config.final_norm_kind, config) if config.pre_norm else None
        self.layers = nn.ModuleList(TokenFormerImageLayer(config, i, options) for i in range(config.num_layers))
        self.pool = Pool(config, options)
        self.final_norm = build_norm(config.final_norm_kind, config)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The embedding of patches."""
        return self.embedding

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPooling:
        """images [b, c, H, H], normalised -> last_hidden_state [b, T, d] of the last block, which no norm has seen,
        and pooler_output [b, d], what the head reads."""
        size = self.config.image_size
        if pixel_values is None or pixel_values.shape[1:] != (self.config.in_channels, size, size):
            found = "none" if pixel_values is None else list(pixel_values.shape)
            raise ValueError(f"pixel_values: [b, {self.config.in_channels}, {size}, {size}] is expected, found {found}")
        keep_states = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        keep_weights = self.config.output_attentions if output_attentions is None else output_attentions
        x = self.embedding(pixel_values)
        x = x if self.pre_norm is None else self.pre_norm(x)
        states, weights = [x], list[Any]()
        for layer in self.layers:
            given = layer(x, output_attentions=bool(keep_weights), **kwargs)
            x, weight = given if keep_weights else (given, None)
            states = [*states, x] if keep_states else states
            weights.append(weight)
        return BaseModelOutputWithPooling(
            last_hidden_state=x,
            pooler_output=self.final_norm(self.pool(x)),
            hidden_states=tuple(states) if keep_states else None,
            attentions=tuple(weights) if keep_weights and weights[0] is not None else None,
        )


class TokenFormerForImageClassification(TokenFormerImagePreTrainedModel):
    """The classifier: TokenFormerImageModel and a linear head."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.model = TokenFormerImageModel(config)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self, pixel_values: Tensor | None = None, labels: Tensor | None = None, **kwargs: Any
    ) -> ImageClassifierOutput:
        """images [b, c, H, H] -> logits [b, classes]; with labels, classes [b] or shares of them [b, classes], the
        cross-entropy too."""
        outputs = self.model(pixel_values, return_dict=True, **kwargs)
        logits = self.classifier(outputs.pooler_output)
        return ImageClassifierOutput(
            loss=None if labels is None else F.cross_entropy(logits.float(), labels),
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )
