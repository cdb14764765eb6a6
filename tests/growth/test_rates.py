"""Rates by role and age, the new tokens' warm-up, and the decay of new keys that waits for their size."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from megatron.config.checks import find_training_mistakes
from megatron.engine.base import Engine
from megatron.errors import UserError
from megatron.training.new_tokens import LOOK_EVERY
from tests.growth.grown_runs import (
    CONTINUE,
    STEADY,
    MakeConfig,
    assert_equal,
    is_new,
    metric,
    run,
    stage,
    state,
    tensors,
    worst,
)

pytestmark = pytest.mark.usefixtures("single_process")
EVERYTHING = ("model", "optimizer", "rng")
ROTATED = {"new_keys": "rotated", "proj_slot_num": 48, **CONTINUE}
SCALES = {"new_keys": 0.5, "new_values": 2.0, "old_keys": 0.25, "old_values": 4.0, "other": 0.0}


@pytest.fixture(scope="module")
def base(tiny_config: MakeConfig, tmp_path_factory: pytest.TempPathFactory, single_process: None) -> Path:
    folder = tmp_path_factory.mktemp("base")
    run(tiny_config, folder, **STEADY, weight_decay=0.0, train_iters=4, norm="layernorm", lr_decay_iters=40)
    return folder


def part_of(name: str) -> str:
    """Which of SCALES a parameter is scaled by."""
    kind = "keys" if "key_tokens" in name else "values" if "value_tokens" in name else None
    return "other" if kind is None else f"{'new' if is_new(name) else 'old'}_{kind}"


def moves(tiny_config: MakeConfig, base: Path, folder: Path, **keys: Any) -> dict[str, Any]:
    """How far the first update after a growth by rotated keys moves each parameter. They do not decay."""
    settings = {**STEADY, "weight_decay": 0.0, "norm": "layernorm", "lr_decay_iters": 40, "checkpoint_factor": 1}
    growth = [stage(4, **{**ROTATED, **keys.pop("growth", {})})]
    run(tiny_config, folder, **settings, load=str(base), train_iters=5, growth=growth, **keys)
    still = {**settings, "optimizer": {"type": "Adam", "params": {"lr": 0.0}}, "min_lr": 0.0}
    if not (base / "grown").exists():
        run(tiny_config, base / "grown", **still, load=str(base), train_iters=5, growth=[stage(4, **ROTATED)])
    start = tensors(base / "grown", 5, ("model",))
    after = tensors(folder, 5, ("model",))
    return {name: after[name] - start[name] for name in after if not name.endswith("tau_tokens")}


@pytest.mark.parametrize("zero", [0, 3])
def test_each_part_has_a_rate_of_its_own(tiny_config: MakeConfig, base: Path, tmp_path: Path, zero: int) -> None:
    keys = {"zero_optimization": {"stage": zero}}
    plain = moves(tiny_config, base, tmp_path / "plain", **keys)
    scaled = moves(tiny_config, base, tmp_path / "scaled", growth={"lr_scale": SCALES}, **keys)
    assert {part_of(name) for name in plain} == SCALES.keys()
    for name, move in plain.items():
        assert move.abs().max() > 1e-5, name
        assert worst(scaled[name], SCALES[part_of(name)] * move) < 2e-7, name


def test_short_forms_are_the_same_as_the_table(tiny_config: MakeConfig, base: Path, tmp_path: Path) -> None:
    short = {"old_tokens_lr_scale": 0.5, "new_tokens_lr_scale": 2.0}
    table = {"lr_scale": {"old": 0.5, "new-keys": 2.0, "new_values": 2.0}}
    found = [moves(tiny_config, base, tmp_path / str(i), growth=keys) for i, keys in enumerate((short, table))]
    assert_equal(*found)


@pytest.fixture
def groups() -> Iterator[list[list[dict[str, Any]]]]:
    """Of every update made in the test, what its parameter groups say."""
    seen: list[list[dict[str, Any]]] = []
    real = Engine._set_learning_rate

    def noting(engine: Engine, *arguments: Any) -> None:
        real(engine, *arguments)
        seen.append([{k: v for k, v in g.items() if k != "params"} for g in engine._engine.optimizer.param_groups])

    with patch.object(Engine, "_set_learning_rate", noting):
        yield seen


def test_new_tokens_warm_up_by_themselves(
    tiny_config: MakeConfig, tmp_path: Path, groups: list[list[dict[str, Any]]]
) -> None:
    growth = [
        stage(3, new_tokens_warmup={"new-keys": 4, "new_values": 2}, new_tokens_lr_scale=2.0, **CONTINUE),
        stage(9, ffn_slot_num=80, new_tokens_warmup=1, **CONTINUE),
    ]
    keys = {"train_iters": 11, "hidden_dropout": 0.1, "checkpoint_factor": 1, "growth": growth}
    run(tiny_config, tmp_path / "whole", **keys)
    rates = metric(tmp_path / "whole", "learning_rate")
    lengths = [{0}] * 3 + [{0, 4, 2}] * 6 + [{0, 1}] * 2
    assert len(groups) == 11
    for number, found in enumerate(groups, 1):
        for group in found:
            age, length = number - (4 if number < 10 else 10), group["warmup"]
            factor = min(1.0, age / length) * (1.0 if length == 1 else 2.0) if length else 1.0
            assert group["lr"] == pytest.approx(rates[number] * factor, rel=1e-12), (number, group)
        assert {group["warmup"] for group in found} == lengths[number - 1]
    before, after = (tensors(tmp_path / "whole", at, ("model",)) for at in (4, 5))
    assert all(after[n].any() and not before[n].any() for n in after if is_new(n) and "key_tokens" in n)
    for interval in (5, 7, None):  # in the middle of the warm-up
        run(tiny_config, tmp_path / "parts", **keys, exit_interval=interval)
    assert_equal(tensors(tmp_path / "parts", kinds=EVERYTHING), tensors(tmp_path / "whole", kinds=EVERYTHING))


def waiting(groups: list[dict[str, Any]]) -> dict[str, float]:
    return {group["waits"]: group["weight_decay"] for group in groups if group["waits"]}


@pytest.mark.parametrize("zero", [0, 1])
def test_new_keys_decay_once_they_are_as_large_as_the_old_ones(
    tiny_config: MakeConfig, tmp_path: Path, groups: list[list[dict[str, Any]]], zero: int
) -> None:
    """Keys that start at zero, with a rate at which one update makes those of qkv and proj large; ffn has not grown."""
    at = 3 + LOOK_EVERY
    growth = [stage(3, ffn_slot_num=None, lr_scale={"new_keys": 40.0}, new_keys_decay="at_old_rms", **CONTINUE)]
    keys = {
        "train_iters": at + 2, "weight_decay": 0.1, "checkpoint_factor": at - 1, "growth": growth,
        "zero_optimization": {"stage": zero}, "hidden_dropout": 0.1,
    }  # fmt: skip
    run(tiny_config, tmp_path / "whole", **keys)
    assert waiting(groups[2]) == {}
    assert all(waiting(found) == {"qkv": 0.0, "proj": 0.0} for found in groups[3:at])
    assert all(waiting(found) == {"qkv": 0.1, "proj": 0.1} for found in groups[at:]) and len(groups) == at + 2
    assert {group["weight_decay"] for group in groups[at] if not group["waits"]} == {0.0, 0.1}
    (entry,) = state(tmp_path / "whole")["lineage"]
    assert entry["decays_since"] == {"qkv": at, "proj": at}
    assert "decays_since" not in state(tmp_path / "whole", at - 1)["lineage"][0]
    for stop in (at, at + 1, None):  # just before the look and after it
        run(tiny_config, tmp_path / "parts", **keys, exit_interval=stop)
    assert state(tmp_path / "parts") == state(tmp_path / "whole")
    assert_equal(tensors(tmp_path / "parts", kinds=EVERYTHING), tensors(tmp_path / "whole", kinds=EVERYTHING))


def test_small_new_keys_do_not_decay(tiny_config: MakeConfig, tmp_path: Path) -> None:
    """The second update after a growth is the first in which keys that were zero could decay."""
    after = {}
    for decay in ("always", "at_old_rms"):
        growth = [stage(3, new_keys_decay=decay, **CONTINUE)]
        run(
            tiny_config,
            tmp_path / decay,
            **STEADY,
            train_iters=5,
            weight_decay=50.0,
            checkpoint_factor=1,
            growth=growth,
        )
        after[decay] = tensors(tmp_path / decay, 5, ("model",))
    rate, before = metric(tmp_path / "always", "learning_rate")[5], tensors(tmp_path / "always", 4, ("model",))
    for name, tensor in after["always"].items():
        spared = rate * 50 * before[name] if is_new(name) and "key_tokens" in name else 0 * before[name]
        assert worst(after["at_old_rms"][name] - tensor, spared) < 1e-8, name
        assert spared.any() == (is_new(name) and "key_tokens" in name)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            {"lr_scale": {"new_keys": 2}, "new_tokens_lr_scale": 3},
            "new_tokens_lr_scale: 3 contradicts new_keys 2 of lr_",
        ),
        (
            {"lr_scale": {"old": 0.1}, "old_tokens_lr_scale": 1},
            "old_tokens_lr_scale: 1 contradicts old 0.1 of lr_scale",
        ),
        (
            {"growth": [stage(5, lr_scale={"other": 2}, old_tokens_lr_scale=3)]},
            "entry 1: old_tokens_lr_scale: 3 contrad",
        ),
        ({"lr_scale": {"new_key": 2}}, "lr_scale.new_key: unknown key"),
        ({"lr_scale": {"new_keys": -1}}, "lr_scale.new_keys: must be at least 0, got -1"),
        ({"lr_scale": 2}, "lr_scale: expected a table"),
        (
            {"new_tokens_warmup": 0.5},
            "new_tokens_warmup: expected a number of updates, or {new_keys: .., new_values: ..",
        ),
        ({"new_tokens_warmup": {"new_keys": -1}}, "new_tokens_warmup.new_keys: must be at least 0, got -1"),
        (
            {"growth": [stage(5, new_tokens_warmup=-1)]},
            "growth: entry 1: new_tokens_warmup: expected a number of updat",
        ),
        ({"new_keys_decay": True}, "new_keys_decay: true is not supported; choose one of always, at_old_rms"),
    ],
)
def test_mistakes_are_one_line(tiny_config: MakeConfig, keys: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        tiny_config(**keys)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("lr_scale", {"old": 0.1}), ("old_tokens_lr_scale", 0.1), ("new_tokens_warmup", 3),
        ("new_keys_decay", "at_old_rms"),
    ],
)  # fmt: skip
def test_muon_treats_all_ages_alike(tiny_config: MakeConfig, key: str, value: Any) -> None:
    config = tiny_config(**{key: value}, optimizer={"type": "Muon"}, gradient_clipping=0.0)
    (found,) = find_training_mistakes(config)
    assert f"{key}: Muon has no learning rates and decay by age of tokens; use Adam" in str(found)
