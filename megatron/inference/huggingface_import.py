"""Folders in Hugging Face's form, read: our own export and GPT-NeoX (Pythia) checkpoints."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron.checkpoint.published import read_flat_file
from megatron.config.schema import ModelConfig
from megatron.errors import UserError
from megatron.files import read_text
from megatron.inference import gpt_neox

ARCHITECTURE = "TokenFormerForCausalLM"
CONFIG, WEIGHTS, OLD_WEIGHTS = "config.json", "model.safetensors", "pytorch_model.bin"
_PREFIXES = {"model.": "", "lm_head.weight": "head.final_linear.weight"}


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
        named = found.get("architectures")
        architectures = [name for name in named if isinstance(name, str)] if isinstance(named, list) else []
        if gpt_neox.ARCHITECTURE in architectures:
            keys, self._names_in = self._neox_keys(found), gpt_neox.canonical_names
        elif ARCHITECTURE in architectures:
            keys, self._names_in = _own_keys(found), _own_names
        else:
            raise UserError(
                f"{self.folder / CONFIG}: architecture {', '.join(architectures) or 'unknown'} is not supported; "
                f"{ARCHITECTURE} and {gpt_neox.ARCHITECTURE} are"
            )
        self.config = self._validated(keys)
        self._origin = {name: theirs for theirs in self._weights.files for name in self._names_in(theirs)}
        if not self.config.no_weight_tying:
            self._origin.pop("head.final_linear.weight", None)
        self.names = list(self._origin)

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
        try:
            return ModelConfig(**keys)
        except ValidationError as error:
            first = error.errors()[0]
            reason = ".".join(map(str, first["loc"])) + f": {first['msg'].removeprefix('Value error, ')}"
            raise UserError(f"{self.folder / CONFIG}: {reason.removeprefix(': ')}") from None

    def tensor(self, name: str) -> Tensor:
        """A tensor by its canonical name, in the dtype it is stored in."""
        stored = self._weights.tensor(self._origin[name])
        is_fused = len(self._names_in(self._origin[name])) > 1
        return gpt_neox.split_fused(name, stored, self.config.num_attention_heads) if is_fused else stored

    def shape(self, name: str) -> tuple[int, ...]:
        """Its shape."""
        shape = self._weights.shape(self._origin[name])
        return (shape[0] // len(self._names_in(self._origin[name])), *shape[1:]) if shape else ()


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


def _own_keys(found: dict[str, Any]) -> dict[str, Any]:
    keys = {key: found[key] for key in ModelConfig.model_fields if key in found}
    keys["vocab_size"] = found.get("tokenizer_vocab_size")
    keys["no_weight_tying"] = not found.get("tie_word_embeddings", True)
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
                files = read_json(index).get("weight_map")
                if not isinstance(files, dict) or not all(isinstance(file, str) for file in files.values()):
                    raise UserError(f"{index}: has no weight_map of tensors and files; write the folder anew")
                if any(Path(file).name != file for file in files.values()):
                    raise UserError(f"{index}: names a file outside its folder")
                return files
            if (self.folder / name).is_file():
                self._open = {name: self._read(name)}
                return dict.fromkeys(self._open[name].keys(), name)
        raise UserError(f"{self.folder}: has neither {WEIGHTS} nor {OLD_WEIGHTS}, nor an index of several such files")

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
        file = self._file(name)
        read: Callable[[str], Tensor] = file.__getitem__ if isinstance(file, dict) else file.get_tensor
        try:
            return read(name)
        except (KeyError, SafetensorError):
            raise UserError(f"{self.folder / self.files[name]}: lacks the tensor {name} of the index") from None

    def shape(self, name: str) -> tuple[int, ...]:
        file = self._file(name)
        return tuple(self.tensor(name).shape if isinstance(file, dict) else file.get_slice(name).get_shape())
