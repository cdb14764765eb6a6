"""Image classification: which of a number of classes an image shows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron.config.schema import RunConfig
from megatron.config.sections.images import ImagesConfig
from megatron.config.sections.model import ModelSection
from megatron.config.sections.vision import ImageConfig
from megatron.data.datasets import Datasets
from megatron.data.image_batch import PADDING, ImageShape, images_of
from megatron.data.pillow import pillow_needed
from megatron.errors import RankError
from megatron.model.build import IMAGES, Architecture
from megatron.mpu.layout import Layout
from megatron.tasks.normalise import Normalise
from megatron.tasks.task import Task, Tensors

_BEST = 5  # that top-5 counts


class ImageClassificationTask(Task[dict[str, Tensor]]):
    """A batch is images, uint8 [b, c, H, W], and labels: int64 [b], or shares of the classes [b, classes].

    An evaluation reads every image of its set once. Its loss is the cross-entropy of the true class, acc1 and acc5 the
    shares of images whose class is the most likely one, or one of the five most likely ones.
    """

    name: ClassVar[str] = "image_classification"
    section: ClassVar[type[ModelSection]] = ImageConfig
    architecture: ClassVar[Architecture] = IMAGES
    unit: ClassVar[str] = "images"
    measures: ClassVar[tuple[str, ...]] = ("loss", "top1", "top5", "count")
    console: ClassVar[Mapping[str, str]] = {
        "loss": "loss {:.4f}",
        "valid_loss": "validation loss {:.4f}", "valid_acc1": "top-1 {:.4f}", "valid_acc5": "top-5 {:.4f}",
        "test_loss": "test loss {:.4f}", "test_acc1": "top-1 {:.4f}", "test_acc5": "top-5 {:.4f}",
    }  # fmt: skip
    evaluates_every_sample: ClassVar[bool] = True

    def __init__(self, config: RunConfig) -> None:
        super().__init__(config)
        assert isinstance(config.model, ImageConfig) and isinstance(config.images, ImagesConfig)
        model, self._images = config.model, config.images
        self._shape = ImageShape(model.in_channels, model.image_size, model.num_classes)
        self._normalise = Normalise(config.images, model.in_channels)

    def datasets(self, samples: Sequence[int], order: Mapping[str, Sequence[int]]) -> Datasets:
        """Training images as often as they are needed, augmented; every image of the others once, as it is."""
        with pillow_needed():
            from megatron.data.images import build_image_datasets
        config = self.config
        return build_image_datasets(config.data, self._images, self._shape, config.training.seed, samples)

    def collate(self, samples: list[Any], size: int) -> dict[str, Tensor]:
        """{images, labels} of `size` samples; see the class."""
        return images_of(samples, size, self._shape)

    def check(self, batch: dict[str, Tensor]) -> None:
        """Raise a RankError for images of another shape and labels that are no classes of the model."""
        images, labels = batch["images"], batch["labels"]
        expected = (self._shape.channels, self._shape.size, self._shape.size)
        if images.shape[1:] != expected:
            raise RankError(
                f"data_path: an image of the data is {list(images.shape[1:])}, the model takes {list(expected)} "
                "(in_channels, image_size, image_size)"
            )
        classes = self._shape.num_classes
        if labels.is_floating_point():
            if labels.shape[1] != classes:
                raise RankError(f"num_classes: {classes}, and the labels of the data are of {labels.shape[1]} classes")
        elif (wrong := labels[(labels < PADDING) | (labels >= classes)]).numel():
            raise RankError(
                f"data_path: the data has label {wrong[0].item()}, and num_classes {classes} allows 0 to {classes - 1}"
            )

    def split(self, batch: dict[str, Tensor], device: torch.device) -> tuple[Tensors, Tensors]:
        """([images [b, c, H, W], normalised, fp32], [labels])."""
        return (self._normalise(batch["images"], device),), (batch["labels"].to(device, non_blocking=True),)

    def loss(self, outputs: Any, targets: Tensors, layout: Layout) -> Tensor:
        """Mean cross-entropy in nats an image.

        outputs: logits [b, classes], whole on every tensor rank.
        """
        return F.cross_entropy(outputs.float(), targets[0], ignore_index=PADDING)

    def measure(self, outputs: Any, targets: Tensors, layout: Layout) -> Tensor:
        """Sums over the images; see the class. What fills up a batch counts for nothing."""
        (labels,) = targets
        loss = F.cross_entropy(outputs.float(), labels, ignore_index=PADDING, reduction="sum")
        best = outputs.topk(min(_BEST, outputs.shape[1])).indices == labels[:, None]
        return torch.stack([loss, best[:, 0].sum(), best.sum(), (labels != PADDING).sum()])

    def metrics(self, split: str, sums: Mapping[str, float]) -> dict[str, float]:
        """Loss, acc1 and acc5, from 0 to 1."""
        names = {"loss": "loss", "top1": "acc1", "top5": "acc5"}
        return {f"{split}_{name}": sums[measure] / sums["count"] for measure, name in names.items()}

    @classmethod
    def example_inputs(cls, model: Any, settings: Mapping[str, Any], size: int) -> Tensors:
        """Images of noise."""
        shape = (size, model.in_channels, model.image_size, model.image_size)
        return (torch.randn(shape, generator=torch.Generator().manual_seed(0)),)

    def held_out(self, datasets: Datasets, size: int) -> Tensors:
        """Images of the validation set, else of the training set, normalised; noise where the run has neither."""
        dataset = datasets.valid if datasets.valid is not None and len(datasets.valid) else datasets.train
        if dataset is None:
            return self.example_inputs(self.config.model, {}, size)
        batch = self.collate([dataset[i] for i in range(min(size, len(dataset)))], min(size, len(dataset)))
        self.check(batch)
        return self.split(batch, torch.device("cpu"))[0]
