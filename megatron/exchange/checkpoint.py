"""A checkpoint that is open, whatever form it has on disk."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron.checkpoint.form import dtype_name, value_fault
from megatron.checkpoint.state import EMA
from megatron.checkpoint.tensors import Tensors
from megatron.config.schema import RunConfig
from megatron.config.sections.model import ModelConfig, ModelSection, language_section
from megatron.config.sections.tokenizer import TokenizerConfig
from megatron.errors import UserError
from megatron.exchange.averaged import AveragedTensors
from megatron.exchange.names import TAU, is_parameter
from megatron.model.compatibility import check_fit, check_same_model, described_model
from megatron.model.layered import LayeredModel

WEIGHT_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Checkpoint:
    """A model on disk, and what is known of the run it comes from."""

    folder: Path
    """Where it is; a file in the case of a flat `pytorch_model.bin`."""
    model_config: ModelSection
    """Section of the model."""
    tensors: Tensors
    """Its tensors, read when asked for. Values that no model can compute with raise a UserError then."""
    settings: Mapping[str, Any] | None = None
    """The resolved configuration of its run, flat as the YAML files are; None where it has none."""
    iteration: int | None = None
    """Iteration of a training checkpoint; None for other forms, which have no progress."""
    train_state: Mapping[str, Any] = field(default_factory=dict)
    """Progress of a training checkpoint, as TrainState.state_dict gives it."""
    find_tokenizer: Callable[[], TokenizerConfig | None] = lambda: None
    """Looks up what `tokenizer` says."""
    find_class_names: Callable[[], list[str] | None] = lambda: None
    """Looks up what `class_names` says."""

    @property
    def tokenizer(self) -> TokenizerConfig | None:
        """The tokenizer that the model was trained with; None where nothing tells. UserError for a damaged record."""
        return self.find_tokenizer()

    @property
    def class_names(self) -> list[str] | None:
        """Names of the classes that a model tells apart, in order; None where nothing tells, or tells of others."""
        return self.find_class_names()

    @property
    def language(self) -> ModelConfig:
        """`model_config` of a language model. Raises UserError for a model that learns something else."""
        return language_section(self.model_config)

    @property
    def num_parameters(self) -> int:
        """Number of parameters; a tied embedding counts once."""
        names = filter(is_parameter, self.tensors.names("model"))
        return sum(math.prod(self.tensors.shape("model", name)) for name in names)

    @property
    def has_ema(self) -> bool:
        """Has its run kept an average of the weights?"""
        return bool(self.tensors.names(EMA))

    def averaged(self) -> Checkpoint:
        """The model with the average of its weights in their place, where its run has kept one; else as it is."""
        return replace(self, tensors=AveragedTensors(self.tensors)) if self.has_ema else self

    def verify(self, *kinds: str) -> None:
        """Compare all files with their checksums, and look at all values, of these kinds or all; DamagedCheckpoint.

        Only training checkpoints have checksums; the values of other forms are looked at when they are read.
        """
        self.tensors.verify(*kinds)

    def as_model(self, model: ModelSection, key: str = "load") -> Checkpoint:
        """The checkpoint as this model: lengths and dropout may be others than it was trained with.

        Args:
            key: what named the checkpoint, for messages.

        Raises: UserError that names the key in which it is another model, or the tensor that does not fit.
        """
        check_same_model(model, self.model_config, self.folder)
        check_fit(described_model(model), self.tensors, f"{key}: {self.folder}")
        return replace(self, model_config=model)

    def resolved(self) -> dict[str, Any]:
        """The settings, or for a model without any the defaults around its sizes and its tokenizer."""
        if self.settings is not None:
            return dict(self.settings)
        tokenizer = self.tokenizer or TokenizerConfig(tokenizer_type="CharLevelTokenizer")
        return RunConfig(model=self.model_config, tokenizer=tokenizer).flat()


class CheckedTensors(Tensors):
    """Tensors of a form without checksums: they are looked at whenever they are read, whole.

    Args:
        where: what is read, for messages.
    """

    def __init__(self, where: str) -> None:
        self._where = where

    @abstractmethod
    def _stored(self, name: str) -> Tensor:
        """The tensor of this canonical name as the file has it."""

    def tensor(self, kind: str, name: str) -> Tensor:
        """A whole tensor in the dtype of the file; UserError where no model could compute with it."""
        tensor = self._stored(name)
        if name.endswith(f".{TAU}"):
            is_count = tensor.dtype == torch.int64 and tensor.ndim < 2
            fault = None if is_count else f"is {dtype_name(tensor)} of shape {list(tensor.shape)} instead of one int64"
        else:
            fault = weight_fault(tensor)
        if fault := fault or value_fault(kind, name, tensor):
            raise UserError(f"{self._where}: {name} {fault}; give a model that is whole")
        return tensor


def weight_fault(tensor: Tensor) -> str | None:
    """What is wrong with the kind of a tensor that should be a model's weights; None if nothing is."""
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
        return "is sparse, quantized or without values; weights are plain tensors"
    if tensor.dtype not in WEIGHT_DTYPES:
        return f"is {dtype_name(tensor)}; weights are floating-point numbers of 16 bits or more"
    return None


class _ModelTensors(Tensors):
    """The tensors of a model in memory."""

    def __init__(self, model: LayeredModel) -> None:
        self._state = model.state_dict()

    def names(self, kind: str) -> list[str]:
        """Names of parameters and buffers."""
        return list(self._state) if kind == "model" else []

    def shape(self, kind: str, name: str) -> tuple[int, ...]:
        """Full shape of a tensor."""
        return tuple(self._state[name].shape)

    def tensor(self, kind: str, name: str) -> Tensor:
        """A tensor, where the model has it."""
        return self._state[name].detach()


def of_model(model: LayeredModel, tokenizer: TokenizerConfig | None = None) -> Checkpoint:
    """A model in memory as if it had been opened."""
    return Checkpoint(Path("the model"), model.config, _ModelTensors(model), find_tokenizer=lambda: tokenizer)
