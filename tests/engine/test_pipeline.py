"""Pipelines: names, silence, 16 bit, and what stops a run."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron.checkpoint.store import CheckpointReader
from megatron.config import RunConfig
from megatron.errors import UserError
from megatron.model import LanguageModel
from megatron.training import train
from megatron.training.loop import Trainer
from tests.ranks import run_ranks
from tests.training.cases import Case, metrics

pytestmark = pytest.mark.processes

MakeConfig = Callable[..., RunConfig]


def console_of(config: RunConfig) -> str:
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        train(config)
    return output.getvalue()


def names_of(run: Trainer) -> tuple[list[str], list[str]]:
    model = run.engine.model
    return [name for name, _ in model.named_parameters()], [name for name, _ in model.named_buffers()]


def diverging_loss(run: Trainer) -> str:
    """The error of a step whose last micro-batch has an infinite embedding."""
    with torch.no_grad():
        for name, parameter in run.engine.model.named_parameters():
            if "word_embeddings" in name:
                parameter.fill_(float("inf"))
    step = run.engine.train_step(next(run.data.training()), 1e-3)
    run.engine.watch.post(step.loss, step.grad_norm, stop=False, iteration=1)
    with pytest.raises(UserError) as caught:
        run.engine.watch.look()
    return str(caught.value)


def with_run(config: RunConfig, function: Callable[[Trainer], Any]) -> Any:
    run = Trainer(config)
    try:
        return function(run)
    finally:
        run.close()


def checks(config: RunConfig, sixteen_bit: RunConfig) -> dict[str, Any]:
    return {
        "names": with_run(config, names_of),
        "error": with_run(config, diverging_loss),
        "console": console_of(sixteen_bit),
    }


def test_two_stages(tiny_config: MakeConfig, tmp_path: Path, single_process: None) -> None:
    case = Case(pipeline=2, keys={"precision": "bf16", "num_layers": 4, "checkpoint_activations": True})
    sixteen_bit = tiny_config(**case.config_keys(), save=str(tmp_path / "two"))
    config = tiny_config(**Case(pipeline=2).config_keys())
    first, second = run_ranks(2, checks, config, sixteen_bit)

    # Canonical names, each on the stage that has it; the tied embedding is on both.
    model = LanguageModel(config.with_vocabulary(300).model, device="meta")
    parameters, buffers = (set(a) | set(b) for a, b in zip(first["names"], second["names"], strict=True))
    assert parameters == {name for name, _ in model.named_parameters()}
    assert buffers == {name for name, _ in model.named_buffers()}
    assert set(first["names"][0]) & set(second["names"][0]) == {"embedding.word_embeddings.weight"}

    # Both stages stop at the loss, which only the last one computes.
    for result in (first, second):
        assert result["error"].startswith("lm_loss: nan") and "stopped before anything was saved" in result["error"]

    # The user's console has our lines only; other ranks are silent.
    assert "2 x cpu (1 data x 2 pipeline x 1 tensor)" in first["console"]
    assert all(line[:8].count(":") == 2 for line in first["console"].splitlines()), first["console"]
    assert second["console"] == ""

    # bf16 follows the one-process run, and its checkpoint has fp32 masters.
    one = {**case.config_keys(), "pipe_parallel_size": 1}
    train(tiny_config(**one, save=str(tmp_path / "one")))
    for key in ("lm_loss", "valid_lm_loss"):
        assert metrics(tmp_path / "two", key) == pytest.approx(metrics(tmp_path / "one", key), abs=2e-3)
    assert metrics(tmp_path / "two", "grad_norm") == pytest.approx(metrics(tmp_path / "one", "grad_norm"), rel=2e-2)
    reader = CheckpointReader(tmp_path / "two" / "global_step5")
    masters = [reader.tensor("model", name) for name in reader.names("model") if "tau" not in name]
    assert all(tensor.dtype == torch.float32 for tensor in masters)
    assert any(not torch.equal(tensor, tensor.bfloat16().float()) for tensor in masters)
