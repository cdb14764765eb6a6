"""Token files, sample order, blending and loading; preprocessing is in megatron.data.preprocess.

Names are looked up when they are used: preparing text needs no torch, which takes longer to import than some corpora to
prepare.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron.data.blend import BlendedDataset
    from megatron.data.datasets import Datasets, build_datasets
    from megatron.data.indexed import IndexedDataset, IndexedDatasetBuilder
    from megatron.data.loader import batches
    from megatron.data.samples import GPTDataset

__all__ = [
    "BlendedDataset",
    "Datasets",
    "GPTDataset",
    "IndexedDataset",
    "IndexedDatasetBuilder",
    "batches",
    "build_datasets",
]

_PLACES = {
    "BlendedDataset": "blend", "Datasets": "datasets", "GPTDataset": "samples", "IndexedDataset": "indexed",
    "IndexedDatasetBuilder": "indexed", "batches": "loader", "build_datasets": "datasets",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(importlib.import_module(f"{__name__}.{_PLACES[name]}"), name)
    globals()[name] = found
    return found
