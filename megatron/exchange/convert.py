"""Checkpoints from one form to another: opened, and written.

What does not fit its own configuration is refused with the tensor's name when it is opened; no model is built.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from megatron.checkpoint.new_folder import require_new
from megatron.checkpoint.tensors import TensorView
from megatron.config.schema import RunConfig
from megatron.config.sections.model import ModelConfig, ModelSection
from megatron.config.sections.tokenizer import TokenizerConfig
from megatron.config.sections.vision import ImageConfig
from megatron.data.classes import read_classes
from megatron.errors import UserError
from megatron.exchange import canonical, gpt_neox, huggingface, huggingface_image, official, timm_vit
from megatron.exchange.checkpoint import Checkpoint, of_model
from megatron.exchange.evaluations import found_results, read_results
from megatron.exchange.huggingface_folder import CONFIG, SHARD_BYTES
from megatron.exchange.images import image_section
from megatron.exchange.model_card import NO_CARD, Card
from megatron.exchange.opening import open_checkpoint
from megatron.log import get_logger
from megatron.model.compatibility import check_same_model, described_model
from megatron.model.layered import LayeredModel
from megatron.mpu.device import DTYPES


def to_huggingface(
    source: str | Path,
    folder: str | Path,
    config: RunConfig | None = None,
    dtype: str = "fp32",
    iteration: int | None = None,
    *,
    licence: str | None = None,
    results: Sequence[str | Path] = (),
    classes: str | Path | None = None,
    ema: bool = False,
) -> None:
    """Any checkpoint to a folder that transformers loads, with a model card.

    Args:
        source: whatever open_checkpoint takes.
        folder: must not exist or be empty.
        config: of an official flat file; it names the tokenizer too.
        dtype: fp32, bf16 or fp16.
        iteration: which of a run's checkpoints; default the latest.
        licence: that the card names, an identifier of the Hub.
        results: files of eval.py about this checkpoint; those beside it are found.
        classes: a file with the names of an image model's classes.
        ema: the average of the weights instead of these.
    """
    card = Card(licence)
    checkpoint = _named(_exported(open_checkpoint(source, config, iteration), ema), classes)
    card = replace(card, measured=read_results([*found_results(checkpoint), *results], checkpoint))
    _check_same(None if config is None else config.model, checkpoint)
    checkpoint.verify("model")
    if isinstance(checkpoint.model_config, ModelConfig):
        tokenizer = _present(checkpoint.tokenizer if config is None else config.tokenizer)
        checkpoint = replace(checkpoint, find_tokenizer=lambda: tokenizer)
    _write_huggingface(folder, checkpoint, DTYPES[dtype], card=card)


def export_huggingface(
    model: LayeredModel,
    folder: str | Path,
    tokenizer: TokenizerConfig | None = None,
    dtype: torch.dtype | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """A model in memory to a folder that transformers loads; see megatron.exchange.huggingface.write."""
    _write_huggingface(folder, of_model(model, tokenizer), dtype, shard_bytes)


def _write_huggingface(
    folder: str | Path,
    checkpoint: Checkpoint,
    dtype: torch.dtype | None,
    shard_bytes: int = SHARD_BYTES,
    card: Card = NO_CARD,
) -> None:
    """As GPTNeoXForCausalLM, which needs no code of its own, where that computes the model."""
    if isinstance(checkpoint.model_config, ImageConfig):
        huggingface_image.write(folder, checkpoint, dtype, shard_bytes, card)
        return
    form = gpt_neox if gpt_neox.is_expressible(checkpoint.language) else huggingface
    form.write(folder, checkpoint, dtype, shard_bytes, card)


def _named(checkpoint: Checkpoint, classes: str | Path | None) -> Checkpoint:
    """The checkpoint with names of classes from this file, if one is given. Raises UserError for another number."""
    if classes is None:
        return checkpoint
    names, count = read_classes(classes, "--classes"), image_section(checkpoint.model_config).num_classes
    if len(names) != count:
        raise UserError(f"--classes: {classes} names {len(names)} classes, and the model tells {count} apart")
    return replace(checkpoint, find_class_names=lambda: names)


def from_huggingface(source: str | Path, root: str | Path) -> Path:
    """A folder in Hugging Face's form to a canonical checkpoint of iteration 0 under `root`, in fp32."""
    if not os.path.isfile(Path(source) / CONFIG):
        raise UserError(f"{source}: has no config.json; give a folder in Hugging Face's form")
    require_new(Path(root))
    return _write_run(root, open_checkpoint(source))


def from_official(source: str | Path, root: str | Path, config: RunConfig) -> Path:
    """An official flat file or training folder and its configuration to a canonical checkpoint of iteration 0."""
    if official.matches(Path(source)) is None:
        raise UserError(f"{source}: no such file; give an official pytorch_model.bin or global_step folder")
    require_new(Path(root))
    checkpoint = open_checkpoint(source, config)
    _check_same(config.language, checkpoint)
    return _write_run(root, checkpoint)


def from_timm(source: str | Path, root: str | Path, config: RunConfig | None = None) -> Path:
    """A Vision Transformer of timm to a canonical checkpoint of iteration 0 under `root`, in fp32.

    Args:
        source: a folder as on timm's hub, or a .safetensors or .pth file.
        config: of a file, and of a folder whose config.json does not tell.
    """
    path = Path(source)
    if not path.is_file() and timm_vit.matches(path) is None and (config is None or not path.is_dir()):
        raise UserError(f"{source}: no model of timm; give a folder with its config.json, or a .safetensors or .pth")
    require_new(Path(root))
    return _write_run(root, timm_vit.read(path, config, "IN"))


def to_timm(
    source: str | Path,
    folder: str | Path,
    dtype: str = "fp32",
    iteration: int | None = None,
    classes: str | Path | None = None,
    ema: bool = False,
) -> None:
    """Any image model of Transformer blocks to a folder that timm loads; see megatron.exchange.timm_vit.write.

    Args:
        ema: the average of the weights instead of these.
    """
    checkpoint = _named(_exported(open_checkpoint(source, iteration=iteration), ema), classes)
    checkpoint.verify("model")
    timm_vit.write(folder, checkpoint, DTYPES[dtype])


class _InModelOrder(TensorView):
    """Tensors that are listed in the order in which a run that starts with them will list them."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__(checkpoint.tensors)
        self._order = list(described_model(checkpoint.model_config).state_dict())

    def names(self, kind: str) -> list[str]:
        """Names of the tensors of a kind."""
        if kind != "model":
            return super().names(kind)
        found = set(super().names(kind))
        return [name for name in self._order if name in found]


def _write_run(root: str | Path, checkpoint: Checkpoint) -> Path:
    return canonical.write(root, replace(checkpoint, tensors=_InModelOrder(checkpoint)))


def to_official(source: str | Path, target: str | Path, iteration: int | None = None, ema: bool = False) -> Path:
    """Any checkpoint to the official code's flat file, at `target`/pytorch_model.bin.

    Args:
        ema: the average of the weights instead of these.

    Raises: UserError for what that file cannot say; see megatron.exchange.official.write.
    """
    checkpoint = _exported(open_checkpoint(source, iteration=iteration), ema)
    checkpoint.verify("model")
    return official.write(target, checkpoint)


def _exported(checkpoint: Checkpoint, ema: bool) -> Checkpoint:
    """What is written of a checkpoint: its weights, with a line where there is an average of them too, or that."""
    if ema and not checkpoint.has_ema:
        raise UserError(f"--ema: {checkpoint.folder} has no average of its weights (ema_decay); leave the flag off")
    if checkpoint.has_ema and not ema:
        get_logger().info("%s: its weights are written; --ema writes their average (EMA)", checkpoint.folder)
    return checkpoint.averaged() if ema else checkpoint


def _check_same(model: ModelSection | None, checkpoint: Checkpoint) -> None:
    """Raise a UserError for another model than the checkpoint's; a schedule may have led to its token counts."""
    if model is None:
        return
    saved = checkpoint.model_config
    if saved.token_segments is not None:
        counts = {key: getattr(saved, key) for key in ("qkv_slot_num", "proj_slot_num", "ffn_slot_num")}
        model = model.replaced(token_segments=None, segment_norms=saved.segment_norms, **counts)
    check_same_model(model, saved, checkpoint.folder)


def _present(found: TokenizerConfig | None) -> TokenizerConfig | None:
    """A tokenizer whose files are there; None, with a line in the log, where they are not."""
    if found is None:
        return None
    files = [file for file in (found.vocab_file, found.merge_file) if file]
    missing = [file for file in files if not os.path.isfile(file)]
    if missing or not (files or found.tokenizer_type == "CharLevelTokenizer"):
        get_logger().warning(
            "no tokenizer is written: %s", f"{missing[0]} is not there" if missing else "none is named"
        )
        return None
    return found
