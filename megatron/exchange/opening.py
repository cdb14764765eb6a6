"""The one door: a path to an open checkpoint, whatever its form."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from megatron.config.schema import RunConfig
from megatron.config.sections.model import ModelSection
from megatron.errors import UserError
from megatron.exchange import canonical, gpt_neox, huggingface, huggingface_image, official, timm_vit
from megatron.exchange.checkpoint import Checkpoint
from megatron.files import read_errors


class Format(Protocol):
    """A form that checkpoints have on disk: one module of this package."""

    def matches(self, path: Path, iteration: int | None, key: str) -> Path | None:
        """What of this form is meant by `path`: itself, or the `iteration` or latest one under it; None if nothing."""

    def open(self, path: Path, config: RunConfig | ModelSection | None, key: str) -> Checkpoint:
        """Open what `matches` gave."""


# A folder of weights with a config.json is Hugging Face's, though its files may have the official names.
FORMATS: tuple[Format, ...] = (gpt_neox, timm_vit, huggingface_image, huggingface, official, canonical)


def open_checkpoint(
    path: str | Path, config: RunConfig | ModelSection | None = None, iteration: int | None = None, key: str = "load"
) -> Checkpoint:
    """Open a checkpoint: its sizes are checked against its tensors, which are read when they are asked for.

    Args:
        path: a training checkpoint (its folder, or that of all of a run's), the official code's flat
            `pytorch_model.bin` or training folder, a folder in Hugging Face's form: an export, or a GPT-NeoX (Pythia)
            model, or a Vision Transformer of timm: a folder of its hub, or a .safetensors file.
        config: tells the architecture of an official model, whose files hold tensors only, and whose token counts are
            those of the tensors; and that of a .safetensors file. Other forms say for themselves what they are.
        iteration: which of a run's checkpoints; default the latest.
        key: the flag or key that named the path, for messages.

    Raises: UserError when there is no checkpoint, it is damaged, or it does not fit the configuration.
    """
    form, found = _find(path, iteration, key)
    return form.open(found, config, key)


def checkpoint_path(path: str | Path, iteration: int | None = None, key: str = "load") -> Path:
    """The file or folder that `open_checkpoint` would open. Raises UserError when there is none."""
    return _find(path, iteration, key)[1]


def _find(path: str | Path, iteration: int | None, key: str) -> tuple[Format, Path]:
    with read_errors(f"{key}: {path}"):
        for form in FORMATS:
            if (found := form.matches(Path(path), iteration, key)) is not None:
                return form, found
    raise UserError(
        f"{key}: no checkpoint in {path}; train first, or name another folder or an official pytorch_model.bin"
    )
