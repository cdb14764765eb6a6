"""`compile: blocks`: the same training in fewer passes over memory, in every layout that it knows."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partialmethod
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from megatron.checkpoint.store import CheckpointReader
from megatron.config import RunConfig
from megatron.engine import compiled
from megatron.errors import RankError
from megatron.training.loop import Trainer, train
from tests.growth.grown_runs import CONTINUE, stage
from tests.ranks import run_ranks
from tests.training.cases import metrics

pytestmark = pytest.mark.processes

MakeConfig = Callable[..., RunConfig]

# The formula itself is traced into a block; other backends stay outside.
RUN = {
    "pattention_backend": "reference",
    "train_iters": 4,
    "eval_interval": 2,
    "eval_iters": 0,
    "gradient_clipping": 0.5,
    "norm": "layernorm",
}
RECOMPUTED = {"checkpoint_activations": True, "checkpoint_num_layers": 2, "num_layers": 3, "hidden_dropout": 0.1}
SEQUENCE = {"model_parallel_size": 2, "sequence_parallel": True, "hidden_dropout": 0.1, "attention_dropout": 0.1}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "zero2-recomputed": (1, {**RECOMPUTED, "zero_optimization": {"stage": 2}}),
    "fused-bf16": (1, {"pattention_backend": "fused", "zero_optimization": {"stage": 1}, "precision": "bf16"}),
    "transformer": (1, {"attention_config": [[["global"], 2]], "use_bias_in_attn_linear": True, "eval_iters": 1}),
    "growing": (1, {"growth": [stage(2, **CONTINUE)]}),
    "tp2-sequence": (2, SEQUENCE),
    "pp2": (2, {"pipe_parallel_size": 2, "zero_optimization": {"stage": 1}, "checkpoint_activations": True}),
}
# After each update: those of a block in training, which what is left out parts; of one in evaluation, after the second
# update; of blocks that have grown by then, which are others, but alike.
GRAPHS = {
    **{name: [1, 1, 1, 1] for name in LAYOUTS},
    "fused-bf16": [4, 4, 4, 4], "tp2-sequence": [5, 5, 5, 5], "transformer": [1, 1, 2, 2], "growing": [1, 1, 2, 2],
}  # fmt: skip


def train_both_ways(backend: str, pairs: dict[str, tuple[RunConfig, RunConfig]]) -> dict[str, list[int]]:
    """Each run as it is and compiled; how many graphs there are after each iteration of the compiled one."""
    os.environ.pop("TORCHDYNAMO_DISABLE")
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # else it starts processes that may outlive a rank by a while
    os.environ["TORCHINDUCTOR_VEC_ISA_OK"] = "1"  # else it compiles a program for each set of vector instructions
    from torch._dynamo.utils import counters

    graphs: dict[str, list[int]] = {}
    for name, (plain, blocks) in pairs.items():
        train(plain)
        counters.clear()
        counts, tell = graphs.setdefault(name, []), Trainer._tell

        def noting(run: Trainer, *arguments: Any, counts: list[int] = counts, tell: Any = tell) -> None:
            counts.append(counters["stats"]["unique_graphs"])
            tell(run, *arguments)

        compile_with = partialmethod(torch.nn.Module.compile, backend=backend)
        with patch.object(Trainer, "_tell", noting), patch.object(torch.nn.Module, "compile", compile_with):
            train(blocks)
    return graphs


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("compiled")


def pair(make: MakeConfig, folder: Path, name: str, keys: dict[str, Any]) -> tuple[RunConfig, RunConfig]:
    plain, blocks = (
        make(**{**RUN, **keys}, save=str(folder / name / how), load=str(folder / name / how), compile=how)
        for how in ("none", "blocks")
    )
    return plain, blocks


@pytest.fixture(scope="module")
def graphs(tiny_config: MakeConfig, folder: Path) -> dict[str, list[int]]:
    """All runs, with what torch.compile captures computed operation by operation."""
    found: dict[str, list[int]] = {}
    for world in (1, 2):
        pairs = {n: pair(tiny_config, folder, n, keys) for n, (size, keys) in LAYOUTS.items() if size == world}
        found |= run_ranks(world, train_both_ways, "aot_eager", pairs)[0]
    return found


def tensors(path: Path) -> dict[str, torch.Tensor]:
    reader = CheckpointReader(path / f"global_step{RUN['train_iters']}")
    return {f"{kind}/{n}": reader.tensor(kind, n) for kind in ("model", "optimizer") for n in reader.names(kind)}


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_compiled_run_is_the_same_run(graphs: dict[str, list[int]], folder: Path, name: str) -> None:
    plain, blocks = folder / name / "none", folder / name / "blocks"
    for key in ("lm_loss", "grad_norm"):
        assert metrics(blocks, key) == metrics(plain, key) != [], key
    assert metrics(blocks, "valid_lm_loss") == metrics(plain, "valid_lm_loss")
    expected, found = tensors(plain), tensors(blocks)
    assert list(found) == list(expected)
    assert all(torch.equal(found[key], expected[key]) for key in expected)


@pytest.mark.parametrize("name", LAYOUTS)
def test_nothing_is_compiled_anew_at_a_step(graphs: dict[str, list[int]], name: str) -> None:
    assert graphs[name] == GRAPHS[name]


def test_generated_code_trains_alike(tiny_config: MakeConfig, tmp_path: Path) -> None:
    pairs = {"run": pair(tiny_config, tmp_path, "run", {"num_layers": 1})}
    run_ranks(1, train_both_ways, "inductor", pairs)
    for key in ("lm_loss", "grad_norm"):
        expected = metrics(tmp_path / "run/none", key)
        assert metrics(tmp_path / "run/blocks", key) == pytest.approx(expected, rel=1e-5), key


def test_a_machine_without_a_compiler_is_told_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(RankError, match=r"compile: blocks needs a C\+\+ compiler, and g\+\+ is not on PATH; install"):
        compiled.compile_blocks([], torch.device("cpu"), 16)
