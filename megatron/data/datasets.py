"""From the data section of a configuration to the training, validation and test set of a language model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron.config.sections.data import DataConfig
from megatron.data.blend import BlendedDataset, normalized, weights_by_documents
from megatron.data.indexed import IndexedDataset
from megatron.data.random_split import drawn_documents
from megatron.data.samples import WHOLE_ORDER_SAMPLES, Documents, GPTDataset, split_documents, split_shares
from megatron.data.segments import RandomSegments
from megatron.errors import UserError
from megatron.log import get_logger

SPLIT_NAMES = ("train", "valid", "test")
BLEND_MARGIN = 1.005
"""Each part of a blend is sized for 0.5 % more than its share, as GPT-NeoX does; it decides the epochs."""

BLEND_PERIOD = 1 << 24
"""Steps after which a blend of more than WHOLE_ORDER_SAMPLES samples repeats its choices."""

AnyDataset = GPTDataset | RandomSegments | BlendedDataset


@dataclass(frozen=True)
class Datasets:
    """A run's data sets, each with a length and items by number; None where no samples were asked for."""

    train: Any
    valid: Any
    test: Any
    epoch_blocks: dict[str, list[int]] = field(default_factory=dict)
    """By "train/0", "train/1", "valid/0" ...: to be saved with the run and handed back when it resumes. Of very long
    runs also "train/0/later", the epochs of each block that follows, and "train/period", that of the blend."""


def build_datasets(
    data: DataConfig,
    seq_length: int,
    seed: int,
    samples: Sequence[int],
    epoch_blocks: Mapping[str, Sequence[int]] | None = None,
) -> Datasets:
    """The data sets that a data section names.

    The test set is optional: without test_data_paths, or without documents in its split, it is None.

    Args:
        seq_length: tokens of a sample, less the one that the last of them predicts.
        seed: of the order of samples.
        samples: how many of training, validation and test have to be there at least (0: not built).
        epoch_blocks: `Datasets.epoch_blocks` of the run that goes on.

    Raises: UserError when data is missing, damaged or too small.
    """
    saved, blocks = epoch_blocks or {}, dict[str, list[int]]()
    built: dict[str, AnyDataset | None] = {}
    for name, count in zip(SPLIT_NAMES, samples, strict=True):
        parts = parts_of(data, name) if count else []
        build = _Builder(data, seq_length, seed, name, saved)
        built[name] = build(parts, count) if parts else None
        # A set that is not built now, as the validation set of a run without evaluation, keeps its order for later.
        kept = {key: list(value) for key, value in saved.items() if key.startswith(f"{name}/") and not parts}
        blocks.update(_order_of(name, built[name]) or kept)
    return Datasets(**built, epoch_blocks=blocks)


@dataclass(frozen=True)
class Part:
    """Documents of a corpus: (first, end), or the numbers of those that were drawn."""

    indexed: IndexedDataset
    documents: Documents

    @property
    def span(self) -> tuple[int, int]:
        """(first, end) of documents that follow each other."""
        assert isinstance(self.documents, tuple), "random_split is refused where this is asked"
        return self.documents


def parts_of(data: DataConfig, name: str) -> list[Part]:
    """What the split `name` is made of; empty when an optional one has nothing."""
    if data.data_path:
        return _of_split(data, data.data_path, name)
    paths: list[str] | None = getattr(data, f"{name}_data_paths")
    if paths:
        opened = [IndexedDataset(path) for path in paths]
        return [Part(indexed, (0, len(indexed))) for indexed in opened]
    if name == "test":
        return []
    if not data.train_data_paths:
        raise UserError("data_path: missing; give the prefix of a .bin/.idx pair, or train_data_paths")
    raise UserError(f"{name}_data_paths: missing; give {name}_data_paths, or eval_iters: 0 for no validation")


def _of_split(data: DataConfig, prefix: str, name: str) -> list[Part]:
    indexed, split, number = IndexedDataset(prefix), data.split, SPLIT_NAMES.index(name)
    first, end = split_documents(split, len(indexed))[number]
    if end > first and data.random_split:
        return [Part(indexed, drawn_documents(indexed, split, data.split_seed, data.data_cache_dir)[number])]
    if end > first:
        return [Part(indexed, (first, end))]
    if name == "test":
        if split_shares(split)[number]:
            get_logger().info(f"split: '{split}' of {len(indexed)} documents leaves no test documents; no test set")
        return []
    hint = ", or set eval_iters: 0 for no validation" if name == "valid" else ""
    raise UserError(
        f"split: '{split}' gives {name} none of the {len(indexed)} documents of {prefix}; raise its share{hint}"
    )


@dataclass(frozen=True)
class _Builder:
    """Builds the set `name` of its parts."""

    data: DataConfig
    seq_length: int
    seed: int
    name: str
    saved: Mapping[str, Sequence[int]]

    def __call__(self, parts: list[Part], count: int) -> AnyDataset:
        weights = self._weights(parts)
        period = self._period(count) if len(parts) > 1 else None
        # A period's choices are rounded; what that adds grows with the number of periods.
        rounding = -(-count // period) if period else 0
        datasets: list[GPTDataset | RandomSegments] = []
        for number, (part, weight) in enumerate(zip(parts, weights, strict=True)):
            needed = count if self.data.data_path else math.ceil(count * weight * BLEND_MARGIN) + rounding
            if self.name == "train" and self.data.sample_order == "random_segments":
                datasets.append(
                    RandomSegments(part.indexed, self.seq_length, self.seed, needed, part.documents, number)
                )
                continue
            later_block = self._saved(f"{number}/later") or [0]
            datasets.append(
                GPTDataset(
                    part.indexed, self.seq_length, self.seed, needed, documents=part.documents,
                    epoch_blocks=self._saved(f"{number}"), cache_dir=self.data.data_cache_dir,
                    later_block=later_block[0],
                )
            )  # fmt: skip
        return datasets[0] if len(datasets) == 1 else BlendedDataset(datasets, weights.tolist(), count, period)

    def _weights(self, parts: list[Part]) -> npt.NDArray[np.float64]:
        if self.data.weight_by_num_documents:
            return weights_by_documents([len(part.indexed) for part in parts], self.data.weighted_sampler_alpha)
        given = getattr(self.data, f"{self.name}_data_weights") if not self.data.data_path else None
        return normalized(given or [1.0] * len(parts))

    def _period(self, count: int) -> int | None:
        """Steps after which a blend repeats its choices; None where it never does."""
        if period := self._saved("period"):
            return period[0]
        if count <= WHOLE_ORDER_SAMPLES:
            return None
        # A run that goes on may have consumed as many, and keeps their order.
        return WHOLE_ORDER_SAMPLES if f"{self.name}/0" in self.saved else BLEND_PERIOD

    def _saved(self, what: str) -> list[int]:
        """What the run recorded of this set, if it did. Raises UserError unless it is a list of positive numbers."""
        key = f"{self.name}/{what}"
        values = self.saved.get(key, [])
        if not isinstance(values, (list, tuple)) or not all(type(value) is int and value > 0 for value in values):
            raise UserError(
                f"epoch_blocks: the checkpoint's '{key}' is no list of positive numbers; load an earlier one"
            )
        return list(values)


def _order_of(name: str, dataset: AnyDataset | None) -> dict[str, list[int]]:
    """What decides a data set's order besides the configuration, see Datasets.epoch_blocks; segments need nothing."""
    order: dict[str, list[int]] = {}
    for number, leaf in enumerate(_leaves(dataset)):
        order[f"{name}/{number}"] = leaf.epoch_blocks
        if leaf.later_block:
            order[f"{name}/{number}/later"] = [leaf.later_block]
    if isinstance(dataset, BlendedDataset) and dataset.period:
        order[f"{name}/period"] = [dataset.period]
    return order


def stored_orders(dataset: Any) -> int:
    """Write the files of sample order of a set that are not there yet; how many parts are kept in files."""
    return sum(leaf.store_order() for leaf in _leaves(dataset) if isinstance(leaf, GPTDataset))


def _leaves(dataset: AnyDataset | None) -> list[GPTDataset]:
    if isinstance(dataset, BlendedDataset):
        return [part for part in dataset.datasets if isinstance(part, GPTDataset)]
    return [dataset] if isinstance(dataset, GPTDataset) else []
