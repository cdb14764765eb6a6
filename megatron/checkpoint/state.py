"""The canonical checkpoint: what a run is, free of any layout.

A checkpoint is a folder `global_step{iteration}`:

| file                    | content                                                                          |
|-------------------------|----------------------------------------------------------------------------------|
| manifest.json           | format version, SHA-256 and size of every file, file, dtype and shape of every   |
|                         | tensor, and the SHA-256 of all this (megatron.checkpoint.form)                    |
| model-*.safetensors     | parameters, full shapes, fp32 (masters), and buffers such as tau_tokens (int64)  |
| optimizer-*.safetensors | moments and step counts, named `{moment}/{parameter}`                            |
| rng-*.safetensors       | random-number states of every rank, named `rank{r}/{generator}`                  |
| {kind}-*.safetensors    | tensors of further kinds; who does not know a kind leaves it alone               |
| train_state.json        | iteration, consumed samples, data order, lineage                                 |
| config.yml              | the resolved configuration, flat as the YAML files are                           |
| environment.json        | git revision and package versions                                                |

Sharded or unsharded, saved by one process or many, the tensors are the same: every one is whole, under the name it has
in LanguageModel. Loading at any layout, growth, export and inference are functions of this form.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

FORMAT = "tokenformer-canonical"
FORMAT_VERSION = 1
MANIFEST = "manifest.json"
TENSOR_KINDS = ("model", "optimizer", "rng")
"""Kinds of tensors that every checkpoint has a table of, be it empty. There may be more."""
SMALL_FILES = ("train_state.json", "config.yml")

# A stream of whole tensors. Every process of the run must walk it to its end (gathering is collective).
TensorStream = Iterable[tuple[str, Tensor]]

# Looks a whole fp32 parameter up by its canonical name.
ParameterSource = Callable[[str], Tensor]


@dataclass(frozen=True)
class Piece:
    """A part of a tensor to be saved, or all of it, from whichever rank has it."""

    kind: str
    """Kind of the tensor: model, optimizer, or another."""
    name: str
    """Name of the tensor."""
    shape: tuple[int, ...]
    """Shape of the whole tensor."""
    offset: tuple[int, ...]
    """Where in the whole tensor the part begins, in each dimension."""
    tensor: Tensor
    """The part. Parts of a tensor do not overlap."""

    @property
    def is_whole(self) -> bool:
        """Is it all of the tensor?"""
        return tuple(self.tensor.shape) == self.shape

    @property
    def ranges(self) -> tuple[slice, ...]:
        """Where in the whole tensor it is."""
        sizes = self.tensor.shape
        return tuple(slice(start, start + size) for start, size in zip(self.offset, sizes, strict=True))


def whole_pieces(tensors: Mapping[str, TensorStream]) -> Iterator[Piece]:
    """Whole tensors, by kind, as a piece each."""
    for kind, stream in tensors.items():
        for name, tensor in stream:
            shape = tuple(tensor.shape)
            yield Piece(kind, name, shape, (0,) * len(shape), tensor)


@dataclass
class CanonicalState:
    """A checkpoint about to be written: its tensors in pieces, best kind after kind, and the JSON parts.

    Every process of the run must walk the pieces to their end (gathering is collective).
    """

    iteration: int
    train_state: Mapping[str, Any]
    config: Mapping[str, Any]
    pieces: Iterable[Piece] = ()
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
