"""Two tasks that are not language, registered as any task is. Nothing outside this file knows of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.nn.functional import all_gather
from torch.utils.data import Dataset

from megatron.config.sections.model import Initialisation, ModelSection
from megatron.data import Datasets
from megatron.model import Pattention
from megatron.model.blocks import BuildOptions
from megatron.model.build import Architecture
from megatron.model.layered import LayerLists, LayerSpec
from megatron.mpu.layout import Layout
from megatron.tasks import Task, register

SAMPLES = 10
"""Of each held-out set: not a whole number of batches."""


class _Sizes(ModelSection):
    num_attention_heads: int = 2
    """Not used; the tensor ranks have to divide it."""

    needs_data: ClassVar[bool] = False

    def tokens_per_sample(self) -> int:
        return 1

    def initialisation(self) -> Initialisation:
        return Initialisation("normal", "normal", 0.3)


class VectorsConfig(_Sizes):
    """Regression from vectors to vectors."""

    task: ClassVar[str] = "vectors"
    noise: float = 0.0
    """Added to the targets."""


class PairsConfig(_Sizes):
    """Two encoders whose outputs for the two halves of a pair are alike."""

    task: ClassVar[str] = "pairs"


def _layers(prefix: str, config: ModelSection, options: BuildOptions) -> list[LayerSpec]:
    def layer(index: int) -> Pattention:
        slots = config.ffn_slot_num
        sizes = config.token_segments["ffn"][index] if config.token_segments else [slots]
        return Pattention(
            config.hidden_size, config.hidden_size, sizes, config.norm_activation_type,
            backend=options.pattention_backend, row_norms=config.segment_norms, projection="ffn",
            axis=options.layout.tensor, inputs=options.stream, outputs=options.stream, device=options.device,
        )  # fmt: skip

    return [LayerSpec(f"{prefix}layers.{i}", partial(layer, i)) for i in range(config.num_layers)]


def _one_list(config: ModelSection, options: BuildOptions) -> LayerLists:
    return {"": _layers("", config, options)}


def _two_lists(config: ModelSection, options: BuildOptions) -> LayerLists:
    return {name: _layers(f"{name}.", config, options) for name in ("left", "right")}


class RandomVectors(Dataset[tuple[Tensor, Tensor]]):
    """Sample k: a random vector [d] and a fixed function of it, [d]."""

    def __init__(self, length: int, width: int, seed: int) -> None:
        self.length, self.width, self.seed = length, width, seed
        self.map = torch.randn(width, width, generator=torch.Generator().manual_seed(seed))

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor]:
        x = torch.randn(self.width, generator=torch.Generator().manual_seed(self.seed + 1 + number))
        return x, torch.tanh(self.map @ x)


class _VectorTask(Task[tuple[Tensor, ...]]):
    """A batch is x and y, [b, d] each, and for each sample 1.0, or 0.0 where it only fills the batch."""

    def datasets(self, samples: Sequence[int], order: Mapping[str, Sequence[int]]) -> Datasets:
        width = self.config.model.hidden_size
        train, valid, test = samples
        held_out = (RandomVectors(SAMPLES, width, 7) if count else None for count in (valid, test))
        return Datasets(RandomVectors(max(train, 1), width, 5), *held_out)

    def collate(self, samples: list[Any], size: int) -> tuple[Tensor, ...]:
        width = self.config.model.hidden_size
        filled = [(*sample, torch.ones(())) for sample in samples]
        filled += [(torch.zeros(width), torch.zeros(width), torch.zeros(()))] * (size - len(samples))
        return tuple(map(torch.stack, zip(*filled, strict=True)))

    @classmethod
    def example_inputs(cls, model: Any, settings: Mapping[str, Any], size: int) -> tuple[Tensor, ...]:
        return (torch.randn(size, model.hidden_size, generator=torch.Generator().manual_seed(0)),)

    def held_out(self, datasets: Datasets, size: int) -> tuple[Tensor, ...]:
        return self.example_inputs(self.config.model, {}, size)


@register
class VectorsTask(_VectorTask):
    name: ClassVar[str] = "vectors"
    section: ClassVar[type[ModelSection]] = VectorsConfig
    architecture: ClassVar[Architecture] = Architecture(_one_list)
    data_keys: ClassVar[tuple[str, ...]] = ("noise",)

    def split(self, batch: tuple[Tensor, ...], device: torch.device) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        x, y, _ = (part.to(device) for part in batch)
        return (x,), (y,)

    def loss(self, outputs: Tensor, targets: tuple[Tensor, ...], layout: Layout) -> Tensor:
        return F.mse_loss(outputs, targets[0])


@register
class PairsTask(_VectorTask):
    """The loss compares each pair with those of all data ranks; all samples of a held-out set count once."""

    name: ClassVar[str] = "pairs"
    section: ClassVar[type[ModelSection]] = PairsConfig
    architecture: ClassVar[Architecture] = Architecture(_two_lists)
    measures: ClassVar[tuple[str, ...]] = ("squared", "right", "count")
    evaluates_every_sample: ClassVar[bool] = True

    def split(self, batch: tuple[Tensor, ...], device: torch.device) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        x, y, counts = (part.to(device) for part in batch)
        return (x, y), (counts,)

    def loss(self, outputs: Any, targets: tuple[Tensor, ...], layout: Layout) -> Tensor:
        left, right = (F.normalize(output, dim=-1) for output in outputs)
        group = layout.data.group
        everything = right if group is None else torch.cat(all_gather(right, group=group))
        own = torch.arange(len(left)) + layout.data.rank * len(left)
        return F.cross_entropy(5.0 * left @ everything.T, own)

    def measure(self, outputs: Any, targets: tuple[Tensor, ...], layout: Layout) -> Tensor:
        left, right = (F.normalize(output, dim=-1) for output in outputs)
        (counts,) = targets
        alike = (left * right).sum(-1)
        return torch.stack([(counts * (1 - alike).square()).sum(), (counts * (alike > 0.5)).sum(), counts.sum()])

    def metrics(self, split: str, sums: Mapping[str, float]) -> dict[str, float]:
        return {
            f"{split}_loss": sums["squared"] / sums["count"], f"{split}_alike": sums["right"] / sums["count"],
            f"{split}_samples": sums["count"],
        }  # fmt: skip

    @classmethod
    def example_inputs(cls, model: Any, settings: Mapping[str, Any], size: int) -> tuple[Tensor, ...]:
        return super().example_inputs(model, settings, size) * 2
