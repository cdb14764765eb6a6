"""The canonical checkpoint: what a run is, free of any layout.

A checkpoint is a folder `global_step{iteration}`:

| file                    | content                                                                          |
|-------------------------|----------------------------------------------------------------------------------|
| manifest.json           | format version, SHA-256 and size of every file, file, dtype and shape of every   |
|                         | tensor, and the SHA-256 of all this (megatron.checkpoint.form)                    |
| model-*.safetensors     | parameters, full shapes, fp32 (masters), and buffers such as tau_tokens (int64)  |
| optimizer-*.safetensors | moments and step counts, named `{moment}/{parameter}`                            |
| ema-*.safetensors       | of a run with ema_decay: the average of every parameter, fp32, by its name       |
| rng-*.safetensors       | random-number states of every rank, named `rank{r}/{generator}`                  |
| {kind}-*.safetensors    | tensors of further kinds; who does not know a kind leaves it alone               |
| train_state.json        | iteration, consumed samples, data order, lineage                                 |
| config.yml              | the resolved configuration, flat as the YAML files are                           |
| environment.json        | git revision and package versions                                                |

Saved by one process, every tensor is whole. Of many processes each writes what it holds into files of its own, called
`{kind}-{rank}-*.safetensors`, and a tensor may be in parts there: boxes, named `weight[0:4,2:6]`. For the manifest has
each tensor under the name it has in LanguageModel, with the ranges of its parts, layouts do not matter to who reads it.
Loading at any layout, growth, export and inference are functions of this form.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from megatron.checkpoint.pieces import Piece

FORMAT = "tokenformer-canonical"
FORMAT_VERSIONS = (1, 2)
"""1: every tensor is whole, in one file. 2: there are tensors in parts."""
MANIFEST = "manifest.json"
TENSOR_KINDS = ("model", "optimizer", "rng")
"""Kinds of tensors that every checkpoint has a table of, be it empty. There may be more."""
EMA = "ema"
"""The kind that the average of the weights is."""
SMALL_FILES = ("train_state.json", "config.yml")


@dataclass
class CanonicalState:
    """A checkpoint about to be written: tensors in pieces, best kind after kind, and the JSON parts."""

    iteration: int
    train_state: Mapping[str, Any]
    config: Mapping[str, Any]
    pieces: Iterable[Piece] = ()
    """Those of this process."""
    environment: Mapping[str, Any] = field(default_factory=dict)


def folder_name(iteration: int) -> str:
    """`global_step{iteration}`, the name GPT-NeoX and DeepSpeed users look for."""
    return f"global_step{iteration}"


def folder_iteration(name: str) -> int | None:
    """The iteration in a folder name, or None when it is no checkpoint's: `global_step08` is not one of ours."""
    digits = name.removeprefix("global_step")
    if not digits.isdecimal() or folder_name(int(digits)) != name:
        return None
    return int(digits)
