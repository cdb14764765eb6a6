"""What a model is made of, as a plan sees it: networks, each a list of blocks with a beginning and an end.

A further kind of model is planned once `NETWORKS` says what its section describes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any

from megatron.config.sections.clip import ClipConfig
from megatron.config.sections.image_text import ImageTextConfig
from megatron.config.sections.model import BlocksSection, ModelConfig, ModelSection
from megatron.config.sections.vision import ImageConfig
from megatron.model.stages import partition
from megatron.planner.counts import block_matrices, block_vectors
from megatron.planner.ends import Ends, ImageEnds, LanguageEnds, PairedTextEnds, ReadImageEnds


@dataclass(frozen=True)
class Network:
    """Blocks, and what is before and after them."""

    model: Any
    """Its section, a BlocksSection."""
    ends: Ends
    """Its beginning and its end."""
    tokens: int
    """Tokens of a sample that its blocks read (T in formulas)."""
    causal: bool = True
    """Tokens do not look at those behind them."""

    @property
    def attention_entries(self) -> int:
        """What attention adds to the matrix entries that a token meets in a block: T d, if not causal 2 T d."""
        entries: int = self.tokens * self.model.hidden_size * (1 if self.causal else 2)
        return entries

    @property
    def flops(self) -> float:
        """Training FLOPs of a sample, as the model's own `flops_per_token` counts them."""
        model = self.model
        entries = sum(block_matrices(model, kind) for kind in model.layer_kinds)
        entries += model.num_layers * self.attention_entries
        return 6.0 * self.tokens * entries + self.ends.flops(model, 1, True, True, 1)


@dataclass(frozen=True)
class Stage:
    """A pipeline stage: the kinds of its blocks, and whether it has what comes before and after them."""

    kinds: tuple[str, ...]
    first: bool
    last: bool

    def parameters(self, network: Network, t: int) -> int:
        """Parameters on one tensor rank; a tied embedding is held by the first and the last stage."""
        model = network.model
        blocks = sum(block_matrices(model, kind, t) + block_vectors(model, kind, t) for kind in self.kinds)
        return blocks + network.ends.parameters(model, self.first, self.last, t)


def stages(model: BlocksSection, count: int) -> list[Stage]:
    """The blocks in `count` consecutive stages, cut as a pipeline cuts them."""
    kinds = model.layer_kinds
    bounds = _bounds(tuple(block_matrices(model, kind) for kind in kinds), count)
    return [Stage(kinds[start:end], start == 0, end == len(kinds)) for start, end in pairwise(bounds)]


@lru_cache
def _bounds(weights: tuple[int, ...], count: int) -> tuple[int, ...]:
    """A plan asks for the same cuts many times."""
    return tuple(partition(weights, count))


# ---- kinds of models ----


def _language(model: ModelConfig) -> tuple[Network, ...]:
    return (Network(model, LanguageEnds(), model.seq_length),)


def _classifier(model: ImageConfig) -> tuple[Network, ...]:
    return (Network(model, ImageEnds(model.num_classes), model.tokens_per_sample(), causal=False),)


def _pairs(model: ClipConfig) -> tuple[Network, ...]:
    image, text = model.image, model.text
    return (
        Network(image, ImageEnds(model.embed_dim, bias=False), image.tokens_per_sample(), causal=False),
        Network(text, PairedTextEnds(model.embed_dim), text.tokens_per_sample()),
    )


def _text_behind_image(model: ImageTextConfig) -> tuple[Network, ...]:
    image, connector = model.image_tower, ReadImageEnds(model.connector_slot_num, model.hidden_size)
    return (
        Network(image, connector, image.tokens_per_sample(), causal=False),
        Network(model.text, LanguageEnds(), model.tokens_per_sample()),
    )


NETWORKS: Mapping[type[ModelSection], Callable[[Any], tuple[Network, ...]]] = {
    ModelConfig: _language, ImageConfig: _classifier, ClipConfig: _pairs, ImageTextConfig: _text_behind_image,
}  # fmt: skip
"""What a section describes, by its kind."""

_OWN_PARAMETERS: Mapping[type[ModelSection], int] = {ClipConfig: 1}
"""Parameters that are in none of the networks: the factor on cosines."""


def networks(model: ModelSection) -> tuple[Network, ...]:
    """Those of a model of one of the kinds in NETWORKS."""
    return NETWORKS[type(model)](model)


def num_parameters(model: ModelSection) -> int:
    """Parameters of the whole model; a tied embedding counts once."""
    found = sum(stages(network.model, 1)[0].parameters(network, 1) for network in networks(model))
    return found + _OWN_PARAMETERS.get(type(model), 0)


def flops_per_token(model: ModelSection) -> float:
    """Training FLOPs of a token as the model's own `flops_per_token` counts them."""
    return sum(network.flops for network in networks(model)) / model.tokens_per_sample()
