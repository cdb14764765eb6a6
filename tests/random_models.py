"""Tiny random models and configurations, for the tests of inference and evaluation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from megatron.checkpoint.pieces import whole_pieces
from megatron.checkpoint.state import CanonicalState
from megatron.checkpoint.store import RunFolder
from megatron.config import RunConfig
from megatron.config.build import SECTION_OF
from megatron.config.schema import SECTIONS
from megatron.model import LanguageModel
from megatron.model.build import build_model
from megatron.mpu import SINGLE, Layout

TOKENFORMER = {"qkv_slot_num": 24, "proj_slot_num": 20, "ffn_slot_num": 40, "norm": "layernorm_nonparam"}
# Two growths; the tokens of the first have a row norm of their own, those of the second share it, where there are any.
OWN_NORMS: dict[str, Any] = {
    "token_segments": {"qkv": [[10, 6, 8]] * 2, "proj": [[12, 8, 0], [12, 0, 8]], "ffn": [[19, 12, 9]] * 2},
    "segment_norms": ["joint", "segment", "joint"],
}


def make_config(**keys: Any) -> RunConfig:
    """A RunConfig of a tiny TokenFormer for CharLevelTokenizer, with 128 padded rows; flat keys override it."""
    flat = {
        "num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "seq_length": 48, "rotary_pct": 0.25,
        "final_norm": "layernorm", "init_method_std": 0.6, "padded_vocab_size": 640, **TOKENFORMER,
        "tokenizer_type": "CharLevelTokenizer", **keys,
    }  # fmt: skip
    sections: dict[str, dict[str, Any]] = {name: {} for name in SECTIONS}
    for key, value in flat.items():
        sections[SECTION_OF[key]][key] = value
    return RunConfig(**sections)  # type: ignore[arg-type]


def make_model(
    kind: str = "tokenformer", dtype: torch.dtype = torch.float64, layout: Layout = SINGLE, **keys: Any
) -> LanguageModel:
    """A random model; its weights are large, so that greedy texts vary."""
    transformer = {"qkv_slot_num": None, "proj_slot_num": None, "ffn_slot_num": None}
    config = make_config(**(transformer if kind == "transformer" else {}), **keys)
    return LanguageModel(config.model, seed=3, dtype=dtype, layout=layout).eval()


def save_random_models(root: Path, config: RunConfig, iterations: tuple[int, ...], ema: bool = False) -> None:
    """A run's checkpoints, each with random weights of its own; with `ema` their averages are random too."""
    for iteration in iterations:
        network, averages = (build_model(config.model, seed=seed) for seed in (iteration, iteration + 1000))
        tensors = {"model": network.state_dict().items(), "ema": averages.named_parameters() if ema else ()}
        pieces = whole_pieces(tensors)
        state = CanonicalState(iteration, {}, config.flat(), pieces)
        RunFolder(root).save(state)
