"""Folders in Hugging Face's form: what our own export and GPT-NeoX (Pythia) models have in common."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from megatron.checkpoint.new_folder import new_folder
from megatron.checkpoint.tensors import Tensors
from megatron.config.mistakes import config_error
from megatron.config.sections.model import ModelConfig, ModelSection
from megatron.config.sections.tokenizer import TokenizerConfig
from megatron.errors import UserError
from megatron.exchange.checkpoint import CheckedTensors, Checkpoint
from megatron.exchange.huggingface_weights import Weights, write_json, write_weights
from megatron.exchange.names import EMBEDDING, HEAD
from megatron.model.compatibility import check_fit, count_layers, described_model, tau_fault
from megatron.tokenizer import GPT2BPETokenizer, HFTokenizer, build_tokenizer
from megatron.tokenizer.base import END_OF_TEXT

CONFIG, TOKENIZER = "config.json", "tokenizer.json"
SHARD_BYTES = 5 * 1000**3
# Padding rows of the vocabulary that generation_config.json may list one by one.
_MOST_SUPPRESSED = 1024

NamesIn = Callable[[str], list[str]]
"""Canonical names of what is in a tensor of the folder, by its name there."""
Split = Callable[[str, Tensor], Tensor]
"""What a canonical name means of a tensor of the folder in which there is more."""


def architectures(found: Mapping[str, Any]) -> list[str]:
    """What a config.json says its model is; [] where it does not."""
    named = found.get("architectures")
    return [name for name in named if isinstance(name, str)] if isinstance(named, list) else []


class FolderTensors(CheckedTensors):
    """The tensors of a folder under canonical names, read lazily."""

    def __init__(self, folder: Path, names_in: NamesIn, split: Split | None) -> None:
        super().__init__(str(folder))
        self._weights, self._names_in, self._split = Weights(folder), names_in, split
        if not self._weights.files:
            raise UserError(f"{folder}: its weights have no tensors; get the whole folder")
        self.origins: dict[str, str] = {}
        """Canonical name -> name in the folder."""
        for theirs in self._weights.files:
            for name in names_in(theirs):
                if name in self.origins:
                    raise UserError(f"{folder}: has two tensors for {name}: {self.origins[name]} and {theirs}")
                self.origins[name] = theirs

    def names(self, kind: str) -> list[str]:
        """Canonical names of the model's tensors, as the folder lists what they are in."""
        return list(self.origins) if kind == "model" else []

    def shape(self, kind: str, name: str) -> tuple[int, ...]:
        """Full shape of a tensor."""
        shape, parts = self._weights.shape(self.origins[name]), len(self._names_in(self.origins[name]))
        return (shape[0] // parts, *shape[1:]) if shape and not shape[0] % parts else shape

    def _stored(self, name: str) -> Tensor:
        stored, is_alone = self._weights.tensor(self.origins[name]), len(self._names_in(self.origins[name])) == 1
        return stored if is_alone or self._split is None else self._split(name, stored)

    def drop_tied_head(self) -> None:
        """A head beside a tied embedding may only repeat it: which of the two was meant cannot be known."""
        head = self.origins.get(HEAD)
        same = head is None or EMBEDDING not in self.origins or torch.equal(self._stored(HEAD), self._stored(EMBEDDING))
        if not same:
            raise UserError(
                f"{Path(self._where) / CONFIG}: tie_word_embeddings: true, but {head} is another matrix than the "
                "embedding; set it to false"
            )
        self.origins.pop(HEAD, None)


def open_folder(
    folder: Path,
    keys: Mapping[str, Any],
    names_in: NamesIn,
    split: Split | None = None,
    layers_key: str = "num_hidden_layers",
) -> Checkpoint:
    """A folder with config.json and weights.

    Args:
        keys: of ModelConfig, as config.json has them.
        layers_key: what the number of layers is called there, for messages.

    Raises: UserError for a folder without these files or a damaged one.
    """
    tensors = FolderTensors(folder, names_in, split)
    source, layers = folder / CONFIG, count_layers(tensors.origins)
    if keys.get("num_layers") != layers:  # seen to before a list of a billion layers is made
        told = str(keys.get("num_layers"))[:40]
        raise UserError(f"{source}: {layers_key}: {told} does not fit the weights, which are of {layers} layers")
    config = _validated(keys, source)
    if not config.no_weight_tying:
        tensors.drop_tied_head()
    require_fit(config, tensors, folder, source)
    file = folder / TOKENIZER
    tokenizer = TokenizerConfig(tokenizer_type="HFTokenizer", vocab_file=str(file)) if file.is_file() else None
    return Checkpoint(folder, config, tensors, find_tokenizer=lambda: tokenizer)


def require_fit(config: ModelSection, tensors: Tensors, folder: Path, source: Path) -> None:
    """Raise a UserError unless the tensors in `folder` are those of the model that `source` describes."""
    try:
        model = described_model(config)
    except ValueError as error:
        raise UserError(f"{source}: describes no model: {error}") from None
    check_fit(model, tensors, str(folder))
    if fault := tau_fault(model, tensors):
        raise UserError(f"{folder} {fault}; give a model that is whole")


def _validated(keys: Mapping[str, Any], source: Path) -> ModelConfig:
    try:
        config = ModelConfig(**keys)
    except ValidationError as error:
        raise config_error(error, str(source)) from None
    if config.padded_vocab_size is None:
        raise UserError(f"{source}: the size of the vocabulary is missing; the file is not complete")
    return config


def is_tied(found: Mapping[str, Any], default: bool, source: str) -> bool:
    """tie_word_embeddings of a config.json. Raises UserError where it is not a truth value."""
    tied = found.get("tie_word_embeddings")
    if tied is not None and not isinstance(tied, bool):
        raise UserError(f"{source}: tie_word_embeddings: {str(tied)[:40]!r} is neither true nor false")
    return default if tied is None else tied


def write_folder(
    target: str | Path,
    tensors: Iterable[tuple[str, Tensor]],
    dtype: torch.dtype,
    shard_bytes: int,
    texts: Mapping[str, str | Mapping[str, Any]],
) -> None:
    """Write a folder that transformers loads; complete or not at all.

    Args:
        tensors: under the names that they have there.
        dtype: of the parameters in the files.
        shard_bytes: size from which weights are spread over several files.
        texts: the other files by name, config.json among them; an object is written as JSON.
    """
    with new_folder(target) as folder:
        for name, text in texts.items():
            if isinstance(text, str):
                (folder / name).write_text(text, encoding="utf-8")
            else:
                write_json(folder / name, text)
        write_weights(folder, ((n, t.to(dtype) if t.is_floating_point() else t) for n, t in tensors), shard_bytes)


def language_files(
    checkpoint: Checkpoint, described: Mapping[str, Any], dtype: torch.dtype
) -> dict[str, str | Mapping[str, Any]]:
    """config.json, generation_config.json and the tokenizer of a language model, by name.

    Rows of the embedding without a token are never generated.

    Args:
        checkpoint: of its tokenizers HFTokenizer and GPT2BPETokenizer are written.
        described: the model's part of config.json.
        dtype: of the parameters in the files.
    """
    config, found = checkpoint.language, checkpoint.tokenizer
    tokenizer = build_tokenizer(found) if found else None
    eod = None if tokenizer is None else tokenizer.eod_id
    special = {"bos_token_id": eod, "eos_token_id": eod, "pad_token_id": eod}
    generation: dict[str, Any] = {"do_sample": False, **special}
    used = tokenizer.vocab_size if tokenizer is not None else config.vocab_size
    rows = config.padded_vocab_size or 0
    if used is not None and 0 < rows - used <= _MOST_SUPPRESSED:
        generation["suppress_tokens"] = list(range(used, rows))
    files: dict[str, str | Mapping[str, Any]] = {
        CONFIG: {**described, "dtype": dtype_name(dtype), **special}, "generation_config.json": generation,
    }  # fmt: skip
    if isinstance(tokenizer, HFTokenizer | GPT2BPETokenizer):
        files |= _tokenizer_files(tokenizer, config.seq_length)
    return files


def dtype_name(dtype: torch.dtype) -> str:
    """`float32` and so on, as config.json says it."""
    return str(dtype).removeprefix("torch.")


def _tokenizer_files(tokenizer: HFTokenizer | GPT2BPETokenizer, seq_length: int) -> dict[str, str | Mapping[str, Any]]:
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT, "unk_token": END_OF_TEXT, "pad_token": END_OF_TEXT,
        "padding_side": "left", "model_max_length": seq_length, "clean_up_tokenization_spaces": False,
    }  # fmt: skip
    return {TOKENIZER: tokenizer._backend.to_str(pretty=True), "tokenizer_config.json": settings}
