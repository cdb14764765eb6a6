"""Opening what a growth starts from: a training checkpoint, or a model of the official code."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatron.checkpoint.form import value_fault
from megatron.checkpoint.official_folder import find_official_folder, read_official_folder
from megatron.checkpoint.published import embedding_rows, read_flat_file, to_canonical
from megatron.checkpoint.store import CheckpointReader, find_checkpoint
from megatron.checkpoint.tensors import Tensors
from megatron.config.sections.model import ModelConfig, language_section
from megatron.errors import UserError
from megatron.model import LanguageModel
from megatron.model.compatibility import check_fit, saved_model_config


class FlatTensors(Tensors):
    """Tensors of an official model; its tau_tokens are the token counts, and it has no optimizer state."""

    def __init__(self, tensors: dict[str, Tensor], config: ModelConfig) -> None:
        self._model = dict(tensors)
        for name, buffer in LanguageModel(config, device="meta").named_buffers():
            tokens = tensors[name.replace("tau_tokens", "key_tokens_0")]
            self._model[name] = torch.tensor(len(tokens), dtype=buffer.dtype)

    def names(self, kind: str) -> list[str]:
        """Names of a kind."""
        return list(self._model) if kind == "model" else []

    def shape(self, kind: str, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        return tuple(self._model[name].shape)

    def tensor(self, kind: str, name: str) -> Tensor:
        """A tensor; parameters in fp32."""
        found = self._model[name]
        return found.float() if found.is_floating_point() else found


@dataclass(frozen=True)
class Base:
    """The model that a growth starts from."""

    folder: Path
    config: ModelConfig
    tensors: Tensors
    reader: CheckpointReader | None
    """The training checkpoint; None for an official model."""


def open_base(
    path: str | Path, config: ModelConfig | None, key: str = "pretrain_partial_init", verify: bool = True
) -> Base:
    """The model in `path`, of whichever form.

    Args:
        path: a run's folder or one of its checkpoints, an official pytorch_model.bin or training folder.
        config: tells an official model's architecture; its token counts are read from the tensors.
        key: what names the path, for messages.
        verify: compare the checksums of a training checkpoint.

    Raises: UserError when there is no model or it does not fit.
    """
    path = Path(path)
    official = path if os.path.isfile(path) else find_official_folder(path)
    if official is not None:
        if config is None:
            raise UserError(f"--config: {official} holds tensors only; give the YAML files of its model")
        flat = read_flat_file(official, key) if official.is_file() else read_official_folder(official, key)
        tensors = to_canonical(flat, config.num_layers, official, key)
        counted = _with_counts_of(config, tensors, official, key)
        for name, tensor in tensors.items():
            if fault := value_fault("model", name, tensor):
                raise UserError(f"{key}: {official}: {name} {fault}; give a model that is whole")
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        check_fit(LanguageModel(counted, device="meta"), shapes, f"{key}: {path}")
        return Base(official, counted, FlatTensors(tensors, counted), None)
    folder = find_checkpoint(path, key=key) if os.path.isdir(path) else None
    if folder is None:
        raise UserError(f"{key}: no checkpoint in {path}; name a run's folder or an official pytorch_model.bin")
    reader = CheckpointReader(folder, verify, key)
    return Base(folder, language_section(saved_model_config(reader)), reader, reader)


def _with_counts_of(config: ModelConfig, tensors: dict[str, Tensor], path: Path, key: str) -> ModelConfig:
    counts = {}
    if config.padded_vocab_size is None:
        counts["padded_vocab_size"] = embedding_rows(tensors, path, key)
    for slots, part in (("qkv", "attention.query"), ("proj", "attention.proj"), ("ffn", "mlp")):
        found = [len(t) for name, t in tensors.items() if name.endswith(f".{part}.key_tokens_0")]
        if found:
            counts[f"{slots}_slot_num"] = found[0]
    if 0 in counts.values():
        raise UserError(f"{key}: {path} has a layer without tokens; give a model that is whole")
    return ModelConfig(**{**config.model_dump(), **counts, "token_segments": None})
