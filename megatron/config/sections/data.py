"""Section `data`: training, validation and test data."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field, model_validator

from megatron.config.sections.base import ListedNumber, Section
from megatron.errors import ConfigError
from megatron.text import shortened


class DataConfig(Section):
    """Training, validation and test data."""

    data_path: str | None = None
    """Prefix of one .bin/.idx pair, divided by `split`."""
    train_data_paths: list[str] | None = None
    """Prefixes of training sets to blend (with train_data_weights)."""
    valid_data_paths: list[str] | None = None
    """Prefixes of validation sets."""
    test_data_paths: list[str] | None = None
    """Prefixes of test sets."""
    train_data_weights: list[ListedNumber] | None = None
    """Blending weights of train_data_paths. Default: equal."""
    valid_data_weights: list[ListedNumber] | None = None
    """Blending weights of valid_data_paths. Default: equal."""
    test_data_weights: list[ListedNumber] | None = None
    """Blending weights of test_data_paths. Default: equal."""
    weight_by_num_documents: bool = False
    """Derive the blending weights from the number of documents."""
    weighted_sampler_alpha: float = Field(default=1.0, ge=0, le=1)
    """With weight_by_num_documents: weights follow p^alpha (1 - p), where p is a set's share of the documents;
    below 1 it lifts small sets."""
    split: str = "969, 30, 1"
    """Shares of data_path's documents for training, validation and test."""
    random_split: bool = False
    """Draw the documents of each share at random, with split_seed, instead of taking them in order. Which they are is
    stored beside the data."""
    split_seed: int = Field(default=1234, ge=0, lt=2**32)
    """Of random_split; apart from `seed`, so that runs with other seeds hold out the same documents."""
    sample_order: Literal["documents", "random_segments"] = "documents"
    """Training samples: documents, shuffled, one after the other, each token once an epoch; or random_segments, which
    begin anywhere in the training documents, drawn for each sample by itself."""
    data_impl: Literal["mmap", "infer"] = "mmap"
    """Format of the data files; only memory-mapped .bin/.idx exist here."""
    num_workers: int = Field(default=2, ge=0, le=1024)
    """Loader processes per training process; 0 loads in the training process."""
    data_cache_dir: str | None = None
    """Folder for the sample-order files. Default: beside the data."""

    @model_validator(mode="after")
    def _check(self) -> DataConfig:
        for name in ("train", "valid", "test"):
            paths, weights = getattr(self, f"{name}_data_paths"), getattr(self, f"{name}_data_weights")
            if weights is not None and len(weights) != len(paths or []):
                reason = f"{len(weights)} weights for {len(paths or [])} {name}_data_paths"
                advice, beside = "give one weight for each path", [f"{name}_data_paths"]
                raise ConfigError(f"{name}_data_weights", reason, advice, beside=beside)
            if weights is not None and (min(weights, default=0) < 0 or not 0 < sum(weights) < math.inf):
                reason = f"{shortened(weights)}: each must be at least 0, and one of them above 0"
                raise ConfigError(f"{name}_data_weights", reason)
        if self.random_split and not self.data_path:
            raise ConfigError("random_split", "divides the documents of data_path", "give one", beside=["data_path"])
        if self.data_path and self.train_data_paths:
            raise ConfigError("train_data_paths", "data_path is given too", "keep one of them", beside=["data_path"])
        return self
