"""Several data sets as one, mixed by weight with the greedy rule of Megatron and GPT-NeoX.

At step s (from 0) the data set with the largest error weight * max(s, 1) - taken gives its next sample; the
first one wins a tie. The choices depend on the weights alone, so a longer blend begins with the shorter one. A very
long one may repeat the choices of its first `period` steps, each time with the data sets' next samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from torch.utils.data import Dataset

from megatron.errors import UserError

MAX_DATASETS = 255

_MIN_STRETCH = 1024
_MAX_STRETCHES = 16384
_COUNT_EVERY = 4096


class BlendedDataset(Dataset[npt.NDArray[np.int64]]):
    """`size` samples taken from `datasets` in proportion to `weights` (normalised here; 0 takes nothing).

    dataset_index: uint8 [min(size, period)], the data set of each sample of a period.
    Raises UserError for weights that are negative or all zero, and when a data set is too small.
    """

    def __init__(
        self,
        datasets: Sequence[Dataset[npt.NDArray[np.int64]]],
        weights: Sequence[float],
        size: int,
        period: int | None = None,
    ) -> None:
        if size < 1:
            raise ValueError(f"a blend of {size} samples has nothing to give")
        self.datasets, self.period, self._size = list(datasets), period, size
        self.weights = normalized(weights)
        if not len(self.datasets) == len(self.weights) <= MAX_DATASETS:
            raise UserError(f"data weights: {len(self.weights)} for {len(self.datasets)} data sets (at most 255)")
        self.dataset_index = blend_index(self.weights, min(size, period or size))
        chunks = np.arange(0, len(self.dataset_index), _COUNT_EVERY)
        # Samples taken from each data set before each chunk: turns a position into a sample number without
        # keeping 8 bytes for every sample of the blend.
        counts = [np.add.reduceat(self.dataset_index == i, chunks, dtype=np.int64) for i in range(len(datasets))]
        self._taken = np.concatenate([np.zeros((len(counts), 1), np.int64), np.cumsum(counts, axis=1)], axis=1)
        for i, dataset in enumerate(self.datasets):
            if self._count(i, size) > len(dataset):  # type: ignore[arg-type]
                raise UserError(
                    f"data weights: data set {i} must give {self._count(i, size)} samples and has "
                    f"{len(dataset)}; repeat it for more epochs"  # type: ignore[arg-type]
                )

    def __len__(self) -> int:
        return self._size

    def _count(self, number: int, index: int) -> int:
        """Samples of data set `number` before sample `index`."""
        periods, place = divmod(index, len(self.dataset_index))
        chunk = place // _COUNT_EVERY
        within = np.count_nonzero(self.dataset_index[chunk * _COUNT_EVERY : place] == number)
        return periods * int(self._taken[number, -1]) + int(self._taken[number, chunk]) + int(within)

    def locate(self, index: int) -> tuple[int, int]:
        """(data set, sample number in it) of sample `index`."""
        number = int(self.dataset_index[index % len(self.dataset_index)])
        return number, self._count(number, index)

    def __getitem__(self, index: int) -> npt.NDArray[np.int64]:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        number, sample = self.locate(index)
        return self.datasets[number][sample]

    def origins(self, index: int) -> list[Any]:
        """What sample `index` is made of, as its data set has it."""
        number, sample = self.locate(index)
        dataset: Any = self.datasets[number]
        found: list[Any] = dataset.origins(sample)
        return found

    @property
    def dataset_sample_index(self) -> npt.NDArray[np.int64]:
        """int64, like dataset_index: the sample's number in its data set (computed at each access)."""
        result = np.empty(len(self.dataset_index), np.int64)
        for number in range(len(self.datasets)):
            places = np.flatnonzero(self.dataset_index == number)
            result[places] = np.arange(len(places))
        return result


def normalized(weights: Sequence[float] | npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """The weights divided by their sum. Raises UserError when one is negative or their sum is not positive."""
    values = np.array(weights, dtype=np.float64)
    if not np.isfinite(values).all() or (values < 0).any() or values.sum() <= 0:
        raise UserError(f"data weights: {values.tolist()} must be numbers of at least 0, one of them above 0")
    return values / values.sum()


def weights_by_documents(num_documents: Sequence[int], alpha: float) -> npt.NDArray[np.float64]:
    """Blending weights from document counts as in GPT-NeoX: p^alpha, normalised, times 1 - p, normalised.

    p is a data set's share of the documents. A data set alone has weight 1.
    """
    if len(num_documents) == 1:
        return np.ones(1)
    shares = normalized(num_documents)
    return normalized(normalized(shares**alpha) * (1 - shares))


def blend_index(weights: npt.NDArray[np.float64], size: int) -> npt.NDArray[np.uint8]:
    """The data set of each of `size` steps of the greedy rule: uint8 [size].

    The rule is sequential, so the steps are divided into stretches that run side by side from guessed counts.
    A stretch whose guess differs from what its predecessor ends with runs again from there. Guesses are forgotten
    quickly, so a few rounds do; the result is exact in any case because every joint is checked.
    """
    num_stretches = min(_MAX_STRETCHES, max(1, size // _MIN_STRETCH))
    length = -(-size // num_stretches)
    starts = np.arange(num_stretches, dtype=np.int64) * length
    begin = _fair_counts(weights, starts)
    index = np.empty((num_stretches, length), np.uint8)
    end = np.empty_like(begin)
    todo = np.arange(num_stretches)
    while len(todo):
        index[todo], end[:, todo] = _greedy(weights, starts[todo], begin[:, todo], length)
        todo = 1 + np.flatnonzero((begin[:, 1:] != end[:, :-1]).any(axis=0))
        begin[:, todo] = end[:, todo - 1]
    return index.reshape(-1)[:size]


def _fair_counts(weights: npt.NDArray[np.float64], steps: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Counts [data sets, stretches] that add up to `steps`, by largest remainder."""
    exact = weights[:, None] * steps
    counts = np.floor(exact).astype(np.int64)
    rank = np.argsort(np.argsort(counts - exact, axis=0, kind="stable"), axis=0)
    return counts + (rank < steps - counts.sum(axis=0))


def _greedy(
    weights: npt.NDArray[np.float64], starts: npt.NDArray[np.int64], counts: npt.NDArray[np.int64], length: int
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """(choices [stretches, length], counts afterwards) of all stretches, one step of each at a time."""
    taken = counts.astype(np.float64)
    choices = np.empty((length, len(starts)), np.uint8)
    columns = np.arange(len(starts))
    candidates = np.flatnonzero(weights > 0)  # rounding must never let a data set of weight 0 win a tie
    for offset in range(length):
        step = np.maximum(starts + offset, 1).astype(np.float64)
        choice = np.full(len(starts), candidates[0])
        best = weights[candidates[0]] * step - taken[candidates[0]]
        for number in candidates[1:]:
            error = weights[number] * step - taken[number]
            better = error > best
            choice[better] = number
            np.maximum(best, error, out=best)
        taken[choice, columns] += 1
        choices[offset] = choice
    return choices.T, taken.astype(np.int64)
