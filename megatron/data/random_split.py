"""Documents drawn at random for training, validation and test."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

from megatron.data.index_cache import Arrays, cached_arrays, corpus_identity
from megatron.data.indexed import IndexedDataset
from megatron.data.samples import split_documents


def drawn_documents(
    indexed: IndexedDataset, split: str, seed: int, cache_dir: str | Path | None = None
) -> tuple[npt.NDArray[np.integer], ...]:
    """Numbers of the training, validation and test documents, int32 and ascending; each document is in one of them.

    They depend on the number of documents, the shares and the seed alone, and are stored as
    `{prefix}_split_*.npy`, where whoever evaluates a model finds what it was not trained on.

    Args:
        split: shares, as in the key of this name.
        cache_dir: folder of the files; default beside the data.

    Raises: UserError when `split` is not of its form.
    """
    bounds = split_documents(split, len(indexed))

    def draw() -> Arrays:
        # This generator's results are the same on every machine and in every version of numpy.
        order = np.random.RandomState(seed).permutation(len(indexed)).astype(np.int32)
        return tuple(np.sort(order[first:end]) for first, end in bounds)

    prefix = Path(indexed.prefix)
    what = f"{corpus_identity(indexed)}/random split/{bounds}/{seed}"
    folder = Path(cache_dir) if cache_dir else prefix.parent
    return cached_arrays(folder, f"{prefix.name}_split", what, ("train", "valid", "test"), draw)
