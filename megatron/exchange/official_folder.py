"""The official code's checkpoint folders, as DeepSpeed writes them and as its zero_to_fp32.py converts them.

    global_step143000/
        mp_rank_00_model_states.pt             {"module": names as in the flat file, or null beside layer files, ...}
        layer_02-model_00-model_states.pt      of layer 2, with names that lack `sequential.2.`
    pytorch_model.bin/                         a folder, as newer versions of zero_to_fp32.py write it
        pytorch_model.bin                      a flat file, or
        pytorch_model.bin.index.json           the flat files that its tensors are spread over

Only the tensors are used. All files are read with weights_only=True.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

from torch import Tensor

from megatron.errors import UserError
from megatron.exchange.torch_file import check_flat, load_file, read_flat_file

_LAYER = re.compile(r"layer_(\d+)(?:-model_(\d+))?-model_states\.pt")
_MODEL = re.compile(r"mp_rank_(\d+)_model_states\.pt")
_ZERO3 = re.compile(r"zero_pp_rank_\d+_mp_rank_\d+_model_states\.pt")
_TAG = re.compile(r"\w[\w.-]{0,200}")
FLAT_FILE = "pytorch_model.bin"
_INDEX = f"{FLAT_FILE}.index.json"


def find_official_folder(path: str | Path, iteration: int | None = None) -> Path | None:
    """The official folder meant by `path`: itself, or the `iteration` or latest one under it; None if there is none."""
    path = Path(path)
    names = [".", *_latest_tag(path)] if iteration is None else [f"global_step{iteration}"]
    return next((path / name for name in names if _is_official(path / name)), None)


def _latest_tag(path: Path) -> list[str]:
    """The folder that DeepSpeed's `latest` names beside it; none where it names anything else."""
    latest = path / "latest"
    text = latest.read_bytes()[:256].decode("utf-8", errors="replace").strip() if os.path.isfile(latest) else ""
    return [text] if _TAG.fullmatch(text) else []


def _is_official(folder: Path) -> bool:
    if not os.path.isdir(folder):
        return False
    patterns = (_LAYER, _MODEL, _ZERO3, re.compile(rf"{FLAT_FILE}|{_INDEX}"))
    return any(pattern.fullmatch(file.name) for file in folder.iterdir() for pattern in patterns if file.is_file())


def read_official_folder(folder: Path, key: str) -> dict[str, Tensor]:
    """All tensors with the names of the flat file; UserError, which starts with `key`, for a split or damaged model."""
    names = sorted(file.name for file in folder.iterdir())
    if (folder / FLAT_FILE).is_file():
        return read_flat_file(folder / FLAT_FILE, key)
    if (folder / _INDEX).is_file():
        return _read_shards(folder, key)
    layers = [match for name in names if (match := _LAYER.fullmatch(name))]
    if layers:
        # With pipeline parallelism the mp_rank files count stages; only a layer's own files tell of a split.
        _refuse_split(folder, max(int(match[2] or 0) for match in layers) + 1, key)
        return _read_layers(folder, layers, key)
    models = [match for name in names if (match := _MODEL.fullmatch(name))]
    if not models:
        raise UserError(
            f"{key}: {folder} holds ZeRO stage 3 shards; run its zero_to_fp32.py and name the {FLAT_FILE} it writes"
        )
    _refuse_split(folder, max(int(match[1]) for match in models) + 1, key)
    return _read_module(folder / models[0].string, key)


def _refuse_split(folder: Path, ranks: int, key: str) -> None:
    if ranks > 1:
        raise UserError(
            f"{key}: {folder} is split over {ranks} model-parallel ranks; only folders saved with "
            "model_parallel_size 1 can be read"
        )


def _read_layers(folder: Path, layers: list[re.Match[str]], key: str) -> dict[str, Tensor]:
    tensors = {}
    for match in layers:
        file = folder / match.string
        for name, tensor in check_flat(load_file(file, key), file, key).items():
            tensors[f"sequential.{int(match[1])}.{name}"] = tensor
    return tensors


def _read_module(file: Path, key: str) -> dict[str, Tensor]:
    content: Any = load_file(file, key)
    if not isinstance(content, dict) or not isinstance(content.get("module"), dict):
        raise UserError(f"{key}: {file} has no 'module' with a model's tensors; are the layer files missing?")
    ranks = content.get("mp_world_size")
    _refuse_split(file.parent, ranks if isinstance(ranks, int) else 1, key)
    return check_flat(content["module"], f"'module' of {file}", key)


def _read_shards(folder: Path, key: str) -> dict[str, Tensor]:
    try:
        files = set(json.loads((folder / _INDEX).read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError):
        raise UserError(f"{key}: {folder / _INDEX} has no weight_map; write the folder anew") from None
    if any(not isinstance(name, str) or name != Path(name).name for name in files):
        raise UserError(f"{key}: {folder / _INDEX} names files outside its folder")
    return {name: tensor for file in sorted(files) for name, tensor in read_flat_file(folder / file, key).items()}
