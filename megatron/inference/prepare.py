"""What evaluation and generation start from: the model and the tokenizer that a configuration names."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch

from megatron.config.schema import RunConfig
from megatron.config.sections.checkpoint import CheckpointConfig
from megatron.config.sections.image_text import ImageTextConfig
from megatron.config.sections.images import ImagesConfig
from megatron.config.sections.model import language_section
from megatron.data.pillow import pillow_needed
from megatron.errors import ConfigError, UserError
from megatron.exchange import Checkpoint, open_checkpoint
from megatron.exchange.opening import checkpoint_path
from megatron.inference.load import model_of
from megatron.inference.sparse import as_configured
from megatron.log import get_logger
from megatron.model import LanguageModel
from megatron.model.clip_model import ClipModel
from megatron.model.image_text_model import ImageTextModel
from megatron.model.layered import LayeredModel
from megatron.model.vision_model import VisionModel
from megatron.mpu import SINGLE, Layout
from megatron.mpu.device import DTYPES, process_device
from megatron.tokenizer import Tokenizer, build_tokenizer

if TYPE_CHECKING:
    from megatron.inference.images import ImageReader


def load_for_inference(config: RunConfig, layout: Layout = SINGLE) -> tuple[LanguageModel, Tokenizer]:
    """The model of eval_ckpt, else of load, and the tokenizer; on a GPU if there is one, shared by the tensor ranks.

    The model leaves out the parameter tokens that the section `evaluation` says.

    Raises: UserError when no checkpoint is named or found, or the tokenizer or that section does not fit the model.
    """
    language_section(config.model)
    checkpoint = _open(config)
    tokenizer = build_tokenizer(config.tokenizer)
    model = _load(checkpoint, config, layout)
    assert isinstance(model, LanguageModel), "only such a one has been found to fit the configuration"
    check_vocabulary(tokenizer, model)
    return as_configured(model, config.evaluation), tokenizer


def load_with_images(config: RunConfig, layout: Layout = SINGLE) -> tuple[LanguageModel, Tokenizer, ImageReader]:
    """The language model of a model that reads images, the tokenizer, and what reads the images; as above.

    All parameter tokens are used for the images.
    """
    with pillow_needed():
        from megatron.inference.images import ImageReader
    if not isinstance(config.model, ImageTextConfig):
        raise ConfigError("task", f"a model that learns '{config.model.task}' reads no images to speak of")
    checkpoint, tokenizer = _open(config), build_tokenizer(config.tokenizer)
    model = _load(checkpoint, config, layout)
    assert isinstance(model, ImageTextModel), "only such a one has been found to fit the configuration"
    language = model.language_model()
    check_vocabulary(tokenizer, language)
    assert isinstance(config.images, ImagesConfig), "of such a model"
    return as_configured(language, config.evaluation), tokenizer, ImageReader(model, config.images)


def load_image_model(config: RunConfig, layout: Layout = SINGLE) -> VisionModel:
    """The image classifier of eval_ckpt, else of load, as `load_for_inference` loads a language model."""
    model = _load(_open(config), config, layout)
    assert isinstance(model, VisionModel), "only such a one has been found to fit the configuration"
    return model


def load_pair_model(config: RunConfig, layout: Layout = SINGLE) -> ClipModel:
    """The model of images and texts, likewise. Raises UserError where the tokenizer does not fit it."""
    model = _load(_open(config), config, layout)
    assert isinstance(model, ClipModel), "only such a one has been found to fit the configuration"
    check_vocabulary(build_tokenizer(config.tokenizer), model)
    return model


def _open(config: RunConfig) -> Checkpoint:
    path, key = _named(config.checkpoint)
    return open_checkpoint(path, config, config.checkpoint.iteration, key)


def _load(checkpoint: Checkpoint, config: RunConfig, layout: Layout) -> LayeredModel:
    averages = config.evaluation.use_ema and checkpoint.has_ema
    if averages:
        checkpoint = checkpoint.averaged()
    device = process_device()
    dtype = inference_dtype(config.precision.dtype, device)
    attention = config.training.attention_backend
    model = model_of(checkpoint, config, dtype, device, attention_backend=attention, layout=layout)
    name = str(dtype).removeprefix("torch.")
    get_logger().info(
        "model of %s: %s parameters%s, %s on %s", checkpoint.folder, f"{model.num_parameters():,}",
        ", the average of the weights (use_ema)" * averages, name, device,
    )  # fmt: skip
    return model


def checkpoint_source(config: CheckpointConfig) -> Path:
    """The file or the folder of the one checkpoint that eval_ckpt, else load, and iteration name. Raises UserError."""
    path, key = _named(config)
    return checkpoint_path(path, config.iteration, key)


def _named(config: CheckpointConfig) -> tuple[Path, str]:
    """What eval_ckpt or load names, and which of them does."""
    key = "eval_ckpt" if config.eval_ckpt else "load"
    named = config.eval_ckpt or config.load
    if not named:
        raise UserError(
            "load: no checkpoint configured; set load to a run's checkpoint folder, or eval_ckpt to an official "
            "pytorch_model.bin"
        )
    path = Path(named)
    if not os.path.exists(path):  # Path.exists() raises where a name is too long
        raise UserError(f"{key}: {path} does not exist; train first, or name an existing checkpoint")
    return path, key


def inference_dtype(name: Literal["fp32", "bf16", "fp16"], device: torch.device) -> torch.dtype:
    """The torch dtype of the configured one; fp16 becomes fp32 on a CPU, which has no fast fp16."""
    if name == "fp16" and device.type == "cpu":
        get_logger().info("fp16: no GPU here, the model runs in fp32")
        return torch.float32
    return DTYPES[name]


def check_vocabulary(tokenizer: Tokenizer, model: LanguageModel | ClipModel) -> None:
    """Raise a UserError for a tokenizer with more ids than the model has rows."""
    rows = model.config.padded_vocab_size
    assert rows is not None, "a model's vocabulary is known"
    if tokenizer.vocab_size > rows:
        raise UserError(
            f"tokenizer_type: the tokenizer has {tokenizer.vocab_size} ids, the model's embedding {rows} rows; use the "
            "tokenizer the model was trained with"
        )
