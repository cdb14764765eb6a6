"""What looks at images, and section `model` of what learns to classify them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from megatron.config.sections.base import MAX_SIZE, Section
from megatron.config.sections.images import ImagesConfig
from megatron.config.sections.model import BlocksSection
from megatron.errors import ConfigError

_LARGEST_IMAGE = 2**14


class ImageTowerSection(BlocksSection):
    """What makes a vector of an image, as a Vision Transformer does (Dosovitskiy et al., 2021)."""

    sizes: ClassVar[Mapping[str, tuple[str, str]]] = {
        "input": ("hidden_size", "patch_size"), "position": ("image_size", "hidden_size"),
    }  # fmt: skip

    image_size: int = Field(default=224, gt=0, le=_LARGEST_IMAGE)
    """Height and width of the images, in pixels; a multiple of patch_size."""
    patch_size: int = Field(default=16, gt=0, le=_LARGEST_IMAGE)
    """Height and width of the patches that an image is cut into, each of which is a token."""
    in_channels: int = Field(default=3, gt=0, le=1024)
    """Channels of an image: 3 of colours, 1 of greys."""
    patch_bias: bool = True
    """The linear map of the patches has a bias."""
    class_token: bool = True
    """A learned token stands before the patches."""
    pre_norm: bool = False
    """A norm, of the kind final_norm, stands between the positions and the first block."""
    global_pool: Literal["token", "avg"] = "token"
    """What the head reads: the class token, or the mean of the patches (whose norm then follows the mean)."""
    pos_emb: Literal["learned"] = "learned"
    """Position information: a learned vector for each token, class token included."""
    drop_path_rate: float = Field(default=0.0, ge=0, lt=1)
    """Probability with which a sample skips a residual branch of the last block in training; of the blocks before it
    the probabilities rise evenly from 0 (stochastic depth, Huang et al., 2016)."""

    @model_validator(mode="after")
    def _check_image(self) -> Self:
        if self.image_size % self.patch_size:
            reason = f"{self.patch_size} pixels do not divide image_size {self.image_size}"
            raise ConfigError("patch_size", reason, "choose a divisor of it", beside=["image_size"])
        if self.global_pool == "token" and not self.class_token:
            reason = "token reads the class token, and class_token is false"
            raise ConfigError("global_pool", reason, "set avg, or class_token: true", beside=["class_token"])
        return self

    @property
    def patch_values(self) -> int:
        """Numbers in a patch."""
        return self.in_channels * self.patch_size**2

    def tokens_per_sample(self) -> int:
        """Patches, and the class token where there is one."""
        return (self.image_size // self.patch_size) ** 2 + self.class_token

    def drop_path(self, block: int) -> float:
        """Probability with which a sample skips a branch of this block."""
        return self.drop_path_rate * block / max(1, self.num_layers - 1)

    def cannot_shard_tokens(self, ranks: int) -> ConfigError | None:
        """Why so many ranks cannot share the tokens of an image; None where they can."""
        beside = ["class_token", "image_size", "patch_size", "model_parallel_size"]
        if self.class_token:
            reason = "the ranks' shares of the tokens would not be alike, one of them having the class token"
            advice = "set false, or class_token: false and global_pool: avg"
            return ConfigError("sequence_parallel", reason, advice, beside=beside)
        if self.tokens_per_sample() % ranks:
            reason = f"{self.tokens_per_sample()} patches are no multiple of model_parallel_size {ranks}"
            return ConfigError("sequence_parallel", reason, "set sequence_parallel: false", beside=beside)
        return None


class ImageConfig(ImageTowerSection):
    """A network that tells what is on an image."""

    task: ClassVar[str] = "image_classification"
    samples: ClassVar[type[Section]] = ImagesConfig
    sizes: ClassVar[Mapping[str, tuple[str, str]]] = {
        **ImageTowerSection.sizes, "head": ("num_classes", "hidden_size"),
    }  # fmt: skip

    num_classes: int = Field(default=1000, gt=1, le=MAX_SIZE)
    """Classes that an image may be of."""
