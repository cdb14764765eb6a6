"""What `--model_args` of the lm_eval command may say about a TokenFormer, and the adapter made from it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron.config import load_config
from megatron.config.sections.tokenizer import TokenizerConfig
from megatron.errors import UserError
from megatron.evaluation.batching import BatchSize
from megatron.exchange import Checkpoint, open_checkpoint
from megatron.inference.load import language_model_of
from megatron.inference.prepare import check_vocabulary
from megatron.model import LanguageModel
from megatron.text import suggestion
from megatron.tokenizer import Tokenizer, build_tokenizer

_DTYPES = {
    "auto": None, "float32": torch.float32, "fp32": torch.float32, "bfloat16": torch.bfloat16, "bf16": torch.bfloat16,
    "float16": torch.float16, "fp16": torch.float16,
}  # fmt: skip


_KNOWN = (
    "pretrained", "config", "tokenizer", "dtype", "max_length", "batch_size", "max_batch_size", "device", "use_ema",
)  # fmt: skip


@dataclass(frozen=True)
class Pretrained:
    """What `--model_args` describe: a model, its tokenizer, and how requests are computed."""

    model: LanguageModel
    tokenizer: Tokenizer
    batch_size: BatchSize
    max_length: int | None


def load_pretrained(
    pretrained: str | None = None,
    config: str | None = None,
    tokenizer: str | None = None,
    dtype: str = "auto",
    device: str | None = None,
    batch_size: int | str = 1,
    max_batch_size: int | None = None,
    max_length: int | None = None,
    use_ema: bool = True,
    **others: Any,
) -> Pretrained:
    """A checkpoint, as lm-eval's words describe it.

    Args:
        pretrained: a run's folder of checkpoints or one of them, a folder in Hugging Face's form, or an official
            pytorch_model.bin, which needs `config`.
        config: YAML file of the model and its tokenizer.
        tokenizer: a tokenizer.json; default the one of the config, the checkpoint or the folder.
        dtype: of the parameters; auto is fp32.
        device: default the GPU if there is one; a machine without one uses the CPU whatever it says.
        batch_size: a number or auto (lm-eval's auto:N counts as auto).
        max_batch_size: taken for lm-eval's sake; auto finds its limit by itself.
        max_length: context length in tokens; default the model's.
        use_ema: the average of the weights where there is one; false: the weights.
        others: words of lm-eval's other models; those that would change something are refused.

    Raises: UserError for what cannot be found, read or understood.
    """
    _check_others(others)
    path = _path_of(pretrained)
    if dtype not in _DTYPES:
        raise UserError(f"dtype: '{dtype}' is not supported; choose one of {', '.join(_DTYPES)}")
    size: BatchSize = "auto" if str(batch_size).startswith("auto") else _positive("batch_size", batch_size)
    length = None if max_length is None else _positive("max_length", max_length)
    run = load_config(str(config)) if config else None
    checkpoint = open_checkpoint(path, run, key="pretrained")
    if not isinstance(use_ema, bool):
        raise UserError(f"use_ema: expected true or false, got {use_ema!r}")
    checkpoint = checkpoint.averaged() if use_ema else checkpoint
    model = language_model_of(checkpoint, run, _DTYPES[dtype], _place(device))
    if tokenizer:
        described = TokenizerConfig(tokenizer_type="HFTokenizer", vocab_file=str(tokenizer))
    else:
        described = run.tokenizer if run else _tokenizer_of(checkpoint)
    built = build_tokenizer(described)
    check_vocabulary(built, model)
    return Pretrained(model, built, size, length)


def _path_of(pretrained: Any) -> Path:
    if pretrained in (None, ""):
        raise UserError("model_args: pretrained is missing; give pretrained=FOLDER of a run's checkpoints or an export")
    path = Path(str(pretrained))
    if not os.path.exists(path):
        raise UserError(f"pretrained: {path} does not exist; name a folder or file here, nothing is downloaded")
    return path


def _place(device: str | None) -> torch.device:
    # lm_eval asks for cuda unless told otherwise, whether there is a GPU or not.
    try:
        place = torch.device(device or "cuda")
    except (RuntimeError, TypeError):
        raise UserError(f"device: '{device}' is not one; give cuda, cuda:N or cpu") from None
    return place if torch.cuda.is_available() else torch.device("cpu")


def _positive(name: str, value: Any) -> int:
    text = str(value)
    if not text.isdecimal() or int(text) == 0:
        also = " or auto" if name == "batch_size" else ""
        raise UserError(f"{name}: expected a positive whole number{also}, got {value!r}")
    return int(text)


def _check_others(others: dict[str, Any]) -> None:
    """What lm-eval's `hf` model knows besides: taken where it changes nothing."""
    for name, value in others.items():
        if name == "trust_remote_code" or value is None:  # code that lies in a folder is never run
            continue
        if name == "add_bos_token":
            if value not in (False, "False", "false", 0):
                raise UserError("add_bos_token: the models are trained without such a token; leave it off")
        elif name == "revision":
            if value != "main":
                raise UserError(
                    f"revision: '{value}' is of the Hugging Face Hub; download it and name its folder, or name a "
                    "checkpoint of a run with pretrained=RUN/global_stepN"
                )
        else:
            meant = suggestion(name, _KNOWN, f"known: {', '.join(_KNOWN)}")
            raise UserError(f"model_args: unknown '{name}'; {meant}")


def _tokenizer_of(checkpoint: Checkpoint) -> TokenizerConfig:
    found = checkpoint.tokenizer
    if found is None:
        raise UserError(
            f"tokenizer: {checkpoint.folder} has none; add tokenizer=tokenizer.json or config=YAML to --model_args"
        )
    return found
