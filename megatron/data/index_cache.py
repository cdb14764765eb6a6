"""Sample-order arrays on disk: built once per corpus and order, then memory-mapped by every process.

An order is `{key}_{name}.npy` for each array and `{key}.json`, which says what the order is of and the size and
checksum of each file. Files that do not match it are built again. What has one of these names but is no file is left
alone.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from megatron.data.indexed import IndexedDataset
from megatron.files import is_regular, lock, open_own, replaced_file
from megatron.log import get_logger

Arrays = tuple[npt.NDArray[np.integer], ...]
WHOLE_FILE_LIMIT = 64 << 20
"""Bytes of .idx up to which its whole content is hashed; larger ones by size, time and samples."""

_NUM_PROBES = 64
_PROBE_BYTES = 1 << 16
_BLOCK_BYTES = 1 << 24


def corpus_identity(indexed: IndexedDataset) -> str:
    """A hash that changes whenever the sample order of this corpus may change (document sizes decide it)."""
    stat = indexed.idx_path.stat()
    digest = hashlib.sha256(f"{indexed.dtype}/{stat.st_size}".encode())
    with indexed.idx_path.open("rb") as file:
        if stat.st_size <= WHOLE_FILE_LIMIT:
            digest.update(file.read())
        else:
            digest.update(str(stat.st_mtime_ns).encode())
            for position in np.linspace(0, stat.st_size - _PROBE_BYTES, _NUM_PROBES, dtype=np.int64):
                file.seek(int(position))
                digest.update(file.read(_PROBE_BYTES))
    return digest.hexdigest()


def cached_arrays(folder: Path, name: str, order: str, names: Sequence[str], build: Callable[[], Arrays]) -> Arrays:
    """The arrays of an order, mapped from `folder`; built and stored there first when missing or damaged.

    name: begins the file names. order: all that decides the arrays; a hash of it ends the key.
    A folder that cannot be written costs one warning line, and the arrays stay in memory.
    """
    cache = _Cache(folder, f"{name}_{hashlib.sha256(order.encode()).hexdigest()[:16]}", order, names)
    arrays = cache.load()
    if arrays is not None:
        return arrays
    built: Arrays | None = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _one_builder(folder / f"{cache.key}.lock"):
            arrays = cache.load(warn=True)
            if arrays is None:
                built = build()
                cache.save(built)
        # Mapped, so that all processes of a machine share the pages.
        return arrays or cache.load() or built or build()
    except OSError as error:
        get_logger().warning(f"sample order kept in memory: {folder} cannot be written ({error.strerror or error})")
        return built or build()


class _Cache:
    def __init__(self, folder: Path, key: str, order: str, names: Sequence[str]) -> None:
        self.key, self._order = key, order
        self._description = folder / f"{key}.json"
        self._paths = [folder / f"{key}_{name}.npy" for name in names]

    def load(self, warn: bool = False) -> Arrays | None:
        """The arrays, mapped; None when they are missing, damaged or, unless this process builds, not complete yet."""
        there = [path for path in (self._description, *self._paths) if path.exists()]
        if not there:
            return None
        with contextlib.suppress(OSError):
            # Compared as a whole before a byte is interpreted: what we wrote needs no further check.
            with _opened(self._description) as file:
                is_ours = file.read() == self._describe()
            if is_ours:
                return tuple(np.load(path, mmap_mode="r", allow_pickle=False) for path in self._paths)
        if warn and all(map(is_regular, there)):
            get_logger().warning("sample-order files %s*: damaged, building them again", there[0].parent / self.key)
        return None

    def save(self, arrays: Arrays) -> None:
        """Write the arrays, and then what they are."""
        for path, values in zip(self._paths, arrays, strict=True):
            with replaced_file(path) as file:
                np.save(file, values, allow_pickle=False)
        with replaced_file(self._description) as file:
            file.write(self._describe())

    def _describe(self) -> bytes:
        files = {path.name: {"bytes": path.stat().st_size, "crc32": _crc32(path)} for path in self._paths}
        return json.dumps({"order": self._order, "files": files}, indent=1).encode()


def _opened(path: Path) -> BinaryIO:
    if not is_regular(path):
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
    return path.open("rb")


def _crc32(path: Path) -> int:
    checksum = 0
    with _opened(path) as file:
        while block := file.read(_BLOCK_BYTES):
            checksum = zlib.crc32(block, checksum)
    return checksum


@contextmanager
def _one_builder(path: Path) -> Iterator[None]:
    """Let one process of a node build while the others wait; where there are no locks all of them build."""
    file = _locked(path)
    try:
        yield
    finally:
        if file is not None:
            with contextlib.suppress(OSError):
                path.unlink()
            file.close()


def _locked(path: Path) -> BinaryIO | None:
    """The lock's file; None where something else has its name.

    Its owner removes it at the end: who waited for it then holds a file that is gone, and tries the next one.
    """
    while (file := open_own(path)) is not None:
        if not lock(file, wait=True) or _is_file_at(path, file.fileno()):
            return file
        file.close()
    return None


def _is_file_at(path: Path, descriptor: int) -> bool:
    """Is this open file the one of this name?"""
    try:
        return os.path.samestat(os.lstat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False
