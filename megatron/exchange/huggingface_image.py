"""Image classifiers in Hugging Face's form: AutoModelForImageClassification and AutoImageProcessor.

The folder carries its own code (see megatron.exchange.huggingface_source), as that of a language model does; what is
joined and what is kept is the same (megatron.exchange.huggingface).
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from megatron.config.mistakes import config_error
from megatron.config.sections.images import ImagesConfig
from megatron.config.sections.vision import ImageConfig
from megatron.errors import UserError
from megatron.exchange.checkpoint import Checkpoint
from megatron.exchange.huggingface_folder import (
    CONFIG,
    SHARD_BYTES,
    FolderTensors,
    architectures,
    dtype_name,
    require_fit,
    write_folder,
)
from megatron.exchange.huggingface_source import IMAGES, configuration_source, modeling_source, processing_source
from megatron.exchange.huggingface_weights import read_json
from megatron.exchange.images import class_names_in, image_section, image_settings, samples_of
from megatron.exchange.joined import JoinedTensors, joined_config
from megatron.exchange.model_card import NO_CARD, README, Card, Loading, model_card
from megatron.model.compatibility import count_layers

ARCHITECTURE = "TokenFormerForImageClassification"
PROCESSOR = "preprocessor_config.json"
_PROCESSING = "image_processing_tokenformer"
_PROCESSOR_CLASS = "TokenFormerImageProcessor"
_HEAD = {"head.linear": "classifier"}
_LOADING = Loading("AutoModelForImageClassification", True, "AutoImageProcessor")


def matches(path: Path, iteration: int | None = None, key: str = "load") -> Path | None:
    """`path` if it is a folder with a config.json that names this architecture."""
    is_ours = os.path.isfile(path / CONFIG) and ARCHITECTURE in architectures(read_json(path / CONFIG))
    return path if is_ours else None


def open(path: Path, config: object = None, key: str = "load") -> Checkpoint:
    """An export, which says for itself what it is. Raises UserError for a damaged one."""
    source, tensors = path / CONFIG, FolderTensors(path, lambda name: [_canonical_name(name)], None)
    found = read_json(source)
    layers = count_layers(tensors.origins)
    if found.get("num_layers") != layers:  # seen to before a list of a billion layers is made
        told = str(found.get("num_layers"))[:40]
        raise UserError(f"{source}: num_layers: {told} does not fit the weights, which are of {layers} layers")
    labels = found.get("id2label")
    labels = labels if isinstance(labels, dict) else dict.fromkeys("01")  # transformers leaves out its default
    keys = {name: found[name] for name in ImageConfig.model_fields if name in found}
    try:
        model = ImageConfig(**{**keys, "num_classes": len(labels)})
    except ValidationError as error:
        raise config_error(error, str(source)) from None
    require_fit(model, tensors, path, source)
    names = [labels.get(str(number)) for number in range(len(labels))]
    is_named = any(name != f"LABEL_{number}" for number, name in enumerate(names)) and any(names)
    classes = class_names_in(names if is_named else [], model.num_classes, source)
    return Checkpoint(path, model, tensors, image_settings(model, _images(path)), find_class_names=lambda: classes)


def _images(folder: Path) -> ImagesConfig:
    """How images are made ready, by the folder's preprocessor_config.json if there is one."""
    source = folder / PROCESSOR
    found = read_json(source) if source.is_file() else {}
    keys = ("crop_pct", "image_mean", "image_std")
    try:
        return ImagesConfig(**{key: found[key] for key in keys if found.get(key) is not None})
    except ValidationError as error:
        raise config_error(error, str(source)) from None


def write(
    target: str | Path,
    checkpoint: Checkpoint,
    dtype: torch.dtype | None = None,
    shard_bytes: int = SHARD_BYTES,
    card: Card = NO_CARD,
) -> None:
    """Write a folder that transformers loads, with its image processor; complete or not at all.

    Args and errors: those of megatron.exchange.huggingface.write, for an image model.
    """
    config, images = image_section(checkpoint.model_config), samples_of(checkpoint)
    if config.segment_norms is None:
        joined = JoinedTensors(checkpoint.tensors)
        config = image_section(joined_config(config, joined))
        checkpoint = replace(checkpoint, model_config=config, tensors=joined)
    source = checkpoint.tensors
    tensors = ((_export_name(name), source.tensor("model", name)) for name in source.names("model"))
    dtype = dtype or source.tensor("model", "embedding.positions").dtype
    files: dict[str, Any] = {
        f"{IMAGES.modeling}.py": modeling_source(IMAGES),
        f"{IMAGES.configuration}.py": configuration_source(IMAGES),
        f"{_PROCESSING}.py": processing_source(),
        CONFIG: {**_own_config(config, checkpoint.class_names), "dtype": dtype_name(dtype)},
        PROCESSOR: _processor_config(config, images),
        README: model_card(checkpoint, config, Path(target).name, dtype, _LOADING, card),
    }
    write_folder(target, tensors, dtype, shard_bytes, files)


def _export_name(canonical: str) -> str:
    stem, _, last = canonical.rpartition(".")
    return f"{_HEAD[stem]}.{last}" if stem in _HEAD else f"model.{canonical}"


def _canonical_name(exported: str) -> str:
    stem, _, last = exported.rpartition(".")
    return next((f"{ours}.{last}" for ours, theirs in _HEAD.items() if stem == theirs), exported.removeprefix("model."))


def _own_config(config: ImageConfig, names: list[str] | None) -> dict[str, Any]:
    dumped = config.model_dump(mode="json")
    keys = {name: dumped[name] for name in dumped if name not in IMAGES.renamed}
    if config.segment_norms is not None:
        keys |= {key: dumped[key] for key in ("token_segments", "segment_norms")}
    labels = names or [f"LABEL_{number}" for number in range(config.num_classes)]
    return {
        "architectures": [ARCHITECTURE],
        "model_type": "tokenformer_image",
        "auto_map": {
            "AutoConfig": f"{IMAGES.configuration}.{IMAGES.config_class}",
            "AutoModel": f"{IMAGES.modeling}.TokenFormerImageModel",
            "AutoModelForImageClassification": f"{IMAGES.modeling}.{ARCHITECTURE}",
        },
        **keys,
        "id2label": {str(number): label for number, label in enumerate(labels)},
        "label2id": {label: number for number, label in enumerate(labels)},
    }


def _processor_config(config: ImageConfig, images: ImagesConfig) -> dict[str, Any]:
    mean, std = images.normalisation(config.in_channels)
    return {
        "image_processor_type": _PROCESSOR_CLASS,
        "auto_map": {"AutoImageProcessor": f"{_PROCESSING}.{_PROCESSOR_CLASS}"},
        "image_size": config.image_size,
        "in_channels": config.in_channels,
        "crop_pct": images.crop_pct,
        "image_mean": list(mean),
        "image_std": list(std),
    }
