"""The official code's training folders, as its DeepSpeed writes them."""

from __future__ import annotations

import json
import random
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor


def training_state(module: Any, **more: Any) -> dict[str, Any]:
    """What DeepSpeed and the official code put beside the tensors."""
    return {
        "module": module, "optimizer": None, "lr_scheduler": {"num_iters": 5}, "mp_world_size": 1, "ds_config": {},
        "param_shapes": [OrderedDict(a=torch.Size([2, 3]))], "args": {"num_layers": 2}, "iteration": 5,
        "random_rng_state": random.getstate(), "np_rng_state": np.random.get_state(),
        "torch_rng_state": torch.get_rng_state(), **more,
    }  # fmt: skip


def write_model_file(folder: Path, flat: dict[str, Tensor], **more: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(training_state(OrderedDict(flat), **more), folder / "mp_rank_00_model_states.pt")
    return folder


def write_layers(folder: Path, flat: dict[str, Tensor], rank: int = 0) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    layers: dict[int, OrderedDict[str, Tensor]] = {}
    for name, tensor in flat.items():
        _, position, rest = name.split(".", 2)
        layers.setdefault(int(position), OrderedDict())[rest] = tensor
    for position, tensors in layers.items():
        torch.save(tensors, folder / f"layer_{position:02d}-model_{rank:02d}-model_states.pt")
    for stage in (0, 1):
        torch.save(training_state(None), folder / f"mp_rank_{stage:02d}_model_states.pt")
    return folder


def pipeline_names(flat: dict[str, Tensor]) -> dict[str, Tensor]:
    """The spelling of a model saved as a pipeline."""
    names = {"sequential.0.word_embeddings.weight": "tied_modules.embed.word_embeddings.weight"}
    return {names.get(name, name.removeprefix("sequential.")): tensor for name, tensor in flat.items()}


def write_shards(folder: Path, flat: dict[str, Tensor]) -> Path:
    folder.mkdir(parents=True)
    weight_map = {name: f"pytorch_model-0000{i % 2 + 1}-of-00002.bin" for i, name in enumerate(flat)}
    for file in set(weight_map.values()):
        torch.save({name: flat[name] for name in flat if weight_map[name] == file}, folder / file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def write_flat_folder(folder: Path, flat: dict[str, Tensor]) -> Path:
    folder.mkdir(parents=True)
    torch.save(dict(flat), folder / "pytorch_model.bin")
    return folder
