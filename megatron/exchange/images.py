"""What the forms of image models have in common: the section, how images are made ready, the names of classes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from pydantic import ValidationError

from megatron.config.mistakes import config_error
from megatron.config.schema import RunConfig
from megatron.config.sections.images import ImagesConfig
from megatron.config.sections.model import ModelSection
from megatron.config.sections.vision import ImageConfig
from megatron.data.classes import are_class_names
from megatron.errors import ConfigError
from megatron.exchange.checkpoint import Checkpoint
from megatron.log import get_logger


def image_section(described: RunConfig | ModelSection) -> ImageConfig:
    """The section of an image classifier. Raises ConfigError for a model that learns something else."""
    model = described.model if isinstance(described, RunConfig) else described
    if not isinstance(model, ImageConfig):
        raise ConfigError("task", f"this is for models that classify images, and not for what learns '{model.task}'")
    return model


def image_settings(model: ImageConfig, images: ImagesConfig) -> dict[str, Any]:
    """The configuration of a run, flat, of a model that comes without one."""
    return RunConfig(model=model, images=images).flat()


def samples_of(checkpoint: Checkpoint) -> ImagesConfig:
    """How images are made ready for a checkpoint's model. Raises ConfigError for a damaged record."""
    settings = checkpoint.settings or {}
    try:
        return ImagesConfig(**{key: settings[key] for key in ImagesConfig.model_fields if key in settings})
    except ValidationError as error:
        raise config_error(error, str(checkpoint.folder)) from None


def class_names_in(names: Sequence[object], count: int, source: Path) -> list[str] | None:
    """The names of `count` classes that a file tells; None, with a line in the log, where these do not tell them apart.

    names: [] where there are none.
    """
    if len(names) == count and are_class_names(names):
        return cast(list[str], list(names))
    if names:
        get_logger().warning("%s: its names of classes are left out: they are not one for each of %d", source, count)
    return None
