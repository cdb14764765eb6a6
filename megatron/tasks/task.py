"""What is learned: the one thing that training knows of its samples, outputs and losses."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor

from megatron.config.schema import RunConfig
from megatron.config.sections.model import ModelSection
from megatron.data.datasets import Datasets
from megatron.model.build import Architecture
from megatron.mpu.layout import Layout

Batch = TypeVar("Batch")
Tensors = tuple[Tensor, ...]


class Task(ABC, Generic[Batch]):
    """Samples, model and loss of one kind of learning; megatron.tasks.register makes it known.

    Made once a process, before there is a model. A Batch is what `collate` makes of samples, with its tensors on the
    CPU: a tensor, or tensors in a tuple or dictionary.
    """

    name: ClassVar[str]
    """Value of the key `task`."""
    section: ClassVar[type[ModelSection]]
    """Its model section, whose `task` is this name."""
    architecture: ClassVar[Architecture]
    """The model that such a section describes."""
    loss_name: ClassVar[str] = "loss"
    """What metrics call the loss."""
    unit: ClassVar[str] = "tokens"
    """What a plan's rates count: tokens, or samples by their name."""
    measures: ClassVar[tuple[str, ...]] = ("loss", "count")
    """What `measure` gives, in order."""
    console: ClassVar[Mapping[str, str]] = {
        "loss": "loss {:.4f}",
        "valid_loss": "validation loss {:.4f}",
        "test_loss": "test loss {:.4f}",
    }
    """Formats of its metrics in a line of the log, by name."""
    data_keys: ClassVar[tuple[str, ...]] = ()
    """Configuration keys on which the order of the samples depends, besides those of the data section."""
    evaluates_every_sample: ClassVar[bool] = False
    """An evaluation reads a whole data set once; else eval_iters updates' worth of it."""
    joint: ClassVar[bool] = False
    """Loss and measures are of all samples of an update together, whatever micro-batches and ranks it is divided
    into; see `joined`."""
    config: RunConfig
    """The run's configuration, with what the data decides filled in."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config

    @abstractmethod
    def datasets(self, samples: Sequence[int], order: Mapping[str, Sequence[int]]) -> Datasets:
        """Training, validation and test set for so many samples each (0: not needed).

        Args:
            order: `Datasets.epoch_blocks` of the run so far; empty at first.

        Raises: UserError for data that is missing, damaged or too small.
        """

    @abstractmethod
    def collate(self, samples: list[Any], size: int) -> Batch:
        """A micro-batch of `size` samples. Fewer are given at the end of a set that is read whole: pad them."""

    def check(self, batch: Batch) -> None:
        """Raise a RankError for a batch that the model cannot take, before it reaches a device."""

    @abstractmethod
    def split(self, batch: Batch, device: torch.device) -> tuple[Tensors, Tensors]:
        """(the model's inputs, one for each of its lists of layers; what else the loss needs), on `device`."""

    @abstractmethod
    def loss(self, outputs: Any, targets: Tensors, layout: Layout) -> Tensor:
        """Mean loss of a micro-batch, a scalar; the mean over the data ranks is what is trained.

        Args:
            outputs: the model's, this tensor rank's share of them.
        """

    def joined(self, outputs: Sequence[Tensors], targets: Sequence[Tensors]) -> tuple[Any, Tensors]:
        """Of a joint task: outputs and targets of a rank's micro-batches as those of one, for loss and measure."""
        raise NotImplementedError

    def measure(self, outputs: Any, targets: Tensors, layout: Layout) -> Tensor:
        """What an evaluation adds up over its micro-batches and data ranks: `measures`, [m]. Without gradients."""
        loss = self.loss(outputs, targets, layout)
        return torch.stack([loss, torch.ones_like(loss)])

    def metrics(self, split: str, sums: Mapping[str, float]) -> dict[str, float]:
        """An evaluation's metrics from the sums of `measures`; `split` is valid or test."""
        return {f"{split}_loss": sums["loss"] / sums["count"]}

    @classmethod
    @abstractmethod
    def example_inputs(cls, model: Any, settings: Mapping[str, Any], size: int) -> Tensors:
        """Inputs of a model of this section, for the proof of a growth outside a run.

        Args:
            settings: the configuration that the model was trained with, flat.
            size: number of samples, at most.
        """

    @abstractmethod
    def held_out(self, datasets: Datasets, size: int) -> Tensors:
        """The model's inputs for up to `size` samples that were not trained on, for the proof that a growth is exact.

        The same on every rank.
        """
