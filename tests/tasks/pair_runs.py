"""Small runs that learn which captions belong to which images."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from megatron.config import RunConfig, load_config
from megatron.data import IndexedDatasetBuilder
from megatron.tokenizer import CharLevelTokenizer

PAIRS, CORNERS = 96, ("top left", "top right", "bottom left", "bottom right")
"""Images, and what is bright on them."""
TEMPLATES = ("the {}", "{} is bright")

KEYS: dict[str, Any] = {
    "task": "clip", "image_size": 8, "patch_size": 4, "in_channels": 1, "embed_dim": 12, "num_layers": 2,
    "hidden_size": 16, "num_attention_heads": 2, "qkv_slot_num": 12, "proj_slot_num": 12, "ffn_slot_num": 20,
    "norm": "layernorm_nonparam", "final_norm": "layernorm", "init_method_std": 0.2,
    "text_tower": {"num_layers": 1, "hidden_size": 24, "seq_length": 24}, "tokenizer_type": "CharLevelTokenizer",
    "train_batch_size": 8, "train_iters": 4, "lr_decay_iters": 40, "eval_interval": 4, "eval_iters": 2,
    "log_interval": 1, "num_workers": 0, "warmup": 0.0, "weight_decay": 0.1, "gradient_clipping": 0.5,
    "split": "70,20,10", "scale": [1, 1], "ratio": [1, 1], "crop_pct": 1.0, "hflip": 0.0,
    "distributed_backend": "gloo", "precision": "fp32", "peak_tflops": 1,
    "optimizer": {"type": "Adam", "params": {"lr": 2e-3, "betas": [0.9, 0.95], "eps": 1e-6}},
}  # fmt: skip


def captions_of(number: int, numbered: bool = False) -> list[str]:
    """The two captions of an image; numbered ones are no other image's."""
    start = f"{number} " if numbered else ""
    return [start + template.format(CORNERS[number % len(CORNERS)]) for template in TEMPLATES]


def write_pairs(prefix: Path, numbered: bool = False) -> str:
    """Noise with a bright corner, two captions that say which, and the corner as a label; the prefix of the images."""
    random, tokenizer = np.random.default_rng(0), CharLevelTokenizer()
    with (
        IndexedDatasetBuilder(f"{prefix}_image_document", np.uint8) as images,
        IndexedDatasetBuilder(f"{prefix}_label_document", np.int32) as labels,
        IndexedDatasetBuilder(f"{prefix}_text_document", np.uint16) as texts,
    ):
        for number in range(PAIRS):
            label = number % len(CORNERS)
            pixels = random.integers(0, 128, (8, 8), np.uint8)
            top, left = 4 * (label // 2), 4 * (label % 2)
            pixels[top : top + 4, left : left + 4] += 100
            file = io.BytesIO()
            Image.fromarray(pixels).save(file, "PNG")
            images.add_document(np.frombuffer(file.getvalue(), np.uint8))
            labels.add_document([label])
            captions = captions_of(number, numbered)
            texts.add_sequences([[*tokenizer.encode(caption), tokenizer.eod_id] for caption in captions])
        for builder in (images, labels, texts):
            builder.finalize()
    Path(f"{prefix}_classes.txt").write_text("\n".join(CORNERS) + "\n", encoding="utf-8")
    return f"{prefix}_image_document"


def config_of(data: str, folder: Path, **keys: Any) -> RunConfig:
    return load_config([], {**KEYS, "data_path": data, "save": str(folder), "load": str(folder), **keys})
