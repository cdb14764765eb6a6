"""Every layout does what one process does on the same batches: losses, gradient norms, weights, optimizer state."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron.checkpoint import CheckpointReader
from megatron.config import RunConfig
from megatron.training import train
from tests.ranks import run_ranks

MakeConfig = Callable[..., RunConfig]
GLOBAL_BATCH, CLIP, TOLERANCE = 8, 0.5, 1e-5
RUN = {
    "train_iters": 5, "eval_interval": 5, "lr_decay_iters": 20, "gradient_clipping": CLIP, "num_layers": 3,
    "train_batch_size": GLOBAL_BATCH, "weight_decay": 0.1, "split": "80,10,10",
}  # fmt: skip

MODELS: dict[str, dict[str, Any]] = {
    "tokenformer": {},
    "untied": {"no_weight_tying": True, "norm": "layernorm", "eod_mask_loss": True},
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
        axes = {
            "pipe_parallel_size": self.pipeline, "model_parallel_size": self.tensor,
            "sequence_parallel": self.sequence, "zero_optimization": {"stage": self.zero},
        }  # fmt: skip
        return {**RUN, **MODELS[self.model], **axes, "train_micro_batch_size_per_gpu": 2, **self.keys}


CASES = [
    Case(pipeline=2),
    Case(pipeline=2, zero=1),
    Case(pipeline=2, model="untied"),
    Case(pipeline=2, zero=1, model="untied"),
    Case(pipeline=2, keys={"checkpoint_activations": True, "checkpoint_num_layers": 2}),
    Case(pipeline=3),
    Case(data=2, pipeline=2),
    Case(data=2, pipeline=2, zero=1),
]


def train_all(configs: list[RunConfig]) -> list[int]:
    return [train(config).iteration for config in configs]


def metrics(folder: Path, key: str) -> list[float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line[key] for line in lines if key in line]


def tensors(folder: Path, iteration: int = 5) -> dict[str, torch.Tensor]:
    reader = CheckpointReader(folder / f"global_step{iteration}")
    return {f"{kind}/{n}": reader.tensor(kind, n) for kind in ("model", "optimizer") for n in reader.names(kind)}


def assert_same_run(found: Path, expected: Path, case: str, iteration: int = 5) -> None:
    for key in ("lm_loss", "valid_lm_loss", "test_lm_loss", "grad_norm"):
        assert metrics(found, key) == pytest.approx(metrics(expected, key), abs=TOLERANCE), (case, key)
    left, right = tensors(found, iteration), tensors(expected, iteration)
    assert left.keys() == right.keys(), case
    for name, tensor in right.items():
        assert left[name].shape == tensor.shape, (case, name)
        assert torch.allclose(left[name].double(), tensor.double(), rtol=0, atol=TOLERANCE), (case, name)


@pytest.fixture(scope="module")
def one_process(
    tiny_config: MakeConfig, tmp_path_factory: pytest.TempPathFactory, single_process: None
) -> dict[str, Path]:
    """Runs of one process, by model."""
    root = tmp_path_factory.mktemp("one")
    for model in MODELS:
        train(tiny_config(**Case(model=model).config_keys(), save=str(root / model)))
    return {model: root / model for model in MODELS}


@pytest.mark.parametrize("world", sorted({case.world for case in CASES}))
def test_a_layout_trains_as_one_process_does(
    tiny_config: MakeConfig, one_process: dict[str, Path], tmp_path: Path, world: int
) -> None:
    cases = [case for case in CASES if case.world == world]
    configs = [tiny_config(**case.config_keys(), save=str(tmp_path / case.name)) for case in cases]
    assert run_ranks(world, train_all, configs) == [[5] * len(cases)] * world
    for case in cases:
        assert_same_run(tmp_path / case.name, one_process[case.model], case.name)
    assert min(metrics(one_process["tokenformer"], "grad_norm")) > CLIP, "clipping has to be at work"
