"""Checkpoints on disk: atomic save, `latest`, retention, finding one.

Saving writes a temporary folder, puts checksums in its manifest, renames it, and only then moves `latest`. A process
killed at any point leaves the previous checkpoint loadable and at most a folder whose name starts with a dot, which the
next save removes.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
from collections.abc import Collection
from pathlib import Path

import yaml
from safetensors import SafetensorError

from megatron.checkpoint.form import CHECKSUM, manifest_checksum, train_state_fault
from megatron.checkpoint.lock import FolderLock
from megatron.checkpoint.reader import CheckpointReader, DamagedCheckpoint, file_sha256
from megatron.checkpoint.state import (
    FORMAT,
    FORMAT_VERSION,
    MANIFEST,
    CanonicalState,
    folder_iteration,
    folder_name,
)
from megatron.checkpoint.writer import BadValues, write_tensors, write_text
from megatron.errors import UserError
from megatron.files import read_errors, replaced_file

__all__ = [
    "CheckpointReader", "DamagedCheckpoint", "FolderLock", "checkpoint_folder", "file_sha256", "find_checkpoint",
    "latest_name", "list_iterations", "remove_old", "save_checkpoint", "set_aside", "set_latest",
]  # fmt: skip

LATEST = "latest"
_TEMPORARY, _REPLACED, _DAMAGED = ".saving-", ".replaced-", "damaged-"
_LONGEST_NAME = 255


def save_checkpoint(root: str | Path, state: CanonicalState, write: bool = True) -> Path:
    """Write `state` under `root` and make it the latest checkpoint.

    Every process of the run calls this, because the pieces may be gathered; one has `write` true.

    Returns: the checkpoint's folder. Raises UserError when the file system refuses (full, read-only) or a tensor has
        values that are not finite; what was there before is then as it was.
    """
    target = Path(root) / folder_name(state.iteration)
    if not write:
        for _ in state.pieces:
            pass
        return target
    try:
        _write_checkpoint(target, state)
    except (OSError, SafetensorError, BadValues) as error:
        shutil.rmtree(target.parent / f"{_TEMPORARY}{target.name}", ignore_errors=True)
        if isinstance(error, BadValues):
            raise UserError(
                f"save: checkpoint {target} is not written: {error}; earlier checkpoints are intact, resume from one "
                "with a smaller lr, a larger eps or another seed"
            ) from error
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
    _write_files(temporary, state)
    replaced = root / f"{_REPLACED}{target.name}"
    if os.path.lexists(target):
        os.rename(target, replaced)
    os.rename(temporary, target)
    set_latest(root, state.iteration)
    _remove(replaced)


def _write_files(folder: Path, state: CanonicalState) -> None:
    if fault := train_state_fault(state.train_state, state.iteration):
        raise BadValues(f"train_state.json {fault}")
    index, files = write_tensors(folder, state.pieces)
    texts = {
        "train_state.json": json.dumps(dict(state.train_state), indent=1),
        "config.yml": yaml.safe_dump(dict(state.config), sort_keys=False),
        "environment.json": json.dumps(dict(state.environment), indent=1),
    }
    files.update({name: write_text(folder / name, text) for name, text in texts.items()})
    manifest = {"format": FORMAT, "version": FORMAT_VERSION, "iteration": state.iteration}
    manifest |= {"files": dict(sorted(files.items())), "tensors": index}
    manifest[CHECKSUM] = manifest_checksum(manifest)
    write_text(folder / MANIFEST, json.dumps(manifest))
    _sync(folder)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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


def latest_name(root: str | Path, key: str = "load") -> str | None:
    """What `latest` says: the name of a folder beside it; None without such a file, "" where it names none.

    Raises UserError when it cannot be read.
    """
    path = Path(root) / LATEST
    try:
        if not path.is_file():
            return None
        with path.open("rb") as file:
            name = file.read(_LONGEST_NAME + 2).decode("utf-8", errors="replace").strip()
    except OSError as error:
        raise UserError(f"{key}: {path} cannot be read: {error.strerror}; check its permissions and disk") from error
    return name if folder_iteration(name) is not None else ""


def list_iterations(root: str | Path) -> list[int]:
    """Iterations of the complete checkpoints under `root`, ascending."""
    folders = Path(root).iterdir() if Path(root).is_dir() else ()
    found = (folder_iteration(f.name) for f in folders if (f / MANIFEST).is_file())
    return sorted(iteration for iteration in found if iteration is not None)


def checkpoint_folder(root: str | Path, iteration: int) -> Path | None:
    """The folder of an iteration, also where a save that would have replaced it was killed; None without one."""
    name = folder_name(iteration)
    folders = (Path(root) / name, Path(root) / f"{_REPLACED}{name}")
    return next((folder for folder in folders if (folder / MANIFEST).is_file()), None)


def set_aside(folder: Path) -> Path | None:
    """Rename a damaged checkpoint so that nothing takes it for one; its new name, None where it cannot be renamed."""
    names = (f"{_DAMAGED}{folder.name}" + (f"-{n}" if n > 1 else "") for n in itertools.count(1))
    target = next(path for path in map(folder.with_name, names) if not os.path.lexists(path))
    with contextlib.suppress(OSError):
        os.rename(folder, target)
        return target
    return None


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

    Raises UserError when `latest` or `iteration` names a checkpoint that is not there, or the path cannot be read.
    """
    with read_errors(f"{key}: {path}"):
        return _found_checkpoint(Path(path), iteration, key)


def _found_checkpoint(path: Path, iteration: int | None, key: str) -> Path | None:
    if (path / MANIFEST).is_file() and iteration is None:
        return path
    name = folder_name(iteration) if iteration is not None else latest_name(path, key)
    if name is None:
        return None
    number = folder_iteration(name)
    if number is not None and (folder := checkpoint_folder(path, number)) is not None:
        return folder
    known = ", ".join(map(str, list_iterations(path))) or "none"
    other = "set `iteration`" if key == "load" else "name the folder of one"
    what = f"{path / name} is not a complete checkpoint" if name else f"{path / LATEST} does not name a checkpoint"
    raise UserError(f"{key}: {what}; iterations found there: {known}; {other}")
