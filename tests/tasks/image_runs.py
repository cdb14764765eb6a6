"""Small runs that learn to classify images."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from megatron.config import RunConfig, load_config
from megatron.data import IndexedDatasetBuilder

CLASSES, IMAGES = 4, 70
"""Of the data; its validation and its test set have 7 images each, which no batch divides."""

KEYS: dict[str, Any] = {
    "task": "image_classification", "image_size": 8, "patch_size": 2, "in_channels": 1, "num_classes": CLASSES,
    "num_layers": 2, "hidden_size": 32, "num_attention_heads": 2, "qkv_slot_num": 24, "proj_slot_num": 24,
    "ffn_slot_num": 40, "norm": "layernorm_nonparam", "final_norm": "layernorm", "init_method_std": 0.1,
    "train_batch_size": 8, "train_iters": 5, "lr_decay_iters": 40, "eval_interval": 5, "eval_iters": 1,
    "log_interval": 1, "num_workers": 0, "warmup": 0.0, "weight_decay": 0.1, "gradient_clipping": 0.5,
    "split": "80,10,10", "scale": [1, 1], "ratio": [1, 1], "crop_pct": 1.0, "hflip": 0.0,
    "distributed_backend": "gloo", "precision": "fp32", "peak_tflops": 1,
    "optimizer": {"type": "Adam", "params": {"lr": 2e-3, "betas": [0.9, 0.95], "eps": 1e-6}},
}  # fmt: skip


def write_images(prefix: Path, labels: list[int] | None = None) -> str:
    """Noise with a bright corner, which is the class; the prefix of the images."""
    random = np.random.default_rng(0)
    with (
        IndexedDatasetBuilder(f"{prefix}_image_document", np.uint8) as images,
        IndexedDatasetBuilder(f"{prefix}_label_document", np.int32) as classes,
    ):
        for number in range(IMAGES):
            label = number % CLASSES
            pixels = random.integers(0, 128, (8, 8), np.uint8)
            top, left = 4 * (label // 2), 4 * (label % 2)
            pixels[top : top + 4, left : left + 4] += 100
            file = io.BytesIO()
            Image.fromarray(pixels).save(file, "PNG")
            images.add_document(np.frombuffer(file.getvalue(), np.uint8))
            classes.add_document([label if labels is None else labels[number]])
        images.finalize()
        classes.finalize()
    return f"{prefix}_image_document"


def config_of(data: str, folder: Path, **keys: Any) -> RunConfig:
    return load_config([], {**KEYS, "data_path": data, "save": str(folder), "load": str(folder), **keys})
