"""Sample-order arrays on disk: built once per corpus and order, then memory-mapped by every process."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megatron.data.indexed import IndexedDataset
from megatron.log import get_logger

Arrays = tuple[npt.NDArray[np.integer], ...]
WHOLE_FILE_LIMIT = 64 << 20
"""Bytes of .idx up to which its whole content is hashed; larger ones by size, time and samples."""

_NUM_PROBES = 64
_PROBE_BYTES = 1 << 16


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


def cached_arrays(folder: Path, key: str, names: tuple[str, ...], build: Callable[[], Arrays]) -> Arrays:
    """The arrays of `key`, mapped from `folder`; built and stored there first when missing or damaged.

    A folder that cannot be written costs one warning line, and the arrays stay in memory.
    """
    paths = [folder / f"{key}_{name}.npy" for name in names]
    arrays = _load(paths)
    if arrays is not None:
        return arrays
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _one_builder(folder / f"{key}.lock"):
            arrays = _load(paths, warn=False) or build()
            if not isinstance(arrays[0], np.memmap):
                for path, values in zip(paths, arrays, strict=True):
                    _save(path, values)
        # Mapped, so that all processes of a machine share the pages.
        return _load(paths) or arrays
    except OSError as error:
        get_logger().warning(f"sample order kept in memory: {folder} cannot be written ({error.strerror or error})")
        return build() if arrays is None else arrays


def _load(paths: list[Path], warn: bool = True) -> Arrays | None:
    if not all(path.exists() for path in paths):
        return None
    try:
        return tuple(np.load(path, mmap_mode="r", allow_pickle=False) for path in paths)
    except (OSError, ValueError, EOFError):
        if warn:
            get_logger().warning(f"damaged sample-order file among {paths[0]} and its siblings: building them again")
        return None


def _save(path: Path, values: npt.NDArray[np.integer]) -> None:
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.stem, suffix=".part")
    try:
        with os.fdopen(handle, "wb") as file:
            np.save(file, values, allow_pickle=False)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)


@contextlib.contextmanager
def _one_builder(path: Path) -> Iterator[None]:
    """Let one process of a node build while the others wait; without lock support all of them build."""
    with path.open("w") as file:
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
