"""The real loop against plain PyTorch: same weights, data and schedule, torch's own AdamW."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from megatron.checkpoint.store import CheckpointReader
from megatron.config import RunConfig
from megatron.data import GPTDataset, IndexedDataset
from megatron.model import LanguageModel
from megatron.tokenizer import build_tokenizer
from megatron.training import train

pytestmark = pytest.mark.usefixtures("single_process")

PEAK, FLOOR, WARMUP_ITERATIONS, ITERATIONS = 5e-3, 5e-4, 4, 20
KEYS: dict[str, Any] = {
    "optimizer": {"type": "Adam", "params": {"lr": PEAK, "betas": [0.9, 0.95], "eps": 1e-8}},
    "min_lr": FLOOR, "warmup": WARMUP_ITERATIONS / ITERATIONS, "train_iters": ITERATIONS,
    "gradient_accumulation_steps": 2, "gradient_clipping": 0.5, "weight_decay": 0.1, "extra_save_iters": [0],
}  # fmt: skip


def reference_rate(update: int) -> float:
    if update <= WARMUP_ITERATIONS:
        return PEAK * update / WARMUP_ITERATIONS
    part = (update - WARMUP_ITERATIONS) / (ITERATIONS - WARMUP_ITERATIONS)
    return FLOOR + (PEAK - FLOOR) * (1 + math.cos(math.pi * part)) / 2


def reference_losses(config: RunConfig, start: CheckpointReader) -> tuple[list[float], list[float], LanguageModel]:
    """Twenty updates with torch.optim.AdamW and the functions of torch only."""
    model = LanguageModel(config.with_vocabulary(build_tokenizer(config.tokenizer).vocab_size).model)
    model.load_state_dict({name: start.tensor("model", name) for name in start.names("model")})
    decayed = [p for p in model.parameters() if p.dim() == 2]
    others = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=PEAK, betas=(0.9, 0.95), eps=1e-8)
    assert config.data.data_path is not None
    indexed = IndexedDataset(config.data.data_path)
    data = GPTDataset(indexed, 16, config.training.seed, ITERATIONS * 8, documents=(0, 54))
    losses, norms = [], []
    for update in range(ITERATIONS):
        for group in optimizer.param_groups:
            group["lr"] = reference_rate(update)
        total = 0.0
        for half in range(2):
            rows = range(update * 8 + half * 4, update * 8 + half * 4 + 4)
            tokens = torch.from_numpy(np.stack([data[i] for i in rows]))
            loss = F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()) / 2
            loss.backward()
            total += loss.item()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5).item())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return losses, norms, model


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_twenty_iterations_follow_torch_adamw(
    tiny_config: Callable[..., RunConfig], tmp_path: Path, stage: int
) -> None:
    config = tiny_config(**KEYS, save=str(tmp_path), zero_optimization={"stage": stage})
    train(config)
    expected, norms, model = reference_losses(config, CheckpointReader(tmp_path / "global_step0"))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    measured = [line for line in lines if "lm_loss" in line]
    assert [line["lm_loss"] for line in measured] == pytest.approx(expected, abs=1e-5)
    assert [line["grad_norm"] for line in measured] == pytest.approx(norms, rel=1e-4)
    assert max(norms) > 0.5 and abs(expected[0] - expected[-1]) > 0.1  # clipping was active, weights moved
    final = CheckpointReader(tmp_path / "global_step20")
    for name, parameter in model.named_parameters():
        assert torch.allclose(final.tensor("model", name), parameter.detach(), rtol=0, atol=1e-5), name


def test_activation_checkpointing_changes_nothing(tiny_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    for name, extra in (("kept", {}), ("recomputed", {"checkpoint_activations": True})):
        train(tiny_config(train_iters=3, save=str(tmp_path / name), hidden_dropout=0.1, **extra))
    kept, recomputed = (CheckpointReader(tmp_path / name / "global_step3") for name in ("kept", "recomputed"))
    for name in kept.names("model"):
        assert torch.equal(kept.tensor("model", name), recomputed.tensor("model", name)), name


def test_eod_mask_loss_leaves_predictions_after_a_document_end_out(
    tiny_config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    for name, extra in (("all", {}), ("masked", {"eod_mask_loss": True})):
        train(tiny_config(train_iters=1, train_micro_batch_size_per_gpu=32, save=str(tmp_path / name), **extra))
    first = {
        name: json.loads((tmp_path / name / "metrics.jsonl").read_text().splitlines()[0])["lm_loss"]
        for name in ("all", "masked")
    }
    assert first["all"] != first["masked"]


def test_metrics_lines_have_the_promised_fields(tiny_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    train(tiny_config(train_iters=10, save=str(tmp_path), peak_tflops=1.0))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    training = {"iteration", "lm_loss", "learning_rate", "grad_norm", "consumed_tokens", "tokens_per_second", "mfu"}
    assert all(training <= line.keys() for line in lines if "lm_loss" in line)
    assert [line["iteration"] for line in lines if "valid_lm_loss" in line] == [10]
    assert lines[9]["consumed_tokens"] == 10 * 4 * 16
