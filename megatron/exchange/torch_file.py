"""Files that torch.save wrote: dictionaries of tensors, read without running what is in them."""

from __future__ import annotations

import re
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.serialization import safe_globals

from megatron.errors import UserError

_FORBIDDEN = re.compile(r"GLOBAL (\S+)")
_RECONSTRUCT = np.zeros(0).__reduce__()[0]
_RANDOM_STATE: list[Any] = [
    np.ndarray, np.dtype, type(np.dtype("uint32")), (_RECONSTRUCT, "numpy.core.multiarray._reconstruct"),
    (_RECONSTRUCT, "numpy._core.multiarray._reconstruct"),
]  # fmt: skip
"""What numpy's random state consists of, as numpy 1 and 2 pickle it: training checkpoints hold one."""


def read_flat_file(path: str | Path, key: str) -> dict[str, Tensor]:
    """Read a `pytorch_model.bin` with weights_only=True; UserError when it is none.

    `key` is what names the path, for messages; so it is in the functions below.
    """
    return _flat(load_file(path, key), path, key)


def read_state_dict(path: str | Path, key: str) -> dict[str, Tensor]:
    """A flat file, or what a training script has saved under `model` or `state_dict`; UserError when it is neither."""
    content = load_file(path, key)
    found = [content.get(name) for name in ("model", "state_dict")] if isinstance(content, dict) else []
    return _flat(next((inner for inner in found if isinstance(inner, dict)), content), path, key)


def _flat(content: Any, path: str | Path, key: str) -> dict[str, Tensor]:
    found = check_flat(content, path, key)
    if not found:
        raise UserError(f"{key}: {path} holds no tensors; give the file of a model")
    return found


def load_file(path: str | Path, key: str) -> Any:
    """What torch.save wrote: tensors, plain values and numpy's random state, and no other object. Raises UserError."""
    try:
        with safe_globals(_RANDOM_STATE):
            # Files of torch before 1.6 are not archives, and cannot be mapped.
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
        _check_records(path)
        return content
    except FileNotFoundError:
        raise UserError(f"{key}: {path} does not exist; check the path") from None
    except Exception as error:  # a damaged pickle can make the library raise almost anything
        raise UserError(
            f"{key}: {path} is not a readable PyTorch file of tensors ({_reason(path, error)}); give one that is "
            "whole and holds tensors only"
        ) from error


def _reason(path: str | Path, error: Exception) -> str:
    """Why a file could not be loaded, in words for who has it."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if forbidden := _FORBIDDEN.search(str(error)):
        return f"it holds a {forbidden[1]} object, which could run code"
    with open(path, "rb") as file:
        start = file.read(64)
    if not start:
        return "it is empty"
    if start.startswith(b"version https://git-lfs"):
        return "it is a Git LFS pointer; fetch the file itself"
    if not start.startswith(b"PK"):  # of a zip archive
        return "it is damaged, or of another kind"
    lines = str(error).splitlines() or [type(error).__name__]
    return lines[0].split(". ")[0].rstrip(".")  # what follows is advice for programmers


def _check_records(path: str | Path) -> None:
    """Raise ValueError where a record of the file, if it is a zip archive, has other bytes than when it was saved.

    torch.load does not look at their CRC-32. torch.save can be told to write none: then not one is right.
    """
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        wrong = [record.filename for record in archive.infolist() if not _is_whole(archive, record)]
        if wrong and len(wrong) < len(archive.infolist()):
            raise ValueError(f"its part {wrong[0][:100]} is damaged: the checksum differs")


def _is_whole(archive: zipfile.ZipFile, record: zipfile.ZipInfo) -> bool:
    try:
        with archive.open(record) as file:
            while file.read(1 << 20):
                pass
    except (zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError, zlib.error):
        return False
    return True


def check_flat(content: Any, path: str | Path, key: str) -> dict[str, Tensor]:
    """`content` if it is a flat dictionary of tensors by their names, else a UserError."""
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise UserError(f"{key}: {path} is not a flat dictionary of tensors, as pytorch_model.bin is")
    for name in content:
        if not isinstance(name, str):
            raise UserError(f"{key}: {path} has a tensor under the key {str(name)[:40]}, which is no name of one")
    return content
