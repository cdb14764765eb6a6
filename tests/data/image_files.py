"""Small images on disk, for tests."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


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
