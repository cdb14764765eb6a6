"""Checkpoints on disk: atomic save, verification, `latest`, retention.

Saving writes a temporary folder, puts checksums in its manifest, renames it, and only then moves `latest`. A process
killed at any point leaves the previous checkpoint loadable and at most a folder whose name starts with a dot, which the
next save removes.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from megatron.checkpoint.state import (
    FORMAT,
    FORMAT_VERSION,
    TENSOR_KINDS,
    CanonicalState,
    TensorStream,
    folder_iteration,
    folder_name,
)
from megatron.errors import UserError
from megatron.files import open_own, replaced_file
from megatron.log import get_logger

SHARD_BYTES = 2 * 1024**3
LATEST = "latest"
MANIFEST = "manifest.json"
_TEMPORARY, _REPLACED = ".saving-", ".replaced-"
_YamlLoader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # libyaml's reads the same ten times as fast


def save_checkpoint(root: str | Path, state: CanonicalState, write: bool = True) -> Path:
    """Write `state` under `root` and make it the latest checkpoint.

    Every process of the run calls this, because the tensor streams may gather; one has `write` true.

    Returns: the checkpoint's folder. Raises UserError when the file system refuses (full, read-only).
    """
    target = Path(root) / folder_name(state.iteration)
    if not write:
        for kind in TENSOR_KINDS:
            for _ in state.tensors.get(kind, ()):
                pass
        return target
    try:
        _write_checkpoint(target, state)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(target.parent / f"{_TEMPORARY}{target.name}", ignore_errors=True)
        raise UserError(
            f"save: cannot write checkpoint {target}: {error}; earlier checkpoints are intact, "
            "free space or change `save` and resume"
        ) from error
    return target


def _write_checkpoint(target: Path, state: CanonicalState) -> None:
    root = target.parent
    root.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(root)
    temporary = root / f"{_TEMPORARY}{target.name}"
    temporary.mkdir()
    index = {kind: _write_tensors(temporary, kind, state.tensors.get(kind, ())) for kind in TENSOR_KINDS}
    _write_text(temporary / "train_state.json", json.dumps(dict(state.train_state), indent=1))
    _write_text(temporary / "config.yml", yaml.safe_dump(dict(state.config), sort_keys=False))
    _write_text(temporary / "environment.json", json.dumps(dict(state.environment), indent=1))
    files = {p.name: {"bytes": p.stat().st_size, "sha256": file_sha256(p)} for p in sorted(temporary.iterdir())}
    manifest = {"format": FORMAT, "version": FORMAT_VERSION, "iteration": state.iteration}
    _write_text(temporary / MANIFEST, json.dumps({**manifest, "files": files, "tensors": index}))
    _sync(temporary)
    replaced = root / f"{_REPLACED}{target.name}"
    if target.exists():
        os.rename(target, replaced)
    os.rename(temporary, target)
    set_latest(root, state.iteration)
    _remove(replaced)


def _write_tensors(folder: Path, kind: str, stream: TensorStream) -> dict[str, Any]:
    """Write a stream in files of about SHARD_BYTES; returns {name: [file, dtype, shape]}."""
    index: dict[str, Any] = {}
    for number, shard in enumerate(_shards(stream)):
        file = f"{kind}-{number:05d}.safetensors"
        save_file(shard, folder / file)
        _sync(folder / file)
        for name, tensor in shard.items():
            index[name] = [file, str(tensor.dtype).removeprefix("torch."), list(tensor.shape)]
    return index


def _shards(stream: TensorStream) -> Iterator[dict[str, Tensor]]:
    shard: dict[str, Tensor] = {}
    size = 0
    for name, tensor in stream:
        shard[name] = tensor.detach().cpu().contiguous()
        size += tensor.numel() * tensor.element_size()
        if size >= SHARD_BYTES:
            yield shard
            shard, size = {}, 0
    if shard:
        yield shard


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
    _sync(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _remove_leftovers(root: Path) -> None:
    for folder in root.glob(".*"):
        is_replaced = folder.name.startswith(_REPLACED) and (root / folder.name.removeprefix(_REPLACED)).exists()
        if folder.name.startswith(_TEMPORARY) or is_replaced:
            _remove(folder)


def _remove(path: Path) -> None:
    """Remove a folder of ours; of a link that has its name only the link."""
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)
    else:
        shutil.rmtree(path, ignore_errors=True)


def set_latest(root: Path, iteration: int) -> None:
    """Point `latest` at an iteration, atomically."""
    with replaced_file(root / LATEST) as file:
        file.write(f"{folder_name(iteration)}\n".encode())
    _sync(root)


def list_iterations(root: str | Path) -> list[int]:
    """Iterations of the complete checkpoints under `root`, ascending."""
    folders = Path(root).iterdir() if Path(root).is_dir() else ()
    found = (folder_iteration(f.name) for f in folders if (f / MANIFEST).is_file())
    return sorted(iteration for iteration in found if iteration is not None)


def remove_old(root: str | Path, keep: int, protected: Collection[int] = ()) -> list[int]:
    """Remove all but the `keep` checkpoints saved last, never those of `protected` iterations; returns what went.

    Last saved, not highest iteration: a run that was rolled back saves lower iterations than it finds.
    """

    def saved_at(iteration: int) -> int:
        return (Path(root) / folder_name(iteration) / MANIFEST).stat().st_mtime_ns

    candidates = sorted((i for i in list_iterations(root) if i not in protected), key=saved_at)
    removed = sorted(candidates[: max(0, len(candidates) - keep)])
    for iteration in removed:
        folder = Path(root) / folder_name(iteration)
        # Renamed first, so that a kill while deleting leaves no half checkpoint under a valid name.
        doomed = Path(root) / f"{_TEMPORARY}removing-{folder.name}"
        os.rename(folder, doomed)
        _remove(doomed)
    return removed


def find_checkpoint(path: str | Path, iteration: int | None = None, key: str = "load") -> Path | None:
    """The checkpoint folder meant by `path`: itself, or the `iteration` or latest one under it; None if there is none.

    `key` is what names the path, for messages.

    Raises UserError when `latest` or `iteration` names a checkpoint that is not there.
    """
    path = Path(path)
    if (path / MANIFEST).is_file() and iteration is None:
        return path
    if iteration is not None:
        name = folder_name(iteration)
    elif (path / LATEST).is_file():
        name = (path / LATEST).read_text(encoding="utf-8", errors="replace").strip()
    else:
        return None
    for folder in (path / name, path / f"{_REPLACED}{name}"):
        if (folder / MANIFEST).is_file():
            return folder
    known = ", ".join(map(str, list_iterations(path))) or "none"
    other = "set `iteration`" if key == "load" else "name the folder of one"
    raise UserError(f"{key}: {path / name} is not a complete checkpoint; iterations found there: {known}; {other}")


class FolderLock:
    """Keeps a second run from writing into the same folder; released by `close` or by the end of the process.

    Raises: UserError when another process holds it or the folder cannot be written.
    """

    def __init__(self, root: str | Path) -> None:
        try:
            Path(root).mkdir(parents=True, exist_ok=True)
            self._path = Path(root) / ".lock"
            self._file = open_own(self._path)
        except OSError as error:
            raise UserError(f"save: {root} cannot be written: {error.strerror}; choose another folder") from error
        if self._file is None:
            get_logger().warning("%s is no regular file; make sure that only one run saves there", self._path)
            return
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(
                f"save: another run is writing to {root}; stop it first, or save to another folder"
            ) from error
        except OSError:
            get_logger().warning("%s does not support file locks; make sure that only one run saves there", root)

    def close(self) -> None:
        """Release the folder, and remove it if nothing was saved in it."""
        if self._file is not None:
            self._path.unlink(missing_ok=True)
            self._file.close()
        with contextlib.suppress(OSError):
            self._path.parent.rmdir()


class CheckpointReader:
    """One checkpoint folder, read lazily: `tensor(kind, name)` maps the file and copies that tensor only.

    Args:
        verify: compare the checksums of all files; those of the small ones that are read at once always are.
        key: what names the folder, for messages.

    Raises UserError for a folder that is not a checkpoint, has an unknown version, or is damaged.
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
        self.config = self._record("config.yml", lambda text: yaml.load(text, Loader=_YamlLoader))

    def _read_manifest(self) -> dict[str, Any]:
        path = self.folder / MANIFEST
        try:
            manifest = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise UserError(f"{self._key}: {self.folder} is not a checkpoint: it has no {MANIFEST}") from None
        except OSError as error:
            raise self._unreadable(MANIFEST, error) from error
        except ValueError:
            raise self._damaged(MANIFEST, "is not valid JSON") from None
        if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
            raise UserError(f"{self._key}: {path} does not describe a {FORMAT} checkpoint")
        if not {"version", "iteration", "files", "tensors"} <= manifest.keys():
            raise self._damaged(MANIFEST, "is incomplete")
        if manifest["version"] != FORMAT_VERSION:
            raise UserError(
                f"{self._key}: {self.folder} has format version {manifest['version']}, this program reads "
                f"{FORMAT_VERSION}; use the program version that wrote it"
            )
        return manifest

    def _damaged(self, file: str, what: str) -> UserError:
        other = "load an earlier one with `iteration`" if self._key == "load" else "name an earlier one"
        return UserError(
            f"{self._key}: checkpoint {self.folder} is damaged: {file} {what}; remove the folder and {other}"
        )

    def _unreadable(self, file: str, error: OSError) -> UserError:
        reason = error.strerror or error
        return UserError(f"{self._key}: {self.folder / file} cannot be read: {reason}; check its permissions and disk")

    def _record(self, name: str, parse: Callable[[str], Any]) -> dict[str, Any]:
        """What a small file holds, whose checksum costs nothing and whose content decides about all others."""
        if name not in self._files:
            raise self._damaged(MANIFEST, f"does not list {name}")
        self._check(name)
        try:
            found = parse((self.folder / name).read_text(encoding="utf-8"))
        except OSError as error:
            raise self._unreadable(name, error) from error
        except (ValueError, yaml.YAMLError):
            raise self._damaged(name, "cannot be parsed") from None
        if not isinstance(found, dict):
            raise self._damaged(name, "does not hold keys and values")
        return found

    def verify(self, leave_out: tuple[str, ...] = ()) -> None:
        """Compare size and SHA-256 of every file with the manifest; UserError names the first that differs.

        Args:
            leave_out: kinds of tensors whose files are not read, for example `optimizer`.
        """
        prefixes = tuple(f"{kind}-" for kind in leave_out)
        for name in self._files:
            if not (prefixes and name.startswith(prefixes)):
                self._check(name)

    def _check(self, name: str) -> None:
        path, expected = self.folder / name, self._files[name]
        if not path.is_file():
            raise self._damaged(name, "is missing")
        if path.stat().st_size != expected["bytes"]:
            raise self._damaged(name, f"has {path.stat().st_size} bytes instead of {expected['bytes']}")
        try:
            checksum = file_sha256(path)
        except OSError as error:
            raise self._unreadable(name, error) from error
        if checksum != expected["sha256"]:
            raise self._damaged(name, "does not have the checksum of the manifest")

    def names(self, kind: str) -> list[str]:
        """Names of the tensors of a kind: model, optimizer or rng."""
        return list(self._index[kind])

    def shape(self, kind: str, name: str) -> tuple[int, ...]:
        """Full shape of a tensor, without reading it."""
        return tuple(self._index[kind][name][2])

    def tensor(self, kind: str, name: str) -> Tensor:
        """A whole tensor, on the CPU, with storage of its own; UserError when its file is damaged."""
        file = self._index[kind][name][0]
        try:
            if file not in self._open_files:
                self._open_files[file] = safe_open(self.folder / file, framework="pt")
            tensor: torch.Tensor = self._open_files[file].get_tensor(name)
        except (OSError, SafetensorError) as error:
            self._check(file)  # says what is wrong in most cases
            raise self._damaged(file, f"cannot be read: {error}") from error
        return tensor
