"""The image classifier, written once as a list of layers.

    images [b, c, H, W] -> patches and class token -> L blocks -> pool -> final norm -> logits [b, classes]

The blocks are those of the language model with attention that is not causal. Of `Transformer` blocks the model is the
Vision Transformer (Dosovitskiy et al., 2021), tensor by tensor. What makes one vector of an image, `image_tower_specs`,
also serves models that have no classes.

Legend: b batch, c channels, p patch size, T tokens (patches, and the class token), d hidden size.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from megatron.config.sections.vision import ImageConfig, ImageTowerSection
from megatron.model.blocks import Block, BuildOptions
from megatron.model.flops import matmul_parameters
from megatron.model.layered import LayeredModel, LayerLists, LayerSpec
from megatron.model.linear import ColumnParallelLinear, RowParallelLinear
from megatron.model.norms import build_norm
from megatron.mpu.collectives import copy_to_ranks, gather_shares, sum_over_ranks
from megatron.mpu.random import dropout
from megatron.mpu.roles import Role, mark_role


def patches(images: Tensor, size: int) -> Tensor:
    """[b, c, H, W] -> [b, patches, c p p], row by row of the image; a patch is in the order of a convolution's weight.

    `size` is p, the patches' height and width.
    """
    tiles = images.unflatten(2, (-1, size)).unflatten(4, (-1, size))  # [b, c, rows, p, columns, p]
    return tiles.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


class PatchEmbedding(nn.Module):
    """Images to tokens: a linear map of each patch, before them the class token, and positions added to all."""

    def __init__(self, config: ImageTowerSection, options: BuildOptions) -> None:
        super().__init__()
        width, values, device = config.hidden_size, config.patch_values, options.device
        self.size, self.dropout, self.layout = config.patch_size, config.hidden_dropout, options.layout
        self.first, self.stop = self.layout.tensor.share(values)
        bias, axis = config.patch_bias, self.layout.tensor
        self.patches = RowParallelLinear(values, width, bias, axis, options.stream, None, device)
        mark_role(self.patches.weight, Role("input"))
        if config.class_token:
            self.class_token = nn.Parameter(torch.empty(1, width, device=device))
            mark_role(self.class_token, Role("start"))
        else:
            self.register_parameter("class_token", None)
        self.positions = nn.Parameter(torch.empty(config.tokens_per_sample(), width, device=device))
        mark_role(self.positions, Role("position"))

    def forward(self, images: Tensor) -> Tensor:
        """[b, c, H, W] -> [b, T, d]; with sequence parallelism this rank's share of the T tokens."""
        values = patches(images, self.size).to(self.positions.dtype)
        x = self.patches(values[..., self.first : self.stop])
        if self.class_token is not None:
            x = torch.cat([self.class_token.expand(len(x), 1, -1), x], dim=1)
        return dropout(x + self._own_positions(), self.dropout, self.training, self.layout)

    def _own_positions(self) -> Tensor:
        if not self.layout.sequence_parallel:
            return self.positions
        axis = self.layout.tensor  # each rank uses rows of its own, and the gradient is that of all of them
        return copy_to_ranks(self.positions, axis)[slice(*axis.share(len(self.positions)))]


class Pool(nn.Module):
    """The vector that the head reads: the class token, or the mean of the patches."""

    def __init__(self, config: ImageTowerSection, options: BuildOptions) -> None:
        super().__init__()
        self.layout, self.is_token = options.layout, config.global_pool == "token"
        self.first, self.tokens = int(config.class_token), config.tokens_per_sample()

    def forward(self, x: Tensor) -> Tensor:
        """[b, T, d], with sequence parallelism this rank's share of the tokens -> [b, d], whole."""
        if self.is_token:
            return x[:, 0]
        if not self.layout.sequence_parallel:
            return x[:, self.first :].mean(1)
        return sum_over_ranks(x.sum(1) / self.tokens, self.layout.tensor)


class ClassHead(nn.Module):
    """Logits of the classes, whole on every tensor rank, each of which computes a share of them."""

    def __init__(self, config: ImageConfig, options: BuildOptions) -> None:
        super().__init__()
        self.classes, self.axis = config.num_classes, options.layout.tensor
        device = options.device
        self.linear = ColumnParallelLinear(config.hidden_size, self.classes, True, self.axis, "whole", None, device)
        mark_role(self.linear.weight, Role("head"))

    def forward(self, x: Tensor) -> Tensor:
        """[b, d] -> [b, classes]."""
        return gather_shares(self.linear(x), self.classes, self.axis)


def image_tower_specs(
    config: ImageTowerSection, options: BuildOptions, prefix: str = "", pool: bool = True
) -> list[LayerSpec]:
    """What makes a vector [b, d] of an image: embedding, norm, blocks, pool, final norm.

    Args:
        prefix: what the names of the layers begin with.
        pool: else all its tokens are left, [b, T, d].
    """
    whole = replace(options.layout, sequence_parallel=False)  # of what follows the pool

    def block(index: int) -> Block:
        return Block(config, index, options, causal=False, drop_path=config.drop_path(index))

    norm = partial(build_norm, config.final_norm_kind, config, options.device)
    return [
        LayerSpec(f"{prefix}embedding", partial(PatchEmbedding, config, options)),
        *([LayerSpec(f"{prefix}pre_norm", partial(norm, options.layout))] if config.pre_norm else []),
        *(LayerSpec(f"{prefix}layers.{i}", partial(block, i)) for i in range(config.num_layers)),
        *([LayerSpec(f"{prefix}pool", partial(Pool, config, options))] if pool else []),
        LayerSpec(f"{prefix}final_norm", partial(norm, whole)),
    ]


def vision_layer_specs(config: ImageConfig, options: BuildOptions) -> list[LayerSpec]:
    """The model's layers in order: those of its tower, and the head."""
    return [*image_tower_specs(config, options), LayerSpec("head", partial(ClassHead, config, options))]


def vision_layer_lists(config: ImageConfig, options: BuildOptions) -> LayerLists:
    """One list, of all layers."""
    return {"": vision_layer_specs(config, options)}


class VisionModel(LayeredModel):
    """Images [b, c, H, W], normalised, to logits [b, classes], through TokenFormer or Transformer blocks.

    Arguments are those of LayeredModel; `megatron.model.build.build_model` makes one of an ImageConfig.
    """

    config: ImageConfig

    def flops_per_token(self, tokens: int | None = None) -> float:
        """Training FLOPs of one of an image's tokens: 6 per matmul parameter that it meets, 12 L T d of attention.

        tokens: T, default that of the model. The head, which reads one vector an image, counts for one of its tokens,
            and the patches' matrix for all of them but a class token.
        """
        config, tokens = self.config, tokens or self.config.tokens_per_sample()
        head, patch = config.num_classes * config.hidden_size, config.patch_values * config.hidden_size
        unmet = head * (1 - 1 / tokens) + patch * config.class_token / tokens
        return 6.0 * (matmul_parameters(self) - unmet) + 12 * config.num_layers * tokens * config.hidden_size
