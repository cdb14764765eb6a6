"""The canonical checkpoint: what a run is, free of any layout.

A checkpoint is a folder `global_step{iteration}`:

| file                    | content                                                                          |
|-------------------------|----------------------------------------------------------------------------------|
| manifest.json           | format version, SHA-256 and size of every file, file, dtype and shape of every   |
|                         | tensor, and the SHA-256 of all this (megatron.checkpoint.form)                    |
| model-*.safetensors     | parameters, full shapes, fp32 (masters), and buffers such as tau_tokens (int64)  |
| optimizer-*.safetensors | moments and step counts, named `{moment}/{parameter}`                            |
| rng-*.safetensors       | random-number states of every rank, named `rank{r}/{generator}`                  |
| train_state.json        | iteration, consumed samples, data order, lineage                                 |
| config.yml              | the resolved configuration, flat as the YAML files are                           |
| environment.json        | git revision and package versions                                                |

Sharded or unsharded, saved by one process or many, the tensors are the same: every one is whole, under the name it has
in LanguageModel. Loading at any layout, growth, export and inference are functions of this form.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

FORMAT = "tokenformer-canonical"
FORMAT_VERSION = 1
MANIFEST = "manifest.json"
TENSOR_KINDS = ("model", "optimizer", "rng")
SMALL_FILES = ("train_state.json", "config.yml")

# A stream of whole tensors. Every process of the run must walk it to its end (gathering is collective).
TensorStream = Iterable[tuple[str, Tensor]]
# Looks a whole fp32 parameter up by its canonical name.
ParameterSource = Callable[[str], Tensor]


@dataclass
class CanonicalState:
    """A checkpoint about to be written: tensor streams by kind, and the JSON parts."""

    iteration: int
    train_state: Mapping[str, Any]
    config: Mapping[str, Any]
    tensors: Mapping[str, TensorStream] = field(default_factory=dict)
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
