"""Section `model` of what learns images and texts that belong together."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, PrivateAttr, ValidationError, model_validator

from megatron.config.mistakes import mistakes
from megatron.config.sections.base import MAX_SIZE, Section
from megatron.config.sections.images import ImagesConfig
from megatron.config.sections.model import TOKENFORMER, Initialisation, ModelSection, VocabularySection
from megatron.config.sections.vision import ImageTowerSection
from megatron.errors import ConfigError

IMAGE, TEXT = "image.", "text."
"""What the names of the two towers' tensors begin with."""

_SLOTS = ("qkv_slot_num", "proj_slot_num", "ffn_slot_num")


class TextTower(Section):
    """What of the text tower is not as in the image tower."""

    seq_length: int = Field(default=77, gt=1, le=MAX_SIZE)
    """Tokens of a text, at most; longer ones are cut off."""
    num_layers: int | None = Field(default=None, gt=0, le=10_000)
    """Number of blocks. Default of this and all below: that of the image tower."""
    hidden_size: int | None = Field(default=None, gt=0, le=MAX_SIZE)
    """Width of the residual stream."""
    num_attention_heads: int | None = Field(default=None, gt=0, le=MAX_SIZE)
    """Number of attention heads."""
    attention_config: list[Any] | None = None
    """Kind of each block."""
    qkv_slot_num: int | None = Field(default=None, gt=0, le=MAX_SIZE)
    """Parameter tokens of each of the query, key and value projections."""
    proj_slot_num: int | None = Field(default=None, gt=0, le=MAX_SIZE)
    """Parameter tokens of the attention output projection."""
    ffn_slot_num: int | None = Field(default=None, gt=0, le=MAX_SIZE)
    """Parameter tokens of the feed-forward Pattention."""
    intermediate_size: int | None = Field(default=None, gt=0, le=MAX_SIZE)
    """Inner width of the feed-forward of Transformer blocks."""
    token_segments: dict[Literal["qkv", "proj", "ffn"], list[list[Annotated[int, Field(ge=0)]]]] | None = None
    """Written by growth, not by hand; that of the image tower is another."""


class PairedImageSection(ImageTowerSection):
    """What makes a vector of an image, beside another network for texts."""

    sizes: ClassVar[Mapping[str, tuple[str, str]]] = {
        **ImageTowerSection.sizes, "head": ("embed_dim", "hidden_size"),
    }  # fmt: skip


class TextTowerSection(VocabularySection):
    """What makes a vector of a text: causal blocks, and the vector of its last token."""

    sizes: ClassVar[Mapping[str, tuple[str, str]]] = {
        "embedding": ("padded_vocab_size", "hidden_size"), "position": ("seq_length", "hidden_size"),
        "head": ("embed_dim", "hidden_size"),
    }  # fmt: skip

    seq_length: int = Field(gt=1, le=MAX_SIZE)
    """Tokens of a text, at most."""

    def tokens_per_sample(self) -> int:
        """Tokens of a text."""
        return self.seq_length

    def spelled(self, key: str) -> str:
        """A key of this section as a configuration has it."""
        return f"text_tower.{key}" if key in TextTower.model_fields else key


class ClipConfig(VocabularySection, ImageTowerSection):
    """Two networks, whose vectors of an image and of its text are alike (CLIP: Radford et al., 2021). What it says of
    blocks is of the image tower, and of the text tower where text_tower does not say otherwise."""

    task: ClassVar[str] = "clip"
    samples: ClassVar[type[Section]] = ImagesConfig

    patch_bias: bool = False
    """The linear map of the patches has a bias."""
    pre_norm: bool = True
    """A norm, of the kind final_norm, stands between the positions and the first block of the image tower."""
    embed_dim: int = Field(default=512, gt=0, le=MAX_SIZE)
    """Width of the vectors that are compared."""
    logit_scale_init: float = Field(default=math.log(1 / 0.07), ge=-10, le=math.log(100))
    """Logarithm of the factor on their cosines at the start. It is learned, and counts as ln 100 above that."""
    text_tower: TextTower = TextTower()
    """The text tower, for example {num_layers: 12, hidden_size: 512, num_attention_heads: 8, qkv_slot_num: 384}."""

    _towers: dict[str, ModelSection] = PrivateAttr()

    @model_validator(mode="after")
    def _build_towers(self) -> Self:
        image = PairedImageSection(**{key: getattr(self, key) for key in ImageTowerSection.model_fields})
        text = _text_section(self, self.text_tower)
        stages = [
            len(next(iter(segments.values()))[0]) if segments else 1
            for segments in (image.token_segments, text.token_segments)
        ]
        if stages[0] != stages[1]:
            reason = f"the image tower has {stages[0]} stages of growth, the text tower {stages[1]}"
            beside = ["text_tower.token_segments"]
            raise ConfigError("token_segments", reason, "leave it to growth", beside=beside)
        self._towers = {IMAGE: image, TEXT: text}
        return self

    def towers(self) -> Mapping[str, ModelSection]:
        """The image tower and the text tower."""
        return self._towers

    @property
    def image(self) -> ImageTowerSection:
        """The image tower."""
        tower = self._towers[IMAGE]
        assert isinstance(tower, ImageTowerSection)
        return tower

    @property
    def text(self) -> TextTowerSection:
        """The text tower, with all that it shares with the image tower."""
        tower = self._towers[TEXT]
        assert isinstance(tower, TextTowerSection)
        return tower

    def with_towers(self, towers: Mapping[str, ModelSection]) -> ClipConfig:
        """The same network with these towers."""
        image = {key: getattr(towers[IMAGE], key) for key in ImageTowerSection.model_fields}
        text = {key: getattr(towers[TEXT], key) for key in TextTower.model_fields}
        return type(self)(**{**self.model_dump(), **image, "text_tower": text})

    def tokens_per_sample(self) -> int:
        """Patches, class token and tokens of the text."""
        return sum(tower.tokens_per_sample() for tower in self._towers.values())

    def cannot_shard_tokens(self, ranks: int) -> ConfigError | None:
        """Ranks do not share the tokens of a pair: each tower reads one of them."""
        reason = "the vector of a text is that of one token, and of an image that of the class token"
        return ConfigError("sequence_parallel", reason, "set false", beside=["model_parallel_size"])

    def initialisation(self) -> Initialisation:
        """How the matrices of this network start, and the logarithm of the factor on cosines."""
        return replace(super().initialisation(), logit_scale=self.logit_scale_init)


def _text_section(config: ClipConfig, tower: TextTower) -> TextTowerSection:
    """The whole section of the text tower. Raises ConfigError for keys that do not fit each other."""
    shared = {key: getattr(config, key) for key in VocabularySection.model_fields}
    own = {key: value for key in TextTower.model_fields if (value := getattr(tower, key)) is not None}
    keys = {**shared, "token_segments": None, **own}
    if not _has_tokens(keys["attention_config"]):
        keys |= dict.fromkeys(_SLOTS)
    try:
        return TextTowerSection(**keys)
    except ValidationError as error:
        first = mistakes(error)[0]
        in_table = first.key in own or first.key in TextTower.model_fields
        first.key = f"text_tower.{first.key}" if in_table else first.key
        first.spelling = first.key
        first.beside |= {f"text_tower.{key}" for key in first.beside}
        raise first from None


def _has_tokens(attention_config: list[Any] | None) -> bool:
    return attention_config is None or TOKENFORMER in str(attention_config)
