"""A small model and the published ones, as the planner reads them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron.config import RunConfig, load_config
from megatron.planner import MACHINES, Workload

ROOT = Path(__file__).parents[2]
SMALL: dict[str, Any] = {
    "num_layers": 3, "hidden_size": 64, "num_attention_heads": 4, "seq_length": 256, "rotary_pct": 0.25,
    "norm": "layernorm_nonparam", "final_norm": "layernorm", "padded_vocab_size": 512, "precision": "fp32",
    "train_micro_batch_size_per_gpu": 2,
}  # fmt: skip
TOKENS = {"qkv_slot_num": 64, "proj_slot_num": 96, "ffn_slot_num": 256}
H200 = MACHINES["H200-141GB"]
PUBLISHED = ("tokenformer/150M", "tokenformer/1-5B", "transformer/450M")


def small(kind: str = "tokenformer", **overrides: Any) -> Workload:
    return Workload.of(load_config([], {**SMALL, **(TOKENS if kind == "tokenformer" else {}), **overrides}))


def published(name: str, **overrides: Any) -> RunConfig:
    keys = {"padded_vocab_size": 50304, "train_batch_size": 1024, "gradient_accumulation_steps": None, **overrides}
    return load_config([ROOT / f"configs/{name}_train_pile.yml"], keys)
