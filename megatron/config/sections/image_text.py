"""Section `model` of what learns to say what is on an image."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Self

from pydantic import Field, PrivateAttr, model_validator

from megatron.config.sections.base import MAX_SIZE, Section
from megatron.config.sections.clip import IMAGE, TEXT
from megatron.config.sections.images import ImagesConfig
from megatron.config.sections.model import ModelConfig, ModelSection
from megatron.config.sections.vision import ImageTowerSection
from megatron.errors import ConfigError


class ImageTower(ImageTowerSection):
    """The network that looks at the images, with the keys of the section vision. All its tokens are read, so that
    global_pool says nothing here."""

    def spelled(self, key: str) -> str:
        """A key of this section as a configuration has it."""
        return f"image_tower.{key}"


class ImageTextConfig(ModelConfig):
    """A language model that reads an image before each text: what image_tower makes of it, through a Pattention. The
    keys of the section model are those of the language model."""

    task: ClassVar[str] = "image_to_text"
    samples: ClassVar[type[Section]] = ImagesConfig
    placeholders: ClassVar[Mapping[str, Any]] = {
        "image_tower": {"num_layers": 1, "hidden_size": 64, "num_attention_heads": 1}, "connector_slot_num": 64,
    }  # fmt: skip

    image_tower: ImageTower
    """The network that looks at the images: a table of keys of the section vision."""
    connector_slot_num: int = Field(gt=0, le=MAX_SIZE)
    """Parameter tokens of the Pattention that makes vectors of the language model of the image tower's."""

    _towers: dict[str, ModelSection] = PrivateAttr()

    @model_validator(mode="after")
    def _build_towers(self) -> Self:
        if self.use_mup:
            raise ConfigError("use_mup", "true is for language models", "remove it")
        text = ModelConfig(**{key: getattr(self, key) for key in ModelConfig.model_fields})
        stages = [number_of_stages(tower) for tower in (self.image_tower, text)]
        if stages[0] != stages[1]:
            reason = f"the image tower has {stages[0]} stages of growth, the language model {stages[1]}"
            beside = ["image_tower.token_segments"]
            raise ConfigError("token_segments", reason, "leave it to growth", beside=beside)
        self._towers = {IMAGE: self.image_tower, TEXT: text}
        return self

    def towers(self) -> Mapping[str, ModelSection]:
        """The image tower and the language model."""
        return self._towers

    @property
    def text(self) -> ModelConfig:
        """The language model."""
        tower = self._towers[TEXT]
        assert isinstance(tower, ModelConfig)
        return tower

    @property
    def growths(self) -> int:
        """How many growths the model has behind it."""
        return number_of_stages(self.image_tower) - 1

    def with_towers(self, towers: Mapping[str, ModelSection]) -> ImageTextConfig:
        """The same network with these towers."""
        text = {key: getattr(towers[TEXT], key) for key in ModelConfig.model_fields}
        return type(self)(**{**self.model_dump(), **text, "image_tower": towers[IMAGE].model_dump()})

    def tokens_per_sample(self) -> int:
        """Patches, class token and tokens of the text."""
        return sum(tower.tokens_per_sample() for tower in self._towers.values())

    def cannot_shard_tokens(self, ranks: int) -> ConfigError | None:
        """Ranks do not share the tokens of an image and a text: they stand one behind the other."""
        reason = "the tokens of an image and of its text are not shared by ranks"
        return ConfigError("sequence_parallel", reason, "set false", beside=["model_parallel_size"])


def number_of_stages(section: ModelSection) -> int:
    """Stages of growth that a network's layers have tokens of, the one that it was made with included."""
    return len(next(iter(section.token_segments.values()))[0]) if section.token_segments else 1
