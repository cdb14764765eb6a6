"""The official code's flat checkpoints (`pytorch_model.bin`): names and shapes, to and from canonical ones.

Official name, sequential or pipeline spelling                            canonical name
    [sequential.]0.word_embeddings.weight                                 embedding.word_embeddings.weight
    tied_modules.embed.word_embeddings.weight                             the same
    [sequential.]{i + 2}.attention.query.key_param_tokens                 layers.{i}.attention.query.key_tokens_0
    [sequential.]{i + 2}.{input,post_attention}_layernorm.weight          layers.{i}.(the same)
    [sequential.]{L + 3}.norm.weight                                      final_norm.weight
    [sequential.]{L + 4}.final_linear.weight                              head.final_linear.weight
"""

from __future__ import annotations

import re
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.serialization import safe_globals

from megatron.checkpoint.form import dtype_name
from megatron.errors import UserError

EMBEDDING = "embedding.word_embeddings.weight"
WEIGHT_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
# Positions in the official list of layers: 0 embedding, 1 a reshaping lambda, then the blocks.
_FIRST_BLOCK = 2
_TOKENS = re.compile(r"(key|value)_param_tokens$")
_FORBIDDEN = re.compile(r"GLOBAL (\S+)")
# Rotary frequencies follow from the configuration; the official code saves them where it is told to.
_DERIVED = ".rotary_emb.inv_freq"
_RECONSTRUCT = np.zeros(0).__reduce__()[0]
_RANDOM_STATE: list[Any] = [
    np.ndarray, np.dtype, type(np.dtype("uint32")), (_RECONSTRUCT, "numpy.core.multiarray._reconstruct"),
    (_RECONSTRUCT, "numpy._core.multiarray._reconstruct"),
]  # fmt: skip
"""What numpy's random state consists of, as numpy 1 and 2 pickle it: training checkpoints hold one."""


def canonical_name(official: str, num_layers: int) -> str | None:
    """The canonical name of an official one; None for a name that no model of this depth has."""
    name = official.removeprefix("sequential.")
    if name.startswith("tied_modules.embed."):
        return "embedding." + name.removeprefix("tied_modules.embed.")
    position, _, rest = name.partition(".")
    if not position.isdecimal() or not rest:
        return None
    index = int(position)
    if index == 0:
        return f"embedding.{rest}"
    if _FIRST_BLOCK <= index < _FIRST_BLOCK + num_layers:
        return f"layers.{index - _FIRST_BLOCK}." + _TOKENS.sub(r"\1_tokens_0", rest)
    if index == num_layers + 3 and rest.startswith("norm."):
        return "final_norm." + rest.removeprefix("norm.")
    if index == num_layers + 4:
        return f"head.{rest}"
    return None


def embedding_rows(tensors: Mapping[str, Tensor], path: str | Path, key: str = "eval_ckpt") -> int:
    """Rows of the embedding among canonical tensors; UserError when there are none."""
    found = tensors.get(EMBEDDING)
    if found is None or not found.numel():
        raise UserError(f"{key}: {path} has no tensor {EMBEDDING} with values; give the file of a whole model")
    return found.shape[0]


def read_flat_file(path: str | Path, key: str = "eval_ckpt") -> dict[str, Tensor]:
    """Read a `pytorch_model.bin` with weights_only=True; UserError when it is none.

    `key` is what names the path, for messages; so it is in the functions below.
    """
    found = check_flat(load_file(path, key), path, key)
    if not found:
        raise UserError(f"{key}: {path} holds no tensors; give the file of a model")
    return found


def load_file(path: str | Path, key: str = "eval_ckpt") -> Any:
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


def check_flat(content: Any, path: str | Path, key: str = "eval_ckpt") -> dict[str, Tensor]:
    """`content` if it is a flat dictionary of tensors by their names, else a UserError."""
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise UserError(f"{key}: {path} is not a flat dictionary of tensors, as pytorch_model.bin is")
    for name in content:
        if not isinstance(name, str):
            raise UserError(f"{key}: {path} has a tensor under the key {str(name)[:40]}, which is no name of one")
    return content


def weight_fault(tensor: Tensor) -> str | None:
    """What is wrong with the kind of a tensor that should be a model's weights; None if nothing is."""
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
        return "is sparse, quantized or without values; weights are plain tensors"
    if tensor.dtype not in WEIGHT_DTYPES:
        return f"is {dtype_name(tensor)}; weights are floating-point numbers of 16 bits or more"
    return None


def to_canonical(
    flat: Mapping[str, Tensor], num_layers: int, path: str | Path, key: str = "eval_ckpt"
) -> dict[str, Tensor]:
    """Rename an official flat dictionary; UserError names a tensor that is no weight of a model of this depth."""
    renamed: dict[str, Tensor] = {}
    for official, tensor in flat.items():
        if official.endswith(_DERIVED):
            continue
        name = canonical_name(official, num_layers)
        if name is None:
            raise UserError(f"{key}: {path} has a tensor '{official}' that a model with num_layers {num_layers} lacks")
        if fault := weight_fault(tensor):
            raise UserError(f"{key}: {path}: the tensor '{official}' {fault}")
        if name in renamed and not (renamed[name].dtype == tensor.dtype and torch.equal(renamed[name], tensor)):
            raise UserError(f"{key}: {path} has two different tensors for {name}, one of them '{official}'")
        if not tensor.ndim:
            raise UserError(f"{key}: {path}: the tensor '{official}' is a single number; weights have dimensions")
        renamed[name] = tensor
    return renamed
