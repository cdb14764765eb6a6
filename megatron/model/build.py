"""The model that a model section describes: its lists of layers, and what runs them in one process."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from megatron.config.sections.clip import ClipConfig
from megatron.config.sections.image_text import ImageTextConfig
from megatron.config.sections.model import ModelConfig, ModelSection
from megatron.config.sections.vision import ImageConfig
from megatron.model.blocks import BuildOptions
from megatron.model.clip_model import ClipModel, clip_layer_lists, logit_scale_spec
from megatron.model.image_text_model import ImageTextModel, image_text_layer_lists
from megatron.model.language_model import LanguageModel, layer_specs
from megatron.model.layered import LayeredModel, LayerLists
from megatron.model.vision_model import VisionModel, vision_layer_lists


@dataclass(frozen=True)
class Architecture:
    """How the models of one kind of section are made."""

    lists: Callable[[Any, BuildOptions], LayerLists]
    """(section, options) -> the lists of layers."""
    model: Callable[..., LayeredModel] | None = None
    """(section, options, keywords of LayeredModel) -> the model; default LayeredModel of the lists."""


def _language_model(config: ModelConfig, options: BuildOptions, **keywords: Any) -> LanguageModel:
    return LanguageModel(
        config, pattention_backend=options.pattention_backend, attention_backend=options.attention_backend,
        layout=options.layout, gather_logits=options.gather_logits, recompute_scores=options.recompute_scores,
        defer_logits=options.defer_logits, **keywords,
    )  # fmt: skip


def _vision_model(config: ImageConfig, options: BuildOptions, **keywords: Any) -> VisionModel:
    lists = vision_layer_lists(config, replace(options, device="meta"))
    return VisionModel(config, lists, layout=options.layout, **keywords)


def _clip_model(config: ClipConfig, options: BuildOptions, **keywords: Any) -> ClipModel:
    described = replace(options, device="meta")
    lists, beside = clip_layer_lists(config, described), [logit_scale_spec(described)]
    return ClipModel(config, lists, beside=beside, layout=options.layout, **keywords)


def _image_text_model(config: ImageTextConfig, options: BuildOptions, **keywords: Any) -> ImageTextModel:
    lists = image_text_layer_lists(config, replace(options, device="meta"))
    return ImageTextModel(config, lists, layout=options.layout, **keywords)


LANGUAGE = Architecture(lambda config, options: {"": layer_specs(config, options)}, _language_model)
IMAGES = Architecture(vision_layer_lists, _vision_model)
PAIRS = Architecture(clip_layer_lists, _clip_model)
IMAGE_TO_TEXT = Architecture(image_text_layer_lists, _image_text_model)

ARCHITECTURES: dict[type[ModelSection], Architecture] = {
    ModelConfig: LANGUAGE,
    ImageConfig: IMAGES,
    ClipConfig: PAIRS,
    ImageTextConfig: IMAGE_TO_TEXT,
}
"""By model section. megatron.tasks.register adds to it."""


def layer_lists(config: ModelSection, options: BuildOptions) -> LayerLists:
    """The layers of the model that `config` describes; not built yet."""
    return ARCHITECTURES[type(config)].lists(config, options)


def build_model(
    config: ModelSection,
    options: BuildOptions | None = None,
    *,
    seed: int | None = None,
    device: torch.device | str | None = None,
    checkpoint_layers: int = 0,
) -> LayeredModel:
    """The model that `config` describes, whole or a tensor rank's share of it; the keywords are those of LayeredModel.

    Args:
        options: backends and layout of the layers; default those of one process.
    """
    options = options or BuildOptions()
    keywords: dict[str, Any] = {"seed": seed, "device": device, "checkpoint_layers": checkpoint_layers}
    make = ARCHITECTURES[type(config)].model
    if make is not None:
        return make(config, options, **keywords)
    lists = layer_lists(config, replace(options, device="meta"))
    return LayeredModel(config, lists, layout=options.layout, **keywords)
