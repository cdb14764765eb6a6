"""Small runs that learn to say where an image is bright."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from megatron.config import RunConfig, load_config
from megatron.config.sections.tokenizer import TokenizerConfig
from megatron.data.captions import Caption
from megatron.data.image_sources import ImageRecord, Listing
from megatron.data.prepare_images import Faults, prepare_images
from megatron.exchange import Checkpoint, canonical
from megatron.model.compatibility import described_model
from megatron.model.init import InitialTensors

CORNERS = ("up", "left", "right", "down")
IMAGES = 50
"""Of the data; its validation and its test set have 5 images each."""

_OPTIMIZER = {"type": "Adam", "params": {"lr": 4e-3, "betas": [0.9, 0.95], "eps": 1e-6}}
COMMON: dict[str, Any] = {
    "num_layers": 2, "hidden_size": 32, "num_attention_heads": 2, "qkv_slot_num": 24, "proj_slot_num": 24,
    "ffn_slot_num": 40, "norm": "layernorm_nonparam", "final_norm": "layernorm", "init_method_std": 0.1,
    "train_batch_size": 8, "train_iters": 5, "lr_decay_iters": 40, "eval_interval": 5, "eval_iters": 1,
    "log_interval": 1, "num_workers": 0, "warmup": 0.0, "weight_decay": 0.1, "gradient_clipping": 0.5,
    "split": "80,10,10", "distributed_backend": "gloo", "precision": "fp32", "peak_tflops": 1,
    "optimizer": _OPTIMIZER,
}  # fmt: skip
TEXT: dict[str, Any] = {
    **COMMON, "seq_length": 16, "rotary_pct": 0.5, "tokenizer_type": "CharLevelTokenizer",
    "make_vocab_size_divisible_by": 64,
}  # fmt: skip
TOWER: dict[str, Any] = {
    "image_size": 8, "patch_size": 4, "in_channels": 1, "num_layers": 1, "hidden_size": 16, "num_attention_heads": 2,
    "qkv_slot_num": 12, "proj_slot_num": 12, "ffn_slot_num": 20, "norm": "layernorm_nonparam",
    "final_norm": "layernorm", "init_method_std": 0.1,
}  # fmt: skip
IMAGE: dict[str, Any] = {**COMMON, **TOWER, "task": "image_classification", "num_classes": 4}
PLAIN = {"scale": [1, 1], "ratio": [1, 1], "crop_pct": 1.0, "hflip": 0.0}
KEYS: dict[str, Any] = {**TEXT, **PLAIN, "task": "image_to_text", "image_tower": TOWER, "connector_slot_num": 20}
LEARNING: dict[str, Any] = {
    "image_tower": {**TOWER, "hidden_size": 32, "qkv_slot_num": 24, "proj_slot_num": 24, "ffn_slot_num": 40},
    "train_batch_size": 16, "train_iters": 90, "lr_decay_iters": 90, "eval_interval": 90, "weight_decay": 0.0,
    "optimizer": {"type": "Adam", "params": {"lr": 8e-3, "betas": [0.9, 0.95]}},
}  # fmt: skip
"""Of a run that learns to tell all corners apart."""
MORE = {"qkv_slot_num": 32, "proj_slot_num": 32, "ffn_slot_num": 56, "row_norm": "segment"}
"""Token counts of the language model with some added."""


def write_captioned_images(folder: Path) -> str:
    """Noise with a bright corner, two captions each and the answer to a question; the prefix of the images."""
    random, records = np.random.default_rng(0), []
    for number in range(IMAGES):
        corner = number % 4
        pixels = random.integers(0, 128, (8, 8), np.uint8)
        top, left = 4 * (corner // 2), 4 * (corner % 2)
        pixels[top : top + 4, left : left + 4] += 100
        word = CORNERS[corner]
        captions = Caption(word), Caption(f"it is {word}"), Caption(f" {word}", "where?")
        records.append(ImageRecord(f"image {number}", pixels, corner, captions))
    tokenizer = TokenizerConfig(tokenizer_type="CharLevelTokenizer")
    return prepare_images(Listing(records), folder / "corners", tokenizer, Faults(False)).prefixes["image"]


def config_of(data: str, folder: Path, **keys: Any) -> RunConfig:
    return load_config([], {**KEYS, "data_path": data, "save": str(folder), "load": str(folder), **keys})


def write_tower(folder: Path, **keys: Any) -> str:
    """The checkpoint of a model of such keys, as it is made; its folder."""
    config = load_config([], keys)
    if "tokenizer_type" in keys:
        config = config.with_vocabulary(512)
    tensors = InitialTensors(described_model(config.model), config.model, seed=5)
    canonical.write(folder, Checkpoint(folder, config.model, tensors, config.flat()))
    return str(folder)
