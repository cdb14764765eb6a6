"""A folder that is written completely or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from megatron.errors import UserError


@contextmanager
def new_folder(folder: str | Path) -> Iterator[Path]:
    """A temporary folder that takes the name `folder` when all went well; UserError when that is not empty.

    A link to an empty folder, or to none yet, is followed.
    """
    folder = Path(os.path.realpath(folder))
    require_new(folder)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as parent:
            temporary = Path(parent) / "written"
            temporary.mkdir()
            yield temporary
            temporary.replace(folder)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{folder}: cannot be written: {error}; free space or choose another folder") from error


def require_new(folder: Path) -> None:
    """Raise a UserError when there is anything at `folder` but an empty folder."""
    if os.path.exists(folder) and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder}: exists already; give a new or an empty folder")
