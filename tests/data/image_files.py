"""Small images on disk, for tests."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from megatron.data import IndexedDataset

Prepare = Callable[..., tuple[int, str]]
"""Runs prepare_data.py with these flags; gives its exit code and what it printed."""


def pixels(seed: int, height: int = 20, width: int = 24, channels: int = 3) -> np.ndarray[Any, Any]:
    """A random image."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), np.uint8)


def encoded(array: np.ndarray[Any, Any], kind: str = "PNG", **options: Any) -> bytes:
    """An image as the bytes of a file."""
    file = io.BytesIO()
    Image.fromarray(array).save(file, kind, **options)
    return file.getvalue()


def write_tar(path: Path, members: dict[str, bytes]) -> str:
    """A tar of these members; its name."""
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return str(path)


def tar_of(folder: Path, **members: bytes) -> str:
    """A tar; `a_png` names the member a.png."""
    return write_tar(folder / "a.tar", {name.replace("_", "."): content for name, content in members.items()})


def pair(folder: Path, kind: str) -> IndexedDataset:
    return IndexedDataset(folder / "out" / "x" / f"x_{kind}_document")


def rows(folder: Path, *kinds: str) -> list[tuple[Any, ...]]:
    """What belongs together, in the order it was written."""
    pairs = [pair(folder, kind) for kind in kinds]
    assert len({len(each) for each in pairs}) == 1
    return [tuple(each[i].tobytes() for each in pairs) for i in range(len(pairs[0]))]


def label(number: int) -> bytes:
    return np.int32(number).tobytes()


def ids(text: str) -> bytes:
    return np.array([*text.encode(), 0], np.uint16).tobytes()
