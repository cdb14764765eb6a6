"""The weights of a folder in Hugging Face's form: in one file or several, safetensors or, only read, PyTorch's."""

from __future__ import annotations

import json
import stat
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from megatron.errors import UserError
from megatron.exchange.torch_file import read_flat_file, read_state_dict
from megatron.files import read_json as read_object

WEIGHTS, _OLD_WEIGHTS = "model.safetensors", "pytorch_model.bin"
_METADATA = {"format": "pt"}
_Answer = TypeVar("_Answer")


class Weights:
    """The tensors of a folder, in one file or several, safetensors or PyTorch's; or those of a single file."""

    def __init__(self, path: Path) -> None:
        self._open: dict[str, Any] = {}
        self.folder = path.parent if path.is_file() else path
        self.files = self._in(path.name) if path.is_file() else self._find()

    def _find(self) -> dict[str, str]:
        """Tensor name -> file name."""
        for name in (WEIGHTS, _OLD_WEIGHTS):
            index = self.folder / f"{name}.index.json"
            if index.is_file():
                return self._indexed(index)
            if (self.folder / name).is_file():
                return self._in(name)
        raise UserError(f"{self.folder}: has neither {WEIGHTS} nor {_OLD_WEIGHTS}, nor an index of several such files")

    def _in(self, file: str) -> dict[str, str]:
        return dict.fromkeys(self._file(file).keys(), file)

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
            return (read_state_dict if file.endswith((".pth", ".pt")) else read_flat_file)(path, "load")
        try:
            return safe_open(path, framework="pt")
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path}: not a readable safetensors file ({error})") from None

    def _file(self, file: str) -> Any:
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
        file = self._file(self.files[name])
        if name not in file.keys():  # noqa: SIM118 -- a safetensors file is no dictionary
            raise UserError(f"{self.folder / self.files[name]}: lacks the tensor {name[:100]!r} of the index")
        try:
            return question(file)
        except Exception as error:  # of a type that torch lacks, or another one that depends on the library's version
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"{self.folder / self.files[name]}: {name[:100]!r} cannot be read ({reason})") from None


def write_weights(
    folder: Path, tensors: Iterable[tuple[str, Tensor]], shard_bytes: int, metadata: dict[str, str] | None = _METADATA
) -> None:
    """Write tensors into files of at most `shard_bytes`, or of one tensor, and for several an index.

    metadata: of each file; transformers asks for the default.
    """
    shards: list[list[str]] = []
    shard: dict[str, Tensor] = {}
    total = filled = 0

    def finish() -> None:
        _write_tensors(folder / f"{len(shards)}.part", shard, metadata)
        shards.append(list(shard))
        shard.clear()

    for name, tensor in tensors:
        if filled + tensor.nbytes > shard_bytes and shard:
            finish()
            filled = 0
        shard[name] = tensor
        filled, total = filled + tensor.nbytes, total + tensor.nbytes
    finish()
    if len(shards) == 1:
        (folder / "0.part").rename(folder / WEIGHTS)
        return
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards):
        file = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        (folder / f"{number}.part").rename(folder / file)
        weight_map |= dict.fromkeys(names, file)
    write_json(folder / f"{WEIGHTS}.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})


def _write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None) -> None:
    path.touch()
    mode = stat.S_IMODE(path.stat().st_mode)  # what the umask gives; safetensors lets only the owner read
    save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, path, metadata)
    path.chmod(mode)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON object."""
    path.write_text(json.dumps(dict(content), indent=2) + "\n", encoding="utf-8")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; UserError when there is none."""
    return read_object(path, "give a folder in Hugging Face's form")
