"""What `--model_args` of the lm_eval command may say about a TokenFormer, and the adapter made from it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from megatron.checkpoint.store import CheckpointReader, find_checkpoint
from megatron.config import load_config
from megatron.config.schema import TokenizerConfig
from megatron.errors import UserError
from megatron.inference.load import load_model
from megatron.inference.ranks import DataRanks
from megatron.tokenizer import build_tokenizer

if TYPE_CHECKING:
    from eval_tasks.adapter import TokenFormerLM

_DTYPES = {
    "auto": None, "float32": torch.float32, "fp32": torch.float32, "bfloat16": torch.bfloat16, "bf16": torch.bfloat16,
    "float16": torch.float16, "fp16": torch.float16,
}  # fmt: skip


def load_adapter(
    cls: type[TokenFormerLM],
    pretrained: str,
    config: str | None = None,
    tokenizer: str | None = None,
    dtype: str = "auto",
    device: str | None = None,
    batch_size: int | str = 1,
    max_batch_size: int | None = None,
    max_length: int | None = None,
) -> TokenFormerLM:
    """An adapter around a checkpoint.

    Args:
        pretrained: a run's folder of checkpoints or one of them, a folder in Hugging Face's form, or an official
            pytorch_model.bin, which needs `config`.
        config: YAML file of the model and its tokenizer.
        tokenizer: a tokenizer.json; default the one of the config, the checkpoint or the folder.
        dtype: of the parameters; auto is fp32.
        device: default the GPU if there is one; a machine without one uses the CPU whatever it says.
        batch_size: a number or auto (lm-eval's auto:N counts as auto).
        max_batch_size: taken for lm-eval's sake; auto finds its limit by itself.

    Raises: UserError for what cannot be found, read or understood.
    """
    if dtype not in _DTYPES:
        raise UserError(f"dtype: '{dtype}' is not supported; choose one of {', '.join(_DTYPES)}")
    run = load_config(config) if config else None
    # lm_eval asks for cuda unless told otherwise, whether there is a GPU or not.
    place = (device or "cuda") if torch.cuda.is_available() else "cpu"
    model = load_model(pretrained, run, _DTYPES[dtype], place)
    if tokenizer:
        described = TokenizerConfig(tokenizer_type="HFTokenizer", vocab_file=tokenizer)
    else:
        described = run.tokenizer if run else tokenizer_of(Path(pretrained))
    size = "auto" if str(batch_size).startswith("auto") else int(batch_size)
    return cls(model, build_tokenizer(described), size, max_length, ranks=DataRanks.of_world())  # type: ignore[arg-type]


def tokenizer_of(path: Path) -> TokenizerConfig:
    """The tokenizer that a checkpoint was trained with, or that lies in a folder; UserError when there is none."""
    if (path / "tokenizer.json").is_file():
        return TokenizerConfig(tokenizer_type="HFTokenizer", vocab_file=str(path / "tokenizer.json"))
    folder = find_checkpoint(path) if path.is_dir() else None
    if folder is None:
        raise UserError(f"tokenizer: {path} has none; add tokenizer=tokenizer.json or config=YAML to --model_args")
    saved: dict[str, Any] = CheckpointReader(folder, verify=False).config
    return TokenizerConfig(**{key: saved[key] for key in TokenizerConfig.model_fields if key in saved})
