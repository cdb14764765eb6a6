"""A language model that reads an image before its text, written once as two lists of layers.

    images [b, c, H, W] -> image tower -> connector -> [b, T, d]
    ids [b, s] -> embedding -> behind [b, T, d] -> L blocks -> its last s vectors -> final norm -> logits [b, s, V_pad]

The connector is a Pattention. The language model's attention is causal throughout, over the image as well, whose
tokens have seen each other in the image tower: so a text is computed by the kernels, and decoded with the cache, that
serve a language model by itself, and without an image it is one.

Legend: b batch, c channels, T tokens of an image, s tokens of a text, d hidden size of the language model.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from megatron.config.sections.clip import IMAGE, TEXT
from megatron.config.sections.image_text import ImageTextConfig
from megatron.model.blocks import BuildOptions
from megatron.model.language_model import LanguageModel, layer_specs
from megatron.model.layered import LayeredModel, LayerLists, LayerSpec
from megatron.model.pattention import Pattention
from megatron.model.vision_model import image_tower_specs
from megatron.mpu.roles import role_of
from megatron.mpu.shard import whole_shape

IMAGES, TEXTS, CONNECTOR = "image", "text", "connector"


class BehindImage(nn.Module):
    """Puts what an image became before a text."""

    def forward(self, x: Tensor, image: Tensor) -> Tensor:
        """x [b, s, d], image [b, T, d] -> [b, T + s, d]."""
        return torch.cat([image.to(x.dtype), x], dim=1)


class WithoutImage(nn.Module):
    """Takes it away again."""

    def __init__(self, tokens: int) -> None:
        super().__init__()
        self.tokens = tokens

    def forward(self, x: Tensor) -> Tensor:
        """[b, T + s, d] -> [b, s, d]."""
        return x[:, self.tokens :]


def _connector(config: ImageTextConfig, options: BuildOptions) -> Pattention:
    return Pattention(
        config.image_tower.hidden_size, config.hidden_size, [config.connector_slot_num, *[0] * config.growths],
        config.norm_activation_type, backend=options.pattention_backend, recompute_scores=options.recompute_scores,
        projection="connector", axis=options.layout.tensor, device=options.device,
    )  # fmt: skip


def image_text_layer_lists(config: ImageTextConfig, options: BuildOptions) -> LayerLists:
    """The image tower with the connector, and the language model."""
    if config.padded_vocab_size is None:
        raise ValueError("padded_vocab_size: unknown; use config.with_vocabulary(size of the tokenizer)")
    embedding, *blocks, norm, head = (
        replace(spec, name=f"{TEXT}{spec.name}") for spec in layer_specs(config.text, options)
    )
    return {
        IMAGES: [
            *image_tower_specs(config.image_tower, options, IMAGE, pool=False),
            LayerSpec(CONNECTOR, partial(_connector, config, options)),
        ],
        TEXTS: [
            embedding,
            LayerSpec("join", BehindImage, joins=IMAGES),
            *blocks,
            LayerSpec("leave", partial(WithoutImage, config.image_tower.tokens_per_sample())),
            norm,
            head,
        ],
    }


class ImageTextModel(LayeredModel):
    """Images [b, c, H, W], normalised, and ids [b, s] to logits [b, s, V_pad] of what follows each id.

    Arguments are those of LayeredModel; `megatron.model.build.build_model` makes one of an ImageTextConfig.
    """

    config: ImageTextConfig

    def image_vectors(self, images: Tensor) -> Tensor:
        """Images [b, c, H, W], normalised -> what stands before a text, [b, T, d]."""
        return self._run(self._lists[IMAGES], images)

    def language_model(self) -> LanguageModel:
        """The language model by itself, of the same modules, in eval mode."""
        language = LanguageModel(self.config.text, device="meta", layout=self.layout)
        for name, module in self.get_submodule(TEXT.rstrip(".")).named_children():
            setattr(language, name, module)
        return language.eval()

    def flops_per_token(self, tokens: int | None = None) -> float:
        """Training FLOPs of an image and its text, divided by their tokens.

        Image tower and connector meet the tokens of the image, the blocks of the language model all, its head those of
        the text; attention takes 12 L T d a token of the image tower, half as much of the language model.
        """
        config, entries = self.config, {prefix: 0 for prefix in (IMAGE, CONNECTOR, TEXT)}
        for name, parameter in self.named_parameters():
            if not role_of(parameter).is_vector and role_of(parameter).what != "embedding":
                entries[next(filter(name.startswith, entries))] += whole_shape(parameter).numel()
        length, whole = config.image_tower.tokens_per_sample(), config.tokens_per_sample()
        assert config.padded_vocab_size is not None
        head = config.padded_vocab_size * config.hidden_size
        blocks = entries[TEXT] - (head if config.no_weight_tying else 0)
        flops = 6.0 * (length * (entries[IMAGE] + entries[CONNECTOR]) + whole * blocks + config.seq_length * head)
        flops += 12 * config.image_tower.num_layers * length**2 * config.image_tower.hidden_size
        flops += 6 * config.num_layers * whole**2 * config.hidden_size
        return flops / whole
