"""What several tests of data/ share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from megatron.config.schema import RunConfig
from megatron.config.sections.data import DataConfig
from megatron.config.sections.model import ModelConfig
from megatron.config.sections.training import TrainingConfig
from megatron.data import IndexedDataset, IndexedDatasetBuilder

FIXTURES = Path(__file__).parents[1] / "fixtures" / "data"
CORPUS = FIXTURES / "corpus"


def write_corpus(prefix: Path, sizes: list[int], dtype: type = np.uint16) -> IndexedDataset:
    """A pair whose token ids count on through all documents."""
    with IndexedDatasetBuilder(prefix, dtype) as builder:
        start = 0
        for size in sizes:
            builder.add_document(np.arange(start, start + size))
            start += size
        builder.finalize()
    return IndexedDataset(prefix)


def run_config(seq_length: int = 64, **data: Any) -> RunConfig:
    """A small run with these data keys."""
    model = ModelConfig(num_layers=1, hidden_size=8, num_attention_heads=1, seq_length=seq_length)
    return RunConfig(model=model, data=DataConfig(**data), training=TrainingConfig(seed=1234))
