"""The average of the weights (EMA): its formula; training does not notice it; where it starts, and who takes it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn

from megatron.config import RunConfig
from megatron.engine.base import Engine
from megatron.errors import UserError
from megatron.inference import load_model
from megatron.inference.prepare import load_for_inference
from megatron.training import train
from megatron.training.loop import Trainer
from tests.growth.grown_runs import PIPELINE, assert_equal, metric, tensors, zero
from tests.ranks import run_ranks
from tests.whole_state import Whole

MakeConfig = Callable[..., RunConfig]
LAST, SKIPPED, DECAY = 5, 4, 0.8
RUN: dict[str, Any] = {
    "train_iters": LAST, "eval_interval": 2, "eval_iters": 1, "train_batch_size": 4, "hidden_dropout": 0.1,
    "skip_iterations": [[SKIPPED, SKIPPED]],
}  # fmt: skip
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "zero0": (1, {}),
    "zero2-offloaded": (1, {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}),
    # Parameters as small as these stay gathered between updates.
    "zero3-bf16": (1, {"zero_optimization": {"stage": 3}, "precision": "bf16"}),
    "pp2-zero0": (2, PIPELINE),
    "pp2-zero1-bf16": (2, {**PIPELINE, **zero(1), "precision": "bf16"}),
    "dp2-zero3": (2, {"train_micro_batch_size_per_gpu": 2, "zero_optimization": {"stage": 3}}),
}


def state_of(run: Trainer) -> dict[str, dict[str, Tensor]]:
    """Weights and averages in fp64, by kind and name."""
    found = Whole(run.engine.state).tensors
    return {
        kind: {name: value.double() for name, value in found[kind].items() if not name.endswith(".tau_tokens")}
        for kind in ("model", "ema")
    }


def in_model(model: nn.Module) -> list[Tensor]:
    """All that this process computes with; of ZeRO 3 its part of each parameter, and what is gathered of it."""
    parts: list[Any] = [(p.data, getattr(p, "ds_tensor", p.data)) for p in model.parameters()]
    return [part.detach().clone() for pair in parts for part in pair]


def looked_at(config: RunConfig) -> tuple[float, int]:
    """Train, and look at every update and validation; the largest error of the average, and how many were looked at."""
    iterate, evaluate, states, evaluations = Trainer._iterate, Engine.evaluate, list[Any](), [0]

    def iterate_and_look(run: Trainer, batches: Any) -> Any:
        states[:] = states or [state_of(run)]
        step = iterate(run, batches)
        states.append(state_of(run))
        return step

    def evaluate_and_look(engine: Engine, batches: Iterable[Any]) -> Any:
        before, others = in_model(engine.model), list[bool]()

        def looking() -> Any:
            for batch in batches:
                now = in_model(engine.model)
                others.append(any(not torch.equal(*pair) for pair in zip(before, now, strict=True)))
                yield batch

        found = evaluate(engine, looking())
        assert others and all(others), "another model is evaluated"
        assert all(map(torch.equal, before, in_model(engine.model))), "and it is as before afterwards"
        evaluations[0] += 1
        return found

    with patch.object(Trainer, "_iterate", iterate_and_look), patch.object(Engine, "evaluate", evaluate_and_look):
        train(config)
    assert states[0]["ema"].keys() == states[0]["model"].keys() and len(states) == LAST + 1
    expected, errors = states[0]["model"], [0.0]
    for iteration, state in enumerate(states):
        if iteration not in (0, SKIPPED):
            weights = state["model"]
            expected = {name: DECAY * average + (1 - DECAY) * weights[name] for name, average in expected.items()}
        errors += [(state["ema"][name] - average).abs().max().item() for name, average in expected.items()]
    assert max((average - states[-1]["model"][name]).abs().max() for name, average in expected.items()) > 1e-4
    return max(errors), evaluations[0]


def all_looked_at(configs: list[RunConfig]) -> list[tuple[float, int]]:
    return [looked_at(config) for config in configs]


@pytest.mark.processes
@pytest.mark.usefixtures("single_process")
def test_it_follows_its_formula_and_is_evaluated_without_a_trace(tiny_config: MakeConfig) -> None:
    for world in (1, 2):
        configs = [tiny_config(**RUN, **keys, ema_decay=DECAY) for size, keys in LAYOUTS.values() if size == world]
        for found in [all_looked_at(configs)] if world == 1 else run_ranks(world, all_looked_at, configs):
            for error, evaluations in found:
                assert error < 1e-6 and evaluations == 3


@pytest.mark.engine
@pytest.mark.usefixtures("single_process")
def test_training_does_not_notice_it_and_validation_need_not_take_it(tiny_config: MakeConfig, tmp_path: Path) -> None:
    runs = {"plain": {}, "weights": {"ema_decay": DECAY, "use_ema": False}, "averaged": {"ema_decay": DECAY}}
    for name, keys in runs.items():
        train(tiny_config(**RUN, **keys, save=str(tmp_path / name)))
    for name in ("weights", "averaged"):
        kinds = ("model", "optimizer", "rng")
        assert_equal(tensors(tmp_path / name, kinds=kinds), tensors(tmp_path / "plain", kinds=kinds))
        assert metric(tmp_path / name) == metric(tmp_path / "plain")
    plain, weights, averaged = (metric(tmp_path / name, "valid_lm_loss") for name in runs)
    assert plain == weights and plain.keys() == averaged.keys() == {2, 4, LAST}
    assert all(value != plain[at] for at, value in averaged.items())


@pytest.mark.engine
@pytest.mark.usefixtures("single_process")
def test_a_run_may_begin_and_end_to_keep_one(
    tiny_config: MakeConfig, tmp_path: Path, package_log: pytest.LogCaptureFixture
) -> None:
    """It begins as the weights of the checkpoint; evaluation and generation take it unless told otherwise."""

    def run(until: int, folder: str = "run", **keys: Any) -> list[str]:
        package_log.clear()
        place = {"save": str(tmp_path / folder), "load": str(tmp_path / "run"), "eval_iters": 0}
        train(tiny_config(train_iters=until, **place, **keys))
        return [line for line in package_log.messages if "average of the weights" in line]

    def weights(folder: str, iteration: int) -> dict[str, Tensor]:
        saved = tensors(tmp_path / folder, iteration, ("model",))
        return {name.removeprefix("model/"): value for name, value in saved.items()}

    def is_between(folder: str, first: dict[str, Tensor], iteration: int) -> bool:
        saved, last = tensors(tmp_path / folder, iteration, ("ema",)), weights(folder, iteration)
        found = {name.removeprefix("ema/"): value for name, value in saved.items()}
        return len(found) > 20 and all(
            torch.allclose(value, 0.5 * (first[name] + last[name]), rtol=0, atol=1e-7) for name, value in found.items()
        )

    assert run(1) == []
    [line] = run(2, ema_decay=0.5)
    assert line.endswith("global_step1 has no average of the weights, it starts as these")
    assert is_between("run", weights("run", 1), 2)
    assert run(1, "tuned", ema_decay=0.5, finetune=True) == [] and is_between("tuned", weights("run", 2), 1)
    for use_ema, kind in ((True, "ema"), (False, "model")):
        package_log.clear()
        model = load_for_inference(tiny_config(load=str(tmp_path / "run"), use_ema=use_ema))[0]
        assert ("the average of the weights" in package_log.text) == use_ema
        saved = tensors(tmp_path / "run", 2, (kind,))
        for found in (model, load_model(tmp_path / "run", use_ema=use_ema)):
            assert all(torch.equal(value, saved[f"{kind}/{name}"]) for name, value in found.named_parameters())
    [line] = run(3)
    assert line.startswith("ema_decay is not given: the average of the weights in ") and line.endswith(" is dropped")
    assert tensors(tmp_path / "run", 3, ("ema",)) == {}
    load_for_inference(tiny_config(load=str(tmp_path / "run")))


@pytest.mark.parametrize("value", [0, 1, 1.5, -0.1])
def test_a_decay_lies_between_0_and_1(tiny_config: MakeConfig, value: float) -> None:
    with pytest.raises(UserError, match="ema_decay: "):
        tiny_config(ema_decay=value)
