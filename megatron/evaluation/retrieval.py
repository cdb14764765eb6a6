"""Which texts a model of pairs finds for an image, and which image for a text, among all of a set."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from megatron.data.loader import batches as micro_batches
from megatron.model.clip_model import ClipModel
from megatron.mpu import ALONE, Axis
from megatron.mpu.collectives import gather_objects
from megatron.tasks.clip import ClipTask

if TYPE_CHECKING:
    from megatron.data.image_text import ImageTextDataset

BEST = (1, 5, 10)
"""Numbers of candidates among which a partner is looked for."""

_ROWS_AT_ONCE = 1024


@dataclass(frozen=True)
class SetFeatures:
    """Features of a set of captioned images, on the CPU."""

    images: Tensor
    """[n, e]."""
    texts: Tensor
    """[m, e], of all captions."""
    owners: Tensor
    """The image of each caption, [m]."""


@torch.no_grad()
def features_of_set(
    model: ClipModel,
    task: ClipTask,
    dataset: ImageTextDataset,
    size: int = 8,
    axis: Axis = ALONE,
    num_workers: int = 0,
) -> SetFeatures:
    """Features of each image and of all its captions, on every rank of `axis`. Collective.

    Args:
        model: in evaluation mode.
        task: that it has learned.
        dataset: every image once.
        size: images, or texts, computed at once.
        axis: processes that share the images, and the captions of their images.
        num_workers: loader processes; 0 loads in this one.
    """
    device, images = next(model.parameters()).device, list[Tensor]()
    for batch in micro_batches(dataset, size, 0, axis.rank, axis.size, 0, num_workers, task.collate):
        task.check(batch)
        images.append(model.image_features(task.split(batch, device)[0][0]).cpu())
    # Micro-batch after micro-batch, one of each rank: what fills up the last ones comes last.
    everyone = torch.stack([torch.as_tensor(part) for part in gather_objects(torch.stack(images).numpy(), axis)], 1)
    first, last = axis.share(len(dataset))
    texts, owners = list[Tensor](), list[int]()
    for ids, of in _captions(task, dataset, range(first, last), size):
        texts.append(model.text_features(ids.to(device)).cpu())
        owners += of
    own = torch.cat(texts) if texts else torch.empty(0, model.config.embed_dim)
    parts = gather_objects((own.numpy(), owners), axis)
    return SetFeatures(
        everyone.flatten(0, 2)[: len(dataset)],
        torch.cat([torch.as_tensor(part) for part, _ in parts]),
        torch.tensor([owner for _, of in parts for owner in of]),
    )


def _captions(
    task: ClipTask, dataset: ImageTextDataset, images: Sequence[int], size: int
) -> Iterator[tuple[Tensor, list[int]]]:
    """Token ids of the captions of these images, [size, s] at most at once, and the image of each."""
    rows: list[tuple[int, dict[str, Any]]] = [
        (image, caption.padded(task.text_shape)) for image in images for caption in dataset.captions(image)
    ]
    for first in range(0, len(rows), size):
        some = rows[first : first + size]
        ids, ends = (torch.stack([row[key] for _, row in some]) for key in ("ids", "end"))
        yield task.texts.of_ids(ids, ends), [image for image, _ in some]


def recalls(features: SetFeatures, axis: Axis = ALONE) -> dict[str, np.ndarray[Any, Any]]:
    """For each image, and for each text, whether a partner is among the best candidates. Collective.

    Args:
        axis: processes that share the images and texts.

    Returns: `text_retrieval_recall@k` [n]: is one of an image's own texts among the k that are most like it?
        `image_retrieval_recall@k` [m]: is a text's own image among the k images that are most like it?
    """
    numbers = torch.arange(len(features.images))
    of_images = _hits(features.images, features.texts, numbers, features.owners, axis)
    of_texts = _hits(features.texts, features.images, features.owners, numbers, axis)
    found = {f"text_retrieval_recall@{k}": hits for k, hits in zip(BEST, of_images.T, strict=True)}
    return found | {f"image_retrieval_recall@{k}": hits for k, hits in zip(BEST, of_texts.T, strict=True)}


def _hits(asking: Tensor, candidates: Tensor, keys: Tensor, owners: Tensor, axis: Axis) -> np.ndarray[Any, Any]:
    """Of each that asks, whether a candidate with its key is among the best ones, bool [asking, len(BEST)]."""
    first, last = axis.share(len(asking))
    mine = [np.zeros((0, len(BEST)), dtype=bool)]
    for start in range(first, last, _ROWS_AT_ONCE):
        rows = slice(start, min(start + _ROWS_AT_ONCE, last))
        best = (asking[rows] @ candidates.T).topk(min(max(BEST), len(candidates))).indices
        is_own = owners[best] == keys[rows, None]
        mine.append(torch.stack([is_own[:, :k].any(1) for k in BEST], 1).numpy())
    return np.concatenate(gather_objects(np.concatenate(mine), axis))
