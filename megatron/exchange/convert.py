"""Checkpoints from one form to another: opened, and written.

What does not fit its own configuration is refused with the tensor's name when it is opened; no model is built.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import torch

from megatron.checkpoint.new_folder import require_new
from megatron.checkpoint.tensors import TensorView
from megatron.config.schema import RunConfig
from megatron.config.sections.model import ModelConfig
from megatron.config.sections.tokenizer import TokenizerConfig
from megatron.errors import UserError
from megatron.exchange import canonical, gpt_neox, huggingface, official
from megatron.exchange.checkpoint import Checkpoint, of_model
from megatron.exchange.huggingface_folder import CONFIG, SHARD_BYTES
from megatron.exchange.names import in_model_order
from megatron.exchange.opening import open_checkpoint
from megatron.log import get_logger
from megatron.model import LanguageModel
from megatron.model.compatibility import check_same_model
from megatron.mpu.device import DTYPES


def to_huggingface(
    source: str | Path,
    folder: str | Path,
    config: RunConfig | None = None,
    dtype: str = "fp32",
    iteration: int | None = None,
) -> None:
    """Any checkpoint to a folder that transformers loads.

    Args:
        source: whatever open_checkpoint takes.
        folder: must not exist or be empty.
        config: of an official flat file; it names the tokenizer too.
        dtype: fp32, bf16 or fp16.
        iteration: which of a run's checkpoints; default the latest.
    """
    checkpoint = open_checkpoint(source, config, iteration)
    _check_same(None if config is None else config.language, checkpoint)
    checkpoint.verify("model")
    tokenizer = _present(checkpoint.tokenizer if config is None else config.tokenizer)
    _write_huggingface(folder, replace(checkpoint, find_tokenizer=lambda: tokenizer), DTYPES[dtype])


def export_huggingface(
    model: LanguageModel,
    folder: str | Path,
    tokenizer: TokenizerConfig | None = None,
    dtype: torch.dtype | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """A model in memory to a folder that transformers loads; see megatron.exchange.huggingface.write."""
    _write_huggingface(folder, of_model(model, tokenizer), dtype, shard_bytes)


def _write_huggingface(
    folder: str | Path, checkpoint: Checkpoint, dtype: torch.dtype | None, shard_bytes: int = SHARD_BYTES
) -> None:
    """As GPTNeoXForCausalLM, which needs no code of its own, where that computes the model."""
    form = gpt_neox if gpt_neox.is_expressible(checkpoint.language) else huggingface
    form.write(folder, checkpoint, dtype, shard_bytes)


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


class _InModelOrder(TensorView):
    """Tensors that are listed in the order in which a run that starts with them will list them."""

    def names(self, kind: str) -> list[str]:
        """Names of the tensors of a kind."""
        return in_model_order(super().names(kind))


def _write_run(root: str | Path, checkpoint: Checkpoint) -> Path:
    return canonical.write(root, replace(checkpoint, tensors=_InModelOrder(checkpoint.tensors)))


def to_official(source: str | Path, target: str | Path, iteration: int | None = None) -> Path:
    """Any checkpoint to the official code's flat file, at `target`/pytorch_model.bin.

    Raises: UserError for what that file cannot say; see megatron.exchange.official.write.
    """
    checkpoint = open_checkpoint(source, iteration=iteration)
    checkpoint.verify("model")
    return official.write(target, checkpoint)


def _check_same(model: ModelConfig | None, checkpoint: Checkpoint) -> None:
    """Raise a UserError for another model than the checkpoint's; a schedule may have led to its token counts."""
    saved = checkpoint.language
    if model is None:
        return
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
