"""Checkpoints from one form to another: canonical, Hugging Face's and the official code's flat file.

Every conversion goes through the model, so that what does not fit its configuration is refused with the tensor's name.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import torch
from torch import Tensor

from megatron.checkpoint.new_folder import new_folder, require_new
from megatron.checkpoint.official_folder import find_official_folder
from megatron.checkpoint.state import CanonicalState
from megatron.checkpoint.store import CheckpointReader, find_checkpoint, save_checkpoint
from megatron.config.schema import RunConfig
from megatron.config.sections.tokenizer import TokenizerConfig
from megatron.errors import UserError
from megatron.inference.huggingface import (
    copy_tokenizer,
    export_huggingface,
    joined_config,
    joined_tensors,
)
from megatron.inference.load import load_model
from megatron.log import get_logger
from megatron.model import LanguageModel, Pattention
from megatron.mpu.device import DTYPES

FLAT_FILE = "pytorch_model.bin"
_TOKENS = re.compile(r"(key|value)_tokens_0$")


def to_huggingface(
    source: str | Path,
    folder: str | Path,
    config: RunConfig | None = None,
    dtype: str = "fp32",
    iteration: int | None = None,
) -> None:
    """Any checkpoint to a folder that transformers loads.

    Args:
        source: whatever load_model takes.
        folder: must not exist or be empty.
        config: of an official flat file; it names the tokenizer too.
        dtype: fp32, bf16 or fp16.
        iteration: which of a run's checkpoints; default the latest.
    """
    model = load_model(source, config, iteration=iteration)
    export_huggingface(model, folder, _tokenizer_of(Path(source), config, iteration), DTYPES[dtype])


def from_huggingface(source: str | Path, root: str | Path) -> Path:
    """A folder in Hugging Face's form to a canonical checkpoint of iteration 0 under `root`, in fp32."""
    if not os.path.isfile(Path(source) / "config.json"):
        raise UserError(f"{source}: has no config.json; give a folder in Hugging Face's form")
    require_new(Path(root))
    model = load_model(source)
    return _save(model, RunConfig(model=model.config, tokenizer=copy_tokenizer(Path(source), Path(root))), Path(root))


def from_official(source: str | Path, root: str | Path, config: RunConfig) -> Path:
    """An official flat file or training folder and its configuration to a canonical checkpoint of iteration 0."""
    if not os.path.isfile(source) and find_official_folder(source) is None:
        raise UserError(f"{source}: no such file; give an official {FLAT_FILE} or global_step folder")
    require_new(Path(root))
    model = load_model(source, config)
    return _save(model, config.model_copy(update={"model": model.config}), Path(root))


def to_official(source: str | Path, target: str | Path, iteration: int | None = None) -> Path:
    """Any checkpoint to the official code's flat file, at `target`/pytorch_model.bin.

    Raises: UserError for what that file cannot say: Transformer blocks, and a tau other than the root of the number of
        tokens, which the official code always takes.
    """
    model = load_model(source, iteration=iteration)
    tensors = official_tensors(model)
    with new_folder(target) as temporary:
        torch.save(tensors, temporary / FLAT_FILE)
    return Path(target) / FLAT_FILE


def official_tensors(model: LanguageModel) -> dict[str, Tensor]:
    """The official code's flat dictionary; UserError where it cannot hold the model."""
    config = joined_config(model)
    if set(config.layer_kinds) != {"tokenformer"}:
        raise UserError("attention_config: the official flat file holds TokenFormer blocks only; use to-hf")
    for name, module in model.named_modules():
        tau = module.tau_tokens.item() if isinstance(module, Pattention) else None
        if isinstance(module, Pattention) and tau != module.num_tokens:
            raise UserError(
                f"{name}: has {module.num_tokens} tokens and tau^2 = {tau}; the official flat file cannot say so, and "
                "its code would compute another function; use to-hf"
            )
    parameters = {name: tensor for name, tensor in joined_tensors(model).items() if not name.endswith("tau_tokens")}
    return {official_name(name, config.num_layers): tensor.contiguous() for name, tensor in parameters.items()}


def official_name(canonical: str, num_layers: int) -> str:
    """The official name of a canonical one; the inverse of megatron.checkpoint.published.canonical_name."""
    part, _, rest = canonical.partition(".")
    if part == "layers":
        number, _, rest = rest.partition(".")
        return f"sequential.{int(number) + 2}." + _TOKENS.sub(r"\1_param_tokens", rest)
    prefixes = {"embedding": "0.", "final_norm": f"{num_layers + 3}.norm.", "head": f"{num_layers + 4}."}
    return f"sequential.{prefixes[part]}{rest}"


def _tokenizer_of(source: Path, config: RunConfig | None, iteration: int | None) -> TokenizerConfig | None:
    """The tokenizer of a checkpoint; None, with a line in the log, when its files are not there."""
    if config is not None:
        found = config.tokenizer
    elif os.path.isdir(source) and (folder := find_checkpoint(source, iteration)) is not None:
        found = CheckpointReader(folder, verify=False).section(TokenizerConfig)
    elif os.path.isfile(source / "tokenizer.json"):
        found = TokenizerConfig(tokenizer_type="HFTokenizer", vocab_file=str(source / "tokenizer.json"))
    else:
        return None
    files = [file for file in (found.vocab_file, found.merge_file) if file]
    missing = [file for file in files if not os.path.isfile(file)]
    if missing or not (files or found.tokenizer_type == "CharLevelTokenizer"):
        get_logger().warning(
            "no tokenizer is written: %s", f"{missing[0]} is not there" if missing else "none is named"
        )
        return None
    return found


def _save(model: LanguageModel, config: RunConfig, root: Path) -> Path:
    return save_checkpoint(root, CanonicalState(0, {}, config.flat(), {"model": model.state_dict().items()}))
