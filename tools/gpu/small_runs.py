"""Small training runs for the checks: made-up text, a model of a few megabytes, and what a run wrote."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from megatron.config import RunConfig, load_config
from megatron.data import IndexedDatasetBuilder
from megatron.training import train
from tools.gpu.running import Settings

EOD = 0
_MODEL = {
    "norm": "layernorm_nonparam", "final_norm": "layernorm", "output_layer_init_method": "wang_init",
    "rotary_pct": 0.25, "tokenizer_type": "CharLevelTokenizer", "make_vocab_size_divisible_by": 64,
    "lr_decay_style": "cosine", "warmup": 0.1, "min_lr": 1e-4, "gradient_clipping": 1.0, "weight_decay": 0.1,
    "eval_iters": 1, "log_interval": 1, "num_workers": 0, "split": "90,10,0", "seed": 1,
    "optimizer": {"type": "Adam", "params": {"lr": 1e-3, "betas": [0.9, 0.95]}},
}  # fmt: skip
_SIZES: dict[bool, dict[str, Any]] = {
    True: {
        "num_layers": 2, "hidden_size": 32, "num_attention_heads": 2, "seq_length": 16, "qkv_slot_num": 32,
        "proj_slot_num": 32, "ffn_slot_num": 64, "train_micro_batch_size_per_gpu": 4, "train_iters": 8,
    },
    False: {
        "num_layers": 4, "hidden_size": 256, "num_attention_heads": 4, "seq_length": 256, "qkv_slot_num": 256,
        "proj_slot_num": 256, "ffn_slot_num": 1024, "train_micro_batch_size_per_gpu": 8, "train_iters": 30,
    },
}  # fmt: skip


def corpus(settings: Settings, vocabulary: int = 256, tokens: int = 400_000) -> str:
    """Prefix of a .bin/.idx pair: documents that repeat patterns of several lengths, which a model learns quickly."""
    prefix = str(Path(settings.folder) / f"corpus_{vocabulary}")
    if not Path(f"{prefix}.idx").exists():
        random = np.random.RandomState(0)
        builder = IndexedDatasetBuilder(prefix, np.uint16)
        patterns = [random.randint(1, vocabulary, size=size) for size in (5, 7, 11, 31)]
        for number in range(tokens // 1000):
            builder.add_document([*np.resize(patterns[number % 4], 999).tolist(), EOD])
        builder.finalize()
    return prefix


def small_config(settings: Settings, name: str, **keys: Any) -> RunConfig:
    """The configuration of a small run that writes to the folder `name`; `keys` override."""
    folder = str(Path(settings.folder) / name)
    backend = "nccl" if settings.device == "cuda" else "gloo"
    base = {**_MODEL, **_SIZES[settings.toy], "data_path": corpus(settings), "distributed_backend": backend}
    base |= {"save": folder, "load": folder, "eval_interval": base["train_iters"]}
    return load_config([], {**base, **keys})


def train_small(settings: Settings, name: str, **keys: Any) -> list[float]:
    """Train a small run; its losses, the held-out one last."""
    config = small_config(settings, name, **keys)
    train(config)
    return losses(Path(settings.folder) / name)


def losses(folder: Path) -> list[float]:
    """Training losses by iteration, then validation losses, as metrics.jsonl has them."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["lm_loss"] for line in lines if "lm_loss" in line] + [
        line["valid_lm_loss"] for line in lines if "valid_lm_loss" in line
    ]


def worst(found: list[float], expected: list[float]) -> float:
    """The largest difference; infinite when one run is shorter."""
    if len(found) != len(expected):
        return float("inf")
    return max(abs(a - b) for a, b in zip(found, expected, strict=True))


def reference(settings: Settings) -> list[float]:
    """Losses of the CPU's fp32 run, which the part `reference` has left."""
    file = Path(settings.folder) / "reference.json"
    if not file.exists():
        raise RuntimeError("there are no losses of the CPU to compare with: the part `reference` failed")
    found: list[float] = json.loads(file.read_text())
    return found
