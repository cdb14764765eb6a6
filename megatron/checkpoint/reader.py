"""Reads a checkpoint folder, and finds out whether it is whole."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron.checkpoint.form import (
    CHECKSUM,
    SAFETENSORS_DTYPES,
    dtype_name,
    is_plain,
    manifest_checksum,
    manifest_fault,
    train_state_fault,
    value_fault,
)
from megatron.checkpoint.state import FORMAT, FORMAT_VERSION, MANIFEST, folder_iteration
from megatron.config.mistakes import config_error
from megatron.errors import UserError

SectionType = TypeVar("SectionType", bound=BaseModel)
_YamlLoader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # libyaml's reads the same ten times as fast
_MAX_DEPTH = 64


class DamagedCheckpoint(UserError):
    """A checkpoint is not what was saved; an earlier one may be.

    fault: the message without advice.
    """

    def __init__(self, fault: str, advice: str) -> None:
        super().__init__(f"{fault}; {advice}")
        self.fault = fault


class CheckpointReader:
    """One checkpoint folder, read lazily: `tensor(kind, name)` maps the file and copies that tensor only.

    Manifest, train state and configuration are checked at once, against each other too.

    Args:
        verify: look at all files and all values, see `verify`.
        key: what names the folder, for messages.

    Raises: DamagedCheckpoint, a UserError, for a folder that is damaged; UserError for one that is not a checkpoint,
        has an unknown version or cannot be read.
    """

    def __init__(self, folder: str | Path, verify: bool = True, key: str = "load") -> None:
        self.folder = Path(folder)
        self._key = key
        manifest = self._read_manifest()
        self.iteration: int = manifest["iteration"]
        self._files: dict[str, Any] = manifest["files"]
        self._index: dict[str, Any] = manifest["tensors"]
        self._open_files: dict[str, Any] = {}
        if verify:
            self.verify()
        self.train_state = self._record("train_state.json", json.loads)
        if fault := train_state_fault(self.train_state, self.iteration):
            raise self.damaged("train_state.json", fault)
        self.config = self._record("config.yml", _parse_config)

    def _read_manifest(self) -> dict[str, Any]:
        path = self.folder / MANIFEST
        try:
            manifest = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise UserError(f"{self._key}: {self.folder} is not a checkpoint: it has no {MANIFEST}") from None
        except OSError as error:
            raise self._unreadable(MANIFEST, error) from error
        except (ValueError, RecursionError):
            raise self.damaged(MANIFEST, "is not valid JSON") from None
        if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
            raise self.damaged(MANIFEST, f"does not describe a {FORMAT} checkpoint")
        if not is_plain(manifest):
            raise self.damaged(MANIFEST, "is nested too deeply")
        if CHECKSUM in manifest and manifest[CHECKSUM] != manifest_checksum(manifest):
            raise self.damaged(MANIFEST, "does not have its own checksum")
        if manifest.get("version") != FORMAT_VERSION:
            raise UserError(
                f"{self._key}: {self.folder} has format version {manifest.get('version')}, this program reads "
                f"{FORMAT_VERSION}; use the program version that wrote it"
            )
        if fault := manifest_fault(manifest):
            raise self.damaged(MANIFEST, fault)
        if folder_iteration(self.folder.name) not in (None, manifest["iteration"]):
            raise self.damaged(MANIFEST, f"is of iteration {manifest['iteration']}")
        return manifest

    def damaged(self, file: str, what: str) -> DamagedCheckpoint:
        """The error that says what is wrong with a file of this checkpoint."""
        other = "name another one with `iteration`" if self._key == "load" else "name another one"
        return DamagedCheckpoint(f"{self._key}: checkpoint {self.folder} is damaged: {file} {what}", other)

    def _unreadable(self, file: str, error: OSError) -> UserError:
        reason = error.strerror or error
        return UserError(f"{self._key}: {self.folder / file} cannot be read: {reason}; check its permissions and disk")

    def _record(self, name: str, parse: Callable[[str], Any]) -> dict[str, Any]:
        """What a small file holds, whose checksum costs nothing and whose content decides about all others."""
        self._check(name)
        try:
            found = parse((self.folder / name).read_text(encoding="utf-8"))
        except OSError as error:
            raise self._unreadable(name, error) from error
        except (ValueError, RecursionError, yaml.YAMLError):
            raise self.damaged(name, "cannot be parsed") from None
        if not isinstance(found, dict) or not all(isinstance(key, str) for key in found):
            raise self.damaged(name, "does not hold keys and values")
        return found

    def section(self, cls: type[SectionType]) -> SectionType:
        """A section of the saved configuration, for example ModelConfig; its keys only. Raises DamagedCheckpoint."""
        try:
            return cls(**{key: self.config[key] for key in cls.model_fields if key in self.config})
        except ValidationError as error:
            reason = str(config_error(error, ""))[:280]
            raise self.damaged("config.yml", f"cannot be used: {reason}") from None
        except (TypeError, OverflowError, MemoryError, RecursionError):
            raise self.damaged("config.yml", f"has impossible values for {cls.__name__}") from None

    def verify(self, *kinds: str) -> None:
        """Compare files with the manifest, and look at values; DamagedCheckpoint names the first mistake.

        Args:
            kinds: of tensors whose files are read, for example `model`; default all.
        """
        looked_at = [kind for kind in self._index if not kinds or kind in kinds]
        left_out = tuple(f"{kind}-" for kind in self._index if kind not in looked_at)
        for name in self._files:
            if not name.startswith(left_out):
                self._check(name)
        for kind in looked_at:
            self._check_tensors(kind)

    def _check(self, name: str) -> None:
        path, expected = self.folder / name, self._files[name]
        if not path.is_file():
            raise self.damaged(name, "is missing")
        try:
            size = path.stat().st_size
            checksum = file_sha256(path) if size == expected["bytes"] else ""
        except OSError as error:
            raise self._unreadable(name, error) from error
        if size != expected["bytes"]:
            raise self.damaged(name, f"has {size} bytes instead of {expected['bytes']}")
        if checksum != expected["sha256"]:
            raise self.damaged(name, "does not have the checksum of the manifest")

    def _check_tensors(self, kind: str) -> None:
        """Do the files of a kind hold the manifest's tensors and no others, all with values to go on from?"""
        by_file: dict[str, set[str]] = {}
        for name, entry in self._index[kind].items():
            by_file.setdefault(entry[0], set()).add(name)
        for file, names in by_file.items():
            found = set(self._opened(file).keys())
            if found != names:
                name = min(found ^ names)
                raise self.damaged(file, f"{'holds' if name in found else 'lacks'} {name[:80]}, unlike the manifest")
            for name in sorted(names):
                if fault := value_fault(kind, name, self.tensor(kind, name)):
                    raise self.damaged(file, f"cannot be gone on from: {name[:80]} {fault}")
            del self._open_files[file]

    def names(self, kind: str) -> list[str]:
        """Names of the tensors of a kind; none of a kind that is not there."""
        return list(self._index.get(kind, ()))

    def shape(self, kind: str, name: str) -> tuple[int, ...]:
        """Full shape of a tensor, without reading it."""
        return tuple(self._index[kind][name][2])

    def tensor(self, kind: str, name: str) -> Tensor:
        """A whole tensor, on the CPU, with storage of its own; DamagedCheckpoint when its file is damaged."""
        return self._read(kind, name, lambda file: file.get_tensor(name))

    def part(self, kind: str, name: str, *ranges: slice) -> Tensor:
        """A range of the first dimensions of a tensor, mapped from its file. Raises what `tensor` does."""
        return self._read(kind, name, lambda file: file.get_slice(name)[ranges])

    def _read(self, kind: str, name: str, read: Callable[[Any], Tensor]) -> Tensor:
        file, dtype, shape = self._index[kind][name]
        try:
            found = self._opened(file).get_slice(name)
            if found.get_dtype() != SAFETENSORS_DTYPES[dtype] or found.get_shape() != shape:
                raise self.damaged(file, f"has {name[:80]} in another dtype or shape than the manifest")
            tensor = read(self._open_files[file])
        except (OSError, SafetensorError) as error:
            self._check(file)  # says what is wrong in most cases
            raise self.damaged(file, f"cannot be read: {error}") from error
        assert dtype_name(tensor) == dtype
        return tensor

    def _opened(self, file: str) -> Any:
        """The safetensors file, opened once. Raises what `tensor` does."""
        if file not in self._open_files:
            try:
                self._open_files[file] = safe_open(self.folder / file, framework="pt")
            except (OSError, SafetensorError) as error:
                self._check(file)
                raise self.damaged(file, f"cannot be read: {error}") from error
        return self._open_files[file]


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _parse_config(text: str) -> Any:
    """config.yml; ValueError where it is nested or repeated beyond what a configuration is."""
    depth = 0
    for event in yaml.parse(text, Loader=_YamlLoader):  # libyaml's composer would overflow the stack
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > _MAX_DEPTH:
            raise ValueError("nested too deeply")
    found = yaml.load(text, Loader=_YamlLoader)  # noqa: S506  (a SafeLoader)
    if not is_plain(found):
        raise ValueError("too many values")
    return found
