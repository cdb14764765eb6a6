"""A run's checkpoints on disk: atomic save, `latest`, retention, finding one.

Saving writes a temporary folder, puts checksums in its manifest, renames it, and only then moves `latest`. A process
killed at any point leaves the previous checkpoint loadable and at most a folder whose name starts with a dot, which the
next run in this folder removes. Each process of a run writes its part of the temporary folder; one does the rest.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import time
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path

import yaml
from safetensors import SafetensorError

from megatron.checkpoint.form import CHECKSUM, manifest_checksum, train_state_fault, version_of
from megatron.checkpoint.lock import FolderLock
from megatron.checkpoint.reader import CheckpointReader, DamagedCheckpoint, file_sha256
from megatron.checkpoint.state import (
    FORMAT,
    MANIFEST,
    CanonicalState,
    folder_iteration,
    folder_name,
)
from megatron.checkpoint.writer import BadValues, Part, merged, write_pieces, write_text
from megatron.errors import UserError
from megatron.files import read_errors, replaced_file

__all__ = [
    "BadValues", "CheckpointReader", "DamagedCheckpoint", "FolderLock", "Part", "RunFolder", "file_sha256", "set_aside",
]  # fmt: skip

LATEST = "latest"
_TEMPORARY, _REPLACED, _DAMAGED = ".saving-", ".replaced-", "damaged-"
_TRANSIENT = "transient"
"""Name of the empty file that marks a checkpoint which is not kept."""
_YamlDumper = getattr(yaml, "CSafeDumper", yaml.SafeDumper)  # libyaml's writes the same ten times as fast
_LONGEST_NAME = 255
_PATIENCE_SECONDS = 30.0


class RunFolder:
    """The folder of a run's checkpoints, which need not be there.

    Args:
        path: the folder; `find` also takes that of a single checkpoint.
        key: what names it, for messages.
    """

    def __init__(self, path: str | Path, key: str = "load") -> None:
        self.path, self._key = Path(path), key

    def save(self, state: CanonicalState) -> Path:
        """Write `state`, of which this process has all pieces, and make it the latest checkpoint.

        Returns: the checkpoint's folder. Raises: UserError as `write_part` does; what was there before is as it was.
        """
        self.remove_leftovers()
        try:
            return self.publish(state, [self.write_part(state)])
        except UserError:
            self.discard(state.iteration)
            raise

    def write_part(self, state: CanonicalState, rank: int | None = None) -> Part:
        """Write the pieces of this process for a checkpoint that is to be published or discarded.

        Args:
            rank: of this process, where several write.

        Raises: UserError when the file system refuses (full, read-only), and BadValues, which is one, for a tensor with
            values that are not finite.
        """
        with self._save_errors(state.iteration):
            temporary = self._temporary(state.iteration)
            temporary.mkdir(parents=True, exist_ok=True)
            return write_pieces(temporary, state.pieces, rank)

    def publish(self, state: CanonicalState, parts: Iterable[Part], transient: bool = False) -> Path:
        """Make a checkpoint of the parts that all processes have written, and make it the latest one.

        Args:
            state: its pieces are not looked at.
            transient: it is to go with the next one that is saved.

        Returns: the checkpoint's folder. Raises: what `write_part` does; what was there before is as it was.
        """
        target = self.path / folder_name(state.iteration)
        temporary, replaced = self._temporary(state.iteration), self.path / f"{_REPLACED}{target.name}"
        with self._save_errors(state.iteration):
            whole = merged(parts)
            self._check_files(temporary, whole)
            if transient:
                (temporary / _TRANSIENT).touch()
            _write_records(temporary, state, whole)
            if os.path.lexists(target):
                _remove(replaced)  # of a save that could not move `latest`
                os.rename(target, replaced)
            os.rename(temporary, target)
            self.set_latest(state.iteration)
            _remove(replaced)
        return target

    @contextlib.contextmanager
    def _save_errors(self, iteration: int) -> Iterator[None]:
        target = self.path / folder_name(iteration)
        try:
            yield
        except BadValues as error:
            raise BadValues(
                f"save: checkpoint {target} is not written: {error}; earlier checkpoints are intact, resume from "
                "one with a smaller lr, a larger eps or another seed"
            ) from error
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"save: cannot write checkpoint {target}: {error}; earlier checkpoints are intact, "
                "free space or change `save` and resume"
            ) from error

    def _check_files(self, folder: Path, part: Part) -> None:
        """Does this process see what the others have written? A network's file system may show it a little later."""
        end = time.monotonic() + _PATIENCE_SECONDS
        for name, entry in part.files.items():
            path = folder / name
            while not path.is_file() or path.stat().st_size != entry["bytes"]:
                if time.monotonic() > end:
                    raise OSError(f"{name} of another process is not there, so the nodes do not share this folder")
                time.sleep(0.2)

    def discard(self, iteration: int) -> None:
        """Remove what was written for a checkpoint that is not published."""
        shutil.rmtree(self._temporary(iteration), ignore_errors=True)

    def _temporary(self, iteration: int) -> Path:
        return self.path / f"{_TEMPORARY}{folder_name(iteration)}"

    def remove_leftovers(self) -> None:
        """Remove what saves and removals that were killed have left."""
        for folder in self.path.glob(".*"):
            is_replaced = folder.name.startswith(_REPLACED) and (self.path / folder.name[len(_REPLACED) :]).exists()
            if folder.name.startswith(_TEMPORARY) or is_replaced:
                _remove(folder)

    def set_latest(self, iteration: int) -> None:
        """Point `latest` at an iteration, atomically."""
        with replaced_file(self.path / LATEST) as file:
            file.write(f"{folder_name(iteration)}\n".encode())
        _sync(self.path)

    def latest_name(self) -> str | None:
        """What `latest` says: the name of a folder beside it; None without such a file, "" where it names none.

        Raises UserError when it cannot be read.
        """
        path = self.path / LATEST
        try:
            if not path.is_file():
                return None
            with path.open("rb") as file:
                name = file.read(_LONGEST_NAME + 2).decode("utf-8", errors="replace").strip()
        except OSError as error:
            reason = error.strerror
            raise UserError(f"{self._key}: {path} cannot be read: {reason}; check its permissions and disk") from error
        return name if folder_iteration(name) is not None else ""

    def iterations(self) -> list[int]:
        """Iterations of the complete checkpoints, ascending."""
        try:
            folders = list(self.path.iterdir())
        except (FileNotFoundError, NotADirectoryError):  # or gone by now: the first rank of a refused run removes it
            folders = []
        found = (folder_iteration(f.name) for f in folders if (f / MANIFEST).is_file())
        return sorted(iteration for iteration in found if iteration is not None)

    def described(self) -> str:
        """The iterations as a message lists them."""
        return ", ".join(map(str, self.iterations())) or "none"

    def checkpoint(self, iteration: int) -> Path | None:
        """The folder of an iteration, also where a save that would have replaced it was killed; None without one."""
        name = folder_name(iteration)
        folders = (self.path / name, self.path / f"{_REPLACED}{name}")
        return next((folder for folder in folders if (folder / MANIFEST).is_file()), None)

    def find(self, iteration: int | None = None) -> Path | None:
        """The folder of one checkpoint: this one, or the `iteration` or latest one in it; None if there is none.

        Raises UserError when `latest` or `iteration` names a checkpoint that is not there, or the path cannot be read.
        """
        with read_errors(f"{self._key}: {self.path}"):
            if (self.path / MANIFEST).is_file() and iteration is None:
                return self.path
            name = folder_name(iteration) if iteration is not None else self.latest_name()
            if name is None:
                return None
            number = folder_iteration(name)
            if number is not None and (folder := self.checkpoint(number)) is not None:
                return folder
            other = "set `iteration`" if self._key == "load" else "name the folder of one"
            named = f"{self.path / name} is not a complete checkpoint"
            what = named if name else f"{self.path / LATEST} does not name a checkpoint"
            raise UserError(f"{self._key}: {what}; iterations found there: {self.described()}; {other}")

    def remove_old(self, keep: int | None, protected: Collection[int] = ()) -> list[int]:
        """Remove all but the `keep` checkpoints saved last, never those of `protected` iterations; returns what went.

        Transient ones do not count, and go unless nothing has been saved after them. Last saved, not highest
        iteration: a run that was rolled back saves lower iterations than it finds.

        Args:
            keep: None removes transient ones only.
        """

        def saved_at(iteration: int) -> int:
            return (self.path / folder_name(iteration) / MANIFEST).stat().st_mtime_ns

        by_age = sorted(self.iterations(), key=saved_at)
        transient = [i for i in by_age if (self.path / folder_name(i) / _TRANSIENT).exists()]
        candidates = [i for i in by_age if i not in protected and i not in transient]
        old = candidates[: max(0, len(candidates) - keep)] if keep is not None else []
        removed = sorted([*old, *(i for i in transient if i != by_age[-1])])
        for iteration in removed:
            name = folder_name(iteration)
            # Renamed first, so that a kill while deleting leaves no half checkpoint under a valid name.
            doomed = self.path / f"{_TEMPORARY}removing-{name}"
            _remove(doomed)  # what is left of an earlier one that could not be removed wholly
            os.rename(self.path / name, doomed)
            _remove(doomed)
        return removed

    def rollbacks(self, iteration: int) -> list[int] | None:
        """The iterations that the run had been rolled back to by a checkpoint; None where that cannot be read."""
        folder = self.checkpoint(iteration)
        try:
            return list(CheckpointReader(folder, verify=False).train_state.get("rollbacks", [])) if folder else None
        except UserError:
            return None

    def rollback_log(self, iterations: Sequence[int] | None = None) -> list[int]:
        """The iterations that the run was rolled back to. Each checkpoint has the log up to its time."""
        known = self.iterations() if iterations is None else iterations
        return max((self.rollbacks(iteration) or [] for iteration in known), key=len, default=[])

    def of_same_run(self, candidates: Sequence[int], has_head: bool) -> Iterator[Path]:
        """The folders of the candidates, without those that a rollback has left behind.

        A run that was rolled back to 4 while it had 6 goes on with 5, and 6 is none of its checkpoints any more.

        Args:
            has_head: the first one is what is asked for; it counts, whatever it is.
        """
        folders = {iteration: self.checkpoint(iteration) for iteration in candidates}
        if has_head and (head := folders[candidates[0]]):
            yield head
        log = self.rollback_log(candidates)
        for iteration in candidates[1:] if has_head else candidates:
            mine, folder = self.rollbacks(iteration), folders[iteration]
            if folder and (mine is None or iteration <= min(log[len(mine) :], default=iteration)):
                yield folder


def _write_records(folder: Path, state: CanonicalState, part: Part) -> None:
    """The small files beside those of tensors, the manifest last."""
    if fault := train_state_fault(state.train_state, state.iteration):
        raise BadValues(f"train_state.json {fault}")
    texts = {
        "train_state.json": json.dumps(dict(state.train_state), indent=1),
        "config.yml": yaml.dump(dict(state.config), Dumper=_YamlDumper, sort_keys=False),
        "environment.json": json.dumps(dict(state.environment), indent=1),
    }
    files = part.files | {name: write_text(folder / name, text) for name, text in texts.items()}
    manifest = {"format": FORMAT, "version": version_of(part.index), "iteration": state.iteration}
    manifest |= {"files": dict(sorted(files.items())), "tensors": part.index}
    manifest[CHECKSUM] = manifest_checksum(manifest)
    write_text(folder / MANIFEST, json.dumps(manifest))
    _sync(folder)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    """Remove a folder of ours; of a link that has its name only the link."""
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)
    else:
        shutil.rmtree(path, ignore_errors=True)


def set_aside(folder: Path) -> Path | None:
    """Rename a damaged checkpoint so that nothing takes it for one; its new name, None where it cannot be renamed."""
    names = (f"{_DAMAGED}{folder.name}" + (f"-{n}" if n > 1 else "") for n in itertools.count(1))
    target = next(path for path in map(folder.with_name, names) if not os.path.lexists(path))
    with contextlib.suppress(OSError):
        os.rename(folder, target)
        return target
    return None
