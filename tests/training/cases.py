"""A layout with a model and further keys, as a run of five updates."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

CLIP, TOLERANCE = 0.5, 1e-5
RUN = {
    "train_iters": 5, "eval_interval": 3, "eval_iters": 1, "lr_decay_iters": 40, "gradient_clipping": CLIP,
    "ema_decay": 0.8, "train_batch_size": 8, "weight_decay": 0.1, "split": "80,10,10", "peak_tflops": 1,
    # The usual epsilon of 1e-8 would turn rounding errors of gradients near zero into different updates.
    "optimizer": {"type": "Adam", "params": {"lr": 1e-3, "betas": [0.9, 0.95], "eps": 1e-6}},
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "tokenformer": {"norm": "layernorm"},
    "deep": {"num_layers": 3},
    "untied": {"no_weight_tying": True, "norm": "layernorm", "eod_mask_loss": True},
    "uneven": {"ffn_slot_num": 41, "qkv_slot_num": 23, "norm_activation_type": "gelu_l2_norm"},
    "softmax": {"norm_activation_type": "softmax"},
    "mup": {"norm": "layernorm", "use_mup": True, "mup_base_hidden_size": 8, "mup_base_ffn_slot_num": 10},
    "transformer": {"attention_config": [[["global"], 2]], "norm": "layernorm"},
}


@dataclass(frozen=True)
class Case:
    """One layout: lengths of its axes, ZeRO stage, sequence parallelism, the model, further keys."""

    data: int = 1
    pipeline: int = 1
    tensor: int = 1
    zero: int = 0
    sequence: bool = False
    model: str = "tokenformer"
    keys: dict[str, Any] = field(default_factory=dict)

    @property
    def world(self) -> int:
        return self.data * self.pipeline * self.tensor

    @property
    def name(self) -> str:
        grid = f"dp{self.data}-pp{self.pipeline}-tp{self.tensor}-zero{self.zero}{'-sp' if self.sequence else ''}"
        return "-".join([grid, self.model, *self.keys])

    def config_keys(self) -> dict[str, Any]:
        zero = {"stage": self.zero}
        if self.zero == 3:
            zero["stage3_param_persistence_threshold"] = 0  # else parameters as small as these stay gathered
        axes = {
            "pipe_parallel_size": self.pipeline, "model_parallel_size": self.tensor,
            "sequence_parallel": self.sequence, "zero_optimization": zero,
        }  # fmt: skip
        micro = 4 // self.data
        return {**RUN, **MODELS[self.model], **axes, "train_micro_batch_size_per_gpu": micro, **self.keys}


def metrics(folder: Path, key: str) -> list[float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line[key] for line in lines if key in line]
