"""Reads a checkpoint folder, and finds out whether it is whole.

Tensors are mapped from their files: what is asked for is read, and no more, whichever parts it is in.
"""

from __future__ import annotations

import hashlib
import heapq
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
import yaml
from pydantic import BaseModel, ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron.checkpoint.form import (
    CHECKSUM,
    MOST_IN_MANIFEST,
    SAFETENSORS_DTYPES,
    dtype_name,
    is_plain,
    manifest_checksum,
    manifest_fault,
    places_of,
    train_state_fault,
    value_fault,
)
from megatron.checkpoint.pieces import Box, common_box, key_of, slices
from megatron.checkpoint.state import FORMAT, FORMAT_VERSIONS, MANIFEST, folder_iteration
from megatron.config.mistakes import config_error
from megatron.errors import UserError

SectionType = TypeVar("SectionType", bound=BaseModel)
_YamlLoader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # libyaml's reads the same ten times as fast
_MAX_DEPTH = 64
_FILES_AT_ONCE = 4


class DamagedCheckpoint(UserError):
    """A checkpoint is not what was saved; an earlier one may be.

    fault: the message without advice.
    """

    def __init__(self, fault: str, advice: str) -> None:
        super().__init__(f"{fault}; {advice}")
        self.fault, self._advice = fault, advice

    def __reduce__(self) -> tuple[Any, ...]:
        return DamagedCheckpoint, (self.fault, self._advice)


# Files of a run of several processes, each of which has written some: kind, rank, number.
_WRITTEN_BY = re.compile(r"[a-z0-9_]+-(\d{5,9})-\d{5,9}\.safetensors")


class _Part(NamedTuple):
    """Where a part of a tensor is."""

    file: str
    key: str
    dtype: str
    box: Box


def _parts(name: str, entry: Sequence[Any]) -> Iterator[_Part]:
    """Where a tensor is, from its entry in the manifest."""
    _, dtype, shape = entry
    for file, offset, size in places_of(entry):
        yield _Part(file, key_of(name, shape, offset, size), dtype, (tuple(offset), tuple(size)))


def _by_file(index: Mapping[str, Sequence[Any]]) -> dict[str, dict[str, _Part]]:
    """file -> name in it -> part, of all tensors of a kind."""
    found: dict[str, dict[str, _Part]] = {}
    for name, entry in index.items():
        for part in _parts(name, entry):
            found.setdefault(part.file, {})[part.key] = part
    return found


def _as_box(shape: Sequence[int], ranges: Sequence[slice]) -> Box:
    """Ranges of the first dimensions of a tensor, and all of the others."""
    bounds = [whole.indices(size) for whole, size in zip(ranges, shape, strict=False)]
    bounds += [(0, size, 1) for size in shape[len(ranges) :]]
    return tuple(start for start, _, _ in bounds), tuple(max(0, stop - start) for start, stop, _ in bounds)


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
        if not is_plain(manifest, MOST_IN_MANIFEST):
            raise self.damaged(MANIFEST, "is nested too deeply")
        if CHECKSUM in manifest and manifest[CHECKSUM] != manifest_checksum(manifest):
            raise self.damaged(MANIFEST, "does not have its own checksum")
        if manifest.get("version") not in FORMAT_VERSIONS:
            raise UserError(
                f"{self._key}: {self.folder} has format version {manifest.get('version')}, this program reads "
                f"{' and '.join(map(str, FORMAT_VERSIONS))}; use the program version that wrote it"
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

    def verify(self, *kinds: str, share: tuple[int, int] = (0, 1)) -> None:
        """Compare files with the manifest, and look at values; DamagedCheckpoint names the first mistake.

        Args:
            kinds: of tensors whose files are read, for example `model`; default all.
            share: (i, n) for the i-th of n processes that look at a part of the files each, between them at all.
        """
        mine = self._files_of(*share)
        looked_at = {kind: _by_file(index) for kind, index in self._index.items() if not kinds or kind in kinds}
        left_out = tuple(f"{kind}-" for kind in self._index if kind not in looked_at)
        parts = {file: (kind, found) for kind, files in looked_at.items() for file, found in files.items()}

        def look_at(file: str) -> None:
            self._check(file)
            if file in parts:
                kind, found = parts[file]
                self._check_tensors(kind, file, found)

        # Disks and hashes are each fast enough to wait for the other.
        with ThreadPoolExecutor(_FILES_AT_ONCE) as threads:
            files = [file for file in self._files if file in mine and not file.startswith(left_out)]
            for _ in threads.map(look_at, files):
                pass

    def _files_of(self, number: int, processes: int) -> set[str]:
        """The files that one of `processes` is to read: those that it wrote, where as many have written them."""
        written = {name: int(match[1]) for name in self._files if (match := _WRITTEN_BY.fullmatch(name))}
        if written and max(written.values()) + 1 == processes:
            return {name for name in self._files if written.get(name, 0) == number}
        loads = [(0, process) for process in range(processes)]
        mine = set()
        for name, entry in sorted(self._files.items(), key=lambda item: -item[1]["bytes"]):
            load, least = loads[0]
            heapq.heapreplace(loads, (load + entry["bytes"], least))
            if least == number:
                mine.add(name)
        return mine

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

    def _check_tensors(self, kind: str, file: str, parts: dict[str, _Part]) -> None:
        """Does a file hold the manifest's parts of tensors and no others, all with values to go on from?"""
        found = set(self._opened(file).keys())
        if found != parts.keys():
            name = min(found ^ parts.keys())
            raise self.damaged(file, f"{'holds' if name in found else 'lacks'} {name[:80]}, unlike the manifest")
        for key in sorted(parts):
            if fault := value_fault(kind, key, self._read_part(parts[key])):
                raise self.damaged(file, f"cannot be gone on from: {key[:80]} {fault}")
        del self._open_files[file]

    def names(self, kind: str) -> list[str]:
        """Names of the tensors of a kind; none of a kind that is not there."""
        return list(self._index.get(kind, ()))

    def shape(self, kind: str, name: str) -> tuple[int, ...]:
        """Full shape of a tensor, without reading it."""
        return tuple(self._index[kind][name][2])

    def tensor(self, kind: str, name: str) -> Tensor:
        """A whole tensor, on the CPU, with storage of its own; DamagedCheckpoint when its file is damaged."""
        return self.part(kind, name)

    def part(self, kind: str, name: str, *ranges: slice) -> Tensor:
        """A range of the first dimensions of a tensor, put together from its parts. Raises what `tensor` does."""
        _, dtype, shape = self._index[kind][name]
        wanted = _as_box(shape, ranges)
        found = [(part, box) for part in _parts(name, self._index[kind][name]) if (box := common_box(part.box, wanted))]
        if len(found) == 1 and found[0][1] == wanted:
            return self._read_part(found[0][0], wanted)
        whole = torch.empty(wanted[1], dtype=getattr(torch, dtype))
        for part, box in found:
            whole[slices(box, wanted[0])] = self._read_part(part, box)
        return whole

    def _read_part(self, part: _Part, box: Box | None = None) -> Tensor:
        """A box of a tensor that lies within one of its parts; default all of that."""
        box = box or part.box
        try:
            found = self._opened(part.file).get_slice(part.key)
            if found.get_dtype() != SAFETENSORS_DTYPES[part.dtype] or tuple(found.get_shape()) != part.box[1]:
                raise self.damaged(part.file, f"has {part.key[:80]} in another dtype or shape than the manifest")
            if box == part.box:
                tensor = self._open_files[part.file].get_tensor(part.key)
            else:
                tensor = found[slices(box, part.box[0])]
        except (OSError, SafetensorError) as error:
            self._check(part.file)  # says what is wrong in most cases
            raise self.damaged(part.file, f"cannot be read: {error}") from error
        assert dtype_name(tensor) == part.dtype
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
