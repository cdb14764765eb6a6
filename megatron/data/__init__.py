"""Token files, sample order, blending and loading; preprocessing is in megatron.data.preprocess."""

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
