"""Folders in Hugging Face's form, read: our own export and GPT-NeoX (Pythia) checkpoints."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron.checkpoint.published import EMBEDDING, read_flat_file
from megatron.config.sections.model import ModelConfig
from megatron.errors import UserError
from megatron.files import read_text
from megatron.inference import gpt_neox
from megatron.model.compatibility import count_layers, described_model

ARCHITECTURE = "TokenFormerForCausalLM"
CONFIG, WEIGHTS, OLD_WEIGHTS = "config.json", "model.safetensors", "pytorch_model.bin"
_HEAD = "head.final_linear.weight"
_PREFIXES = {"model.": "", "lm_head.weight": _HEAD}
_Answer = TypeVar("_Answer")


class HuggingFaceCheckpoint:
    """A folder with config.json and weights, under canonical names and read lazily.

    Attributes:
        config: the model's.
        names: canonical names of its tensors.

    Raises: UserError for a folder without these files, a damaged one, or an architecture that is neither
        TokenFormerForCausalLM nor GPTNeoXForCausalLM.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        found = read_json(self.folder / CONFIG)
        self._weights = _Weights(self.folder)
        if not self._weights.files:
            raise UserError(f"{self.folder}: its weights have no tensors; get the whole folder")
        named = found.get("architectures")
        architectures = [name for name in named if isinstance(name, str)] if isinstance(named, list) else []
        if gpt_neox.ARCHITECTURE in architectures:
            keys, self._names_in = self._neox_keys(found), gpt_neox.canonical_names
        elif ARCHITECTURE in architectures:
            keys, self._names_in = _own_keys(found, str(self.folder / CONFIG)), _own_names
        else:
            raise UserError(
                f"{self.folder / CONFIG}: architecture {', '.join(architectures) or 'unknown'} is not supported; "
                f"{ARCHITECTURE} and {gpt_neox.ARCHITECTURE} are"
            )
        self._origin = self._origins()
        self.config = self._validated(keys)
        if not self.config.no_weight_tying:
            self._drop_tied_head()
        self.names = list(self._origin)

    def _origins(self) -> dict[str, str]:
        """Canonical name -> name in the folder."""
        origins: dict[str, str] = {}
        for theirs in self._weights.files:
            for name in self._names_in(theirs):
                if name in origins:
                    raise UserError(f"{self.folder}: has two tensors for {name}: {origins[name]} and {theirs}")
                origins[name] = theirs
        return origins

    def _drop_tied_head(self) -> None:
        """A head beside a tied embedding may only repeat it: which of the two was meant cannot be known."""
        head = self._origin.get(_HEAD)
        same = head is None or EMBEDDING not in self._origin or torch.equal(self.tensor(_HEAD), self.tensor(EMBEDDING))
        if not same:
            raise UserError(
                f"{self.folder / CONFIG}: tie_word_embeddings: true, but {head} is another matrix than the embedding; "
                "set it to false"
            )
        self._origin.pop(_HEAD, None)

    def _neox_keys(self, found: dict[str, Any]) -> dict[str, Any]:
        try:
            return gpt_neox.model_config(found, str(self.folder / CONFIG))
        except KeyError as error:
            raise UserError(f"{self.folder / CONFIG}: key {error} is missing; the file is not complete") from None
        except (TypeError, ValueError, AttributeError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"{self.folder / CONFIG}: cannot be used: {error}; give the file of a model") from None

    def _validated(self, keys: dict[str, Any]) -> ModelConfig:
        source, layers = self.folder / CONFIG, count_layers(self._origin)
        if keys.get("num_layers") != layers:  # seen to before a list of a billion layers is made
            key = "num_layers" if self._names_in is _own_names else "num_hidden_layers"
            told = str(keys.get("num_layers"))[:40]
            raise UserError(f"{source}: {key}: {told} does not fit the weights, which are of {layers} layers")
        try:
            config = ModelConfig(**keys)
        except ValidationError as error:
            first = error.errors()[0]
            reason = ".".join(map(str, first["loc"])) + f": {first['msg'].removeprefix('Value error, ')}"
            raise UserError(f"{source}: {reason.removeprefix(': ')}") from None
        if config.padded_vocab_size is None:
            raise UserError(f"{source}: the size of the vocabulary is missing; the file is not complete")
        try:
            described_model(config)
        except ValueError as error:
            raise UserError(f"{source}: describes no model: {error}") from None
        return config

    def tensor(self, name: str) -> Tensor:
        """A tensor by its canonical name, in the dtype it is stored in."""
        stored = self._weights.tensor(self._origin[name])
        is_fused = len(self._names_in(self._origin[name])) > 1
        return gpt_neox.split_fused(name, stored, self.config.num_attention_heads) if is_fused else stored

    def shape(self, name: str) -> tuple[int, ...]:
        """Its shape."""
        shape, parts = self._weights.shape(self._origin[name]), len(self._names_in(self._origin[name]))
        return (shape[0] // parts, *shape[1:]) if shape and not shape[0] % parts else shape


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; UserError when there is none."""
    try:
        content = json.loads(read_text(path, advice="give a folder in Hugging Face's form"))
    except UserError:
        raise
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not a readable JSON file ({error})") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: not a JSON object")
    return content


def _own_keys(found: dict[str, Any], source: str) -> dict[str, Any]:
    keys = {key: found[key] for key in ModelConfig.model_fields if key in found}
    keys["vocab_size"] = found.get("tokenizer_vocab_size")
    keys["no_weight_tying"] = not gpt_neox.is_tied(found, True, source)
    return keys


def _own_names(name: str) -> list[str]:
    for prefix, replacement in _PREFIXES.items():
        if name.startswith(prefix):
            return [replacement + name.removeprefix(prefix)]
    return [name]


class _Weights:
    """The tensors of a folder, in one file or several, safetensors or PyTorch's."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files = self._find()
        self._open: dict[str, Any] = {}

    def _find(self) -> dict[str, str]:
        """Tensor name -> file name."""
        for name in (WEIGHTS, OLD_WEIGHTS):
            index = self.folder / f"{name}.index.json"
            if index.is_file():
                return self._indexed(index)
            if (self.folder / name).is_file():
                self._open = {name: self._read(name)}
                return dict.fromkeys(self._open[name].keys(), name)
        raise UserError(f"{self.folder}: has neither {WEIGHTS} nor {OLD_WEIGHTS}, nor an index of several such files")

    def _indexed(self, index: Path) -> dict[str, str]:
        files = read_json(index).get("weight_map")
        if not isinstance(files, dict) or not all(isinstance(file, str) for file in files.values()):
            raise UserError(f"{index}: has no weight_map of tensors and files; write the folder anew")
        for file in dict.fromkeys(files.values()):
            if Path(file).name != file or file in ("", "..") or not file.isprintable():
                raise UserError(f"{index}: names {file[:100]!r}: outside its folder, or no file name; get it anew")
            if not (self.folder / file).is_file():
                raise UserError(f"{index}: names {file[:100]}, which is not there; get the whole folder")
        return files

    def _read(self, file: str) -> Any:
        path = self.folder / file
        if not file.endswith(".safetensors"):
            return read_flat_file(path)
        try:
            return safe_open(path, framework="pt")
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path}: not a readable safetensors file ({error})") from None

    def _file(self, name: str) -> Any:
        file = self.files[name]
        if file not in self._open:
            self._open[file] = self._read(file)
        return self._open[file]

    def tensor(self, name: str) -> Tensor:
        return self._ask(name, lambda file: file[name] if isinstance(file, dict) else file.get_tensor(name))

    def shape(self, name: str) -> tuple[int, ...]:
        return self._ask(
            name,
            lambda file: tuple(file[name].shape if isinstance(file, dict) else file.get_slice(name).get_shape()),
        )

    def _ask(self, name: str, question: Callable[[Any], _Answer]) -> _Answer:
        """What the file of this tensor says."""
        file = self._file(name)
        if name not in file.keys():  # noqa: SIM118 -- a safetensors file is no dictionary
            raise UserError(f"{self.folder / self.files[name]}: lacks the tensor {name[:100]!r} of the index")
        try:
            return question(file)
        except Exception as error:  # of a type that torch lacks, or another one that depends on the library's version
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"{self.folder / self.files[name]}: {name[:100]!r} cannot be read ({reason})") from None
