"""Two towers that make vectors of images and of texts, as two lists of layers (CLIP: Radford et al., 2021).

    images [b, c, H, W] -> patches and class token -> norm -> blocks -> class token -> norm -> projection -> [b, e]
    ids [b, s] -> tokens and positions -> causal blocks -> last token -> norm -> projection -> [b, e]

Both vectors have length 1. Beside the lists is the factor on their products. Shapes are those of open_clip's models.

Legend: b batch, c channels, s tokens of a text, d hidden size of a tower, e embed_dim.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron.config.sections.clip import IMAGE, TEXT, ClipConfig, TextTowerSection
from megatron.model.blocks import Block, BuildOptions
from megatron.model.embedding import Embedding
from megatron.model.layered import LayeredModel, LayerLists, LayerSpec
from megatron.model.linear import ColumnParallelLinear
from megatron.model.norms import build_norm
from megatron.model.vision_model import image_tower_specs
from megatron.mpu.collectives import gather_shares
from megatron.mpu.roles import Role, mark_role, role_of
from megatron.mpu.shard import whole_shape
from megatron.ops.contrastive import capped

NO_TOKEN = -1
"""What stands behind the last token of a text."""

LARGEST_LOGIT_SCALE = math.log(100)


class TextEmbedding(Embedding):
    """Token ids to vectors, with positions added. What NO_TOKEN becomes, no token before it sees."""

    def __init__(self, config: TextTowerSection, options: BuildOptions) -> None:
        super().__init__(config, options)
        self.positions = nn.Parameter(torch.empty(config.seq_length, config.hidden_size, device=options.device))
        mark_role(self.positions, Role("position"))

    def _embedded(self, ids: Tensor) -> Tensor:
        return super()._embedded(ids.clamp(min=0)) + self.positions[: ids.shape[1]]


class LastToken(nn.Module):
    """The vector at the last token of each text, from which attention sees all of it."""

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        """x [b, s, d], ids [b, s] with NO_TOKEN behind the last token -> [b, d]."""
        last = (ids != NO_TOKEN).sum(1) - 1
        return x[torch.arange(len(x), device=x.device), last]


class Projection(nn.Module):
    """A tower's vector to one of length 1 in the space of both, in fp32; whole on every tensor rank."""

    def __init__(self, width: int, embed_dim: int, options: BuildOptions) -> None:
        super().__init__()
        self.embed_dim, self.axis = embed_dim, options.layout.tensor
        self.linear = ColumnParallelLinear(width, embed_dim, False, self.axis, "whole", None, options.device)
        mark_role(self.linear.weight, Role("head"))

    def forward(self, x: Tensor) -> Tensor:
        """[b, d] -> [b, e]."""
        features = gather_shares(self.linear(x), self.embed_dim, self.axis)
        return F.normalize(features if features.dtype == torch.float64 else features.float(), dim=-1)


class LogitScale(nn.Module):
    """The learned factor on cosines, at most 100: its logarithm is the parameter."""

    def __init__(self, options: BuildOptions) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.empty(1, device=options.device))
        mark_role(self.value, Role("logit_scale"))

    def forward(self) -> Tensor:
        """[1]."""
        value = self.value if self.value.dtype == torch.float64 else self.value.float()
        # Not cut off after an update, as in open_clip: the fp32 value that an optimizer keeps would undo it.
        return capped(value, LARGEST_LOGIT_SCALE).exp()


class PairFeatures(NamedTuple):
    """What the model makes of pairs: features of images and of texts, [b, e] each, and the factor on their products."""

    image: Tensor
    text: Tensor
    scale: Tensor


def clip_layer_lists(config: ClipConfig, options: BuildOptions) -> LayerLists:
    """The image tower and the text tower."""
    image, text = config.image, config.text
    if text.padded_vocab_size is None:
        raise ValueError("padded_vocab_size: unknown; use config.with_vocabulary(size of the tokenizer)")

    def projection(width: int) -> Projection:
        return Projection(width, config.embed_dim, options)

    norm = partial(build_norm, text.final_norm_kind, text, options.device, options.layout)
    return {
        "image": [
            *image_tower_specs(image, options, IMAGE),
            LayerSpec(f"{IMAGE}projection", partial(projection, image.hidden_size)),
        ],
        "text": [
            LayerSpec(f"{TEXT}embedding", partial(TextEmbedding, text, options)),
            *(LayerSpec(f"{TEXT}layers.{i}", partial(Block, text, i, options)) for i in range(text.num_layers)),
            LayerSpec(f"{TEXT}pool", LastToken, reads_input=True),
            LayerSpec(f"{TEXT}final_norm", norm),
            LayerSpec(f"{TEXT}projection", partial(projection, text.hidden_size)),
        ],
    }


def logit_scale_spec(options: BuildOptions) -> LayerSpec:
    """The factor on products of features."""
    return LayerSpec("logit_scale", partial(LogitScale, options))


class ClipModel(LayeredModel):
    """Images and texts to features, through TokenFormer or Transformer blocks.

    Arguments are those of LayeredModel; `megatron.model.build.build_model` makes one of a ClipConfig.
    """

    config: ClipConfig

    def forward(  # type: ignore[override]
        self, images: Tensor, ids: Tensor, reduce: Callable[[Any], Any] | None = None
    ) -> Any:
        """Images [b, c, H, W], normalised, and ids [b, s], NO_TOKEN behind the last -> PairFeatures.

        reduce: see LayeredModel.
        """
        image, text = super().forward(images, ids)
        features = PairFeatures(image, text, self.get_submodule("logit_scale")())
        return features if reduce is None else reduce(features)

    def image_features(self, images: Tensor) -> Tensor:
        """Images [b, c, H, W], normalised -> features [b, e]."""
        return self._run(self._lists["image"], images)

    def text_features(self, ids: Tensor) -> Tensor:
        """ids [b, s], NO_TOKEN behind the last -> features [b, e]."""
        return self._run(self._lists["text"], ids)

    def flops_per_token(self, tokens: int | None = None) -> float:
        """Training FLOPs of a pair, divided by its tokens: those of the image and of the whole context of the text.

        Of each tower 6 per matmul parameter and token that meets it, and attention: 12 L T d a token of an image, half
        as much of a text. A projection meets one vector.
        """
        towers = self.config.towers()
        entries = self._matrix_entries()
        flops = 0.0
        for prefix, tower in towers.items():
            length, width, attention = tower.tokens_per_sample(), tower.hidden_size, 6 if prefix == TEXT else 12
            flops += 6.0 * (entries[prefix, False] * length + entries[prefix, True])
            flops += attention * tower.num_layers * length**2 * width
        return flops / self.config.tokens_per_sample()

    def _matrix_entries(self) -> dict[tuple[str, bool], int]:
        """By tower, and whether one vector of a sample meets them or all do: entries of matrices, not of look-ups."""
        entries = {(prefix, is_last): 0 for prefix in self.config.towers() for is_last in (False, True)}
        for name, parameter in self.named_parameters():
            role = role_of(parameter)
            if not role.is_vector and role.what != "embedding":
                entries[self.config.tower_of(name)[0], role.what == "head"] += whole_shape(parameter).numel()
        return entries
