"""new_moments: mean. New tokens start with the second moments and the count of updates of the old ones beside them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron.config.checks import find_training_mistakes
from tests.growth.grown_runs import CONTINUE, STEADY, MakeConfig, assert_equal, is_new, metric, run, stage, tensors
from tools.ckpts import grow as grow_tool

pytestmark = pytest.mark.usefixtures("single_process")
BETA1, BETA2, EPS = 0.9, 0.95, 1e-6
MEAN = {"new_moments": "mean", **CONTINUE}


def state_of(folder: Path, moment: str, iteration: int | None = None) -> dict[str, Tensor]:
    prefix = f"optimizer/{moment}/"
    found = tensors(folder, iteration, ("optimizer",))
    return {name.removeprefix(prefix): tensor for name, tensor in found.items() if name.startswith(prefix)}


def steps(folder: Path, segment: int) -> set[int]:
    return {int(step) for name, step in state_of(folder, "step").items() if is_new(name, segment)}


def test_new_tokens_get_the_mean_of_the_old_ones(tiny_config: MakeConfig, tmp_path: Path) -> None:
    """After a growth whose tokens have seen fewer updates, each counts by what Adam divides it by."""
    run(tiny_config, tmp_path / "run", **STEADY, train_iters=5, growth=[stage(3, **CONTINUE)])
    assert steps(tmp_path / "run", 0) == {5} and steps(tmp_path / "run", 1) == {2}
    flags = ["--qkv", "60", "--ffn", "80", "--new-moments", "mean"]
    grow_tool.main([str(tmp_path / "run"), str(tmp_path / "grown"), *flags])
    moments, before = state_of(tmp_path / "grown", "exp_avg_sq"), state_of(tmp_path / "run", "exp_avg_sq")
    new = [name for name in moments if is_new(name, 2)]
    assert len(new) == 2 * 2 * 4  # keys and values of two layers, none of proj
    for name in new:
        old, grown = (before[f"{name[:-1]}{segment}"].double() for segment in (0, 1))
        whole = torch.cat([old / (1 - BETA2**5), grown / (1 - BETA2**2)])
        expected = (whole.mean(0) * (1 - BETA2**5)).expand(moments[name].shape)
        torch.testing.assert_close(moments[name].double(), expected, rtol=1e-6, atol=0)
        assert expected.any() and not state_of(tmp_path / "grown", "exp_avg")[name].any()
    assert steps(tmp_path / "grown", 2) == {5}
    assert_equal({name: moments[name] for name in before}, before)


def test_the_first_update_is_adams_from_that_state(tiny_config: MakeConfig, tmp_path: Path) -> None:
    keys = {**STEADY, "weight_decay": 0.0, "gradient_clipping": 0.0, "checkpoint_factor": 1, "lr_decay_iters": 40}
    run(tiny_config, tmp_path, **keys, train_iters=5, growth=[stage(4, **MEAN)])
    old, mean, square = (state_of(tmp_path, *of) for of in (("exp_avg_sq", 4), ("exp_avg", 5), ("exp_avg_sq", 5)))
    rate, after = metric(tmp_path, "learning_rate")[5], tensors(tmp_path, 5, ("model",))
    for name in (name for name in mean if is_new(name)):
        start = old[f"{name[:-1]}0"].mean(0)
        grad = mean[name] / (1 - BETA1)
        torch.testing.assert_close(square[name], BETA2 * start + (1 - BETA2) * grad**2, rtol=1e-5, atol=1e-12)
        if "key_tokens" in name:  # these were zero
            corrected = mean[name] / (1 - BETA1**5), square[name] / (1 - BETA2**5)
            move = -rate * corrected[0] / (corrected[1].sqrt() + EPS)
            torch.testing.assert_close(after[f"model/{name}"], move, rtol=1e-4, atol=1e-9)
            assert move.any()
    assert steps(tmp_path, 1) == {5}


@pytest.mark.parametrize("zero", [1, 3])
def test_a_run_stopped_around_the_growth_does_the_same(tiny_config: MakeConfig, tmp_path: Path, zero: int) -> None:
    keys = {
        "train_iters": 7, "growth": [stage(3, **MEAN), stage(5, ffn_slot_num=90, **MEAN)], "hidden_dropout": 0.1,
        "zero_optimization": {"stage": zero},
    }  # fmt: skip
    run(tiny_config, tmp_path / "whole", **keys)
    assert steps(tmp_path / "whole", 0) == steps(tmp_path / "whole", 1) == steps(tmp_path / "whole", 2) == {7}
    for interval in (3, 4, None):
        run(tiny_config, tmp_path / "parts", **keys, exit_interval=interval)
    found, expected = (tensors(tmp_path / name, kinds=("model", "optimizer", "rng")) for name in ("parts", "whole"))
    assert_equal(found, expected)


def test_tokens_without_old_moments_beside_them_start_without(tiny_config: MakeConfig, tmp_path: Path) -> None:
    """Frozen tokens have none; where some of the new tokens would have a state and others not, none have."""
    some = [stage(2, layers=[1], freeze_old_tokens=True, **MEAN), stage(4, qkv_slot_num=60, ffn_slot_num=80, **MEAN)]
    run(tiny_config, tmp_path / "some", train_iters=6, growth=some)
    assert steps(tmp_path / "some", 1) == {6} and steps(tmp_path / "some", 2) == {2}
    every = [stage(2, freeze_old_tokens=True, **MEAN), stage(4, qkv_slot_num=60, ffn_slot_num=80, **MEAN)]
    run(tiny_config, tmp_path / "every", train_iters=6, growth=every)
    assert steps(tmp_path / "every", 1) == steps(tmp_path / "every", 2) == {6} and steps(tmp_path / "every", 0) == {2}


def test_a_smaller_models_moments_are_taken_too(tiny_config: MakeConfig, tmp_path: Path) -> None:
    run(tiny_config, tmp_path / "base", **STEADY, train_iters=3)
    counts = {"qkv_slot_num": 48, "proj_slot_num": 36, "ffn_slot_num": 72}
    keys: dict[str, Any] = {"pretrain_partial_init": str(tmp_path / "base"), "new_moments": "mean", **counts}
    run(tiny_config, tmp_path / "grown", **STEADY, train_iters=2, **keys)
    assert steps(tmp_path / "grown", 1) == steps(tmp_path / "grown", 0) == {5}


@pytest.mark.parametrize("where", ["top", "growth"])
@pytest.mark.parametrize("kind", ["SGD", "Lion", "Muon"])
def test_other_optimizers_have_no_second_moments(tiny_config: MakeConfig, where: str, kind: str) -> None:
    keys = {"growth": [stage(5, **MEAN)]} if where == "growth" else {"new_moments": "mean"}
    config = tiny_config(**keys, save="out", optimizer={"type": kind}, gradient_clipping=0.0)
    (found,) = find_training_mistakes(config)
    assert f"new_moments: mean is of Adam's second moments, and {kind} has none of tokens; use Adam" in str(found)
