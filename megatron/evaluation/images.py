"""What a classifier takes images for: each image of a set once, by processes that share them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from megatron.data.image_batch import PADDING
from megatron.data.images import ImageDataset
from megatron.data.loader import batches as micro_batches
from megatron.evaluation.batching import Batches
from megatron.evaluation.zero_shot import ZeroShotClassifier
from megatron.model.forward_only import evaluating, overflow
from megatron.model.vision_model import VisionModel
from megatron.mpu import ALONE, Axis
from megatron.mpu.collectives import gather_objects
from megatron.tasks import ImageClassificationTask

Integers = npt.NDArray[np.int64]
_BEST = 5  # that top-5 counts


@dataclass(frozen=True)
class Predictions:
    """What a model takes the images of a set for, in the order of the set; arrays of length n."""

    labels: Integers
    """The true classes."""
    classes: Integers
    """The most likely ones."""
    in_best: npt.NDArray[np.bool_]
    """Is the true class one of the five most likely ones?"""
    losses: npt.NDArray[np.float64]
    """Cross-entropy of the true class, in nats."""

    @property
    def correct(self) -> npt.NDArray[np.bool_]:
        """Is the true class the most likely one? [n]"""
        return self.classes == self.labels

    def metrics(self) -> dict[str, float]:
        """Means over the images and their standard errors: acc, acc_stderr, acc5, acc5_stderr, loss, loss_stderr."""
        found: dict[str, float] = {}
        for name, values in (("acc", self.correct), ("acc5", self.in_best), ("loss", self.losses)):
            found[name], found[f"{name}_stderr"] = mean_and_error(values)
        return found

    def confusion(self, num_classes: int) -> Integers:
        """How many images of each class (row) are taken for each class (column), [classes, classes]."""
        pairs = self.labels * num_classes + self.classes
        return np.bincount(pairs, minlength=num_classes**2).reshape(num_classes, num_classes)

    def of_classes(self, num_classes: int) -> list[Mapping[str, float | int]]:
        """Of each class its `class`, `num_images`, and where there are some `acc` and `acc_stderr`.

        Where some are wrong, `taken_for` is the class that most of these are taken for (the first of several), and
        `taken` how many are.
        """
        order = np.argsort(self.labels, kind="stable")
        starts = np.searchsorted(self.labels[order], np.arange(num_classes + 1))
        return [
            _of_class(number, self.classes[order[first:end]])
            for number, (first, end) in enumerate(zip(starts, starts[1:], strict=False))
        ]


def _of_class(number: int, taken_for: Integers) -> Mapping[str, float | int]:
    """taken_for: of the images of class `number`."""
    found: dict[str, float | int] = {"class": number, "num_images": len(taken_for)}
    if len(taken_for):
        found["acc"], found["acc_stderr"] = mean_and_error(taken_for == number)
    wrong, counts = np.unique(taken_for[taken_for != number], return_counts=True)
    if len(wrong):
        found["taken_for"], found["taken"] = int(wrong[counts.argmax()]), int(counts.max())
    return found


def mean_and_error(values: npt.NDArray[np.generic]) -> tuple[float, float]:
    """Mean and its standard error, s / sqrt(n) with s^2 over n - 1 as in lm-eval; not a number for a single value."""
    numbers = values.astype(np.float64)
    error = numbers.std(ddof=1) / math.sqrt(len(numbers)) if len(numbers) > 1 else math.nan
    return float(numbers.mean()), float(error)


def classify(
    model: VisionModel | ZeroShotClassifier,
    task: ImageClassificationTask,
    dataset: ImageDataset,
    batches: Batches | None = None,
    axis: Axis = ALONE,
    num_workers: int = 0,
    progress: str = "",
) -> Predictions:
    """What `model` takes every image of `dataset` for, on every rank of `axis`. Collective.

    Args:
        task: of such a model; it normalises the images.
        batches: how many images are computed together; default 8. More are loaded together, and never fewer.
        axis: processes that share the images.
        num_workers: loader processes; 0 loads in this one.
        progress: name of a progress bar; "" shows none.

    Raises: UserError for an image that is broken and for logits that are not finite.
    """
    batches, tokens = batches or Batches(8), model.config.tokens_per_sample()
    size = batches.size or max(1, batches.tokens // tokens)
    stream = micro_batches(dataset, size, 0, axis.rank, axis.size, 0, num_workers, task.collate)
    mine = []
    with evaluating(model), tqdm(desc=progress, unit="image", total=len(dataset), disable=not progress) as bar:
        for batch in stream:
            task.check(batch)
            mine += batches.run(range(size), lambda _: tokens, partial(_outcomes, model, task, batch))
            bar.update(min(size * axis.size, len(dataset) - bar.n))
    rows = np.array(gather_objects(mine, axis))  # [ranks, micro-batches * size, 4]
    in_order = rows.reshape(axis.size, -1, size, 4).transpose(1, 0, 2, 3).reshape(-1, 4)[: len(dataset)]
    labels, classes, in_best, losses = in_order.T
    assert (labels != PADDING).all(), "what fills up the last batches comes last"
    return Predictions(labels.astype(np.int64), classes.astype(np.int64), in_best.astype(np.bool_), losses)


def _outcomes(
    model: VisionModel | ZeroShotClassifier, task: ImageClassificationTask, batch: dict[str, Tensor], rows: list[int]
) -> list[list[float]]:
    """(label, most likely class, is the label among the five most likely, loss) of these rows of a micro-batch."""
    device = next(model.parameters()).device
    (images,), (labels,) = task.split({name: tensor[rows] for name, tensor in batch.items()}, device)
    logits = model(images)
    if not logits.isfinite().all():
        raise overflow(logits.dtype)
    losses = F.cross_entropy(logits.float(), labels, ignore_index=PADDING, reduction="none")
    best = logits.topk(min(_BEST, logits.shape[1])).indices  # [rows, 5]
    in_best = (best == labels[:, None]).any(1)
    columns = (labels, best[:, 0], in_best, losses)
    found: list[list[float]] = torch.stack([column.double() for column in columns], 1).tolist()
    return found
