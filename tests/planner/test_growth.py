"""What a plan says of growths to come, and what was measured near them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron.config import load_config
from megatron.config.sections.scaling import RECIPES
from megatron.growth.advice import FILE, best_of, measurements
from megatron.growth.schedule import GrowthSchedule
from megatron.model import LanguageModel
from megatron.planner import report
from megatron.planner.growth import growth_lines
from tests.planner.workloads import H200, SMALL, TOKENS
from tools.growth_experiment.regime.publish import as_json

FIRST = {"recipe": "zero", "keys": {}, "schedule": {}, "factor": 2.0, "part": 0.1}
WAYS: list[dict[str, Any]] = [
    {**FIRST, "losses": [1.44, 1.45], "minus_no_growth": [-0.005, -0.015], "minus_scratch": [-0.1, -0.2],
     "savings": [2.0, 3.0], "savings_in_all": [0.2, 0.3]},
    {**FIRST, "recipe": "together", "keys": {"row_norm": "segment", "lr_scale": {"old": 0.1}},
     "schedule": {"warmup": 0.05}, "losses": [1.38, 1.38], "minus_no_growth": [-0.06, -0.07],
     "minus_scratch": [-0.2, -0.3], "savings": [6.0, 7.0], "savings_in_all": [0.6, 0.7], "bound": ">"},
    {**FIRST, "recipe": "random", "keys": {"row_norm": "segment"}, "losses": [1.37], "minus_no_growth": [-0.08]},
    {**FIRST, "recipe": "random, from the annealed base", "keys": {"row_norm": "segment"},
     "schedule": {"annealed": True}, "losses": [1.38], "minus_no_growth": [-0.05]},
    {**FIRST, "recipe": "rotated", "keys": {"new_keys": "rotated"}, "losses": [1.4], "minus_no_growth": [-0.04]},
    {**FIRST, "recipe": "chosen", "keys": {"new_keys": "rotated"}, "losses": [1.4, 1.41],
     "minus_no_growth": [-0.04, -0.05]},
    {**FIRST, "factor": 3.0, "losses": [1.4], "minus_no_growth": [-0.03]},
]  # fmt: skip
DOUBLE = {"qkv_slot_num": 136, "proj_slot_num": 200, "ffn_slot_num": 544}


@pytest.fixture
def _made_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    facts = {"page": "docs/a.md", "text": "a text", "base_parameters": 1000, "tokens_per_parameter": 890}
    (tmp_path / "measured.json").write_text(as_json({**facts, "finished": 4, "trials": 9, "measured": WAYS}))
    monkeypatch.setattr("megatron.planner.growth.measurements", lambda: measurements(tmp_path / "measured.json"))


def lines(growth: list[dict[str, Any]], **keys: Any) -> list[str]:
    run = {**SMALL, **TOKENS, "train_iters": 1100, "lr_decay_style": "WSD", "optimizer.params.lr": 1e-3, **keys}
    config = load_config([], {**run, "growth": growth})
    return growth_lines(config, config.language.with_vocabulary(512), update_tokens=512)


@pytest.mark.usefixtures("_made_up")
def test_a_growth_has_its_time_its_factor_its_rates_and_what_was_measured_near_it() -> None:
    assert lines([{"at_iteration": 1000, "warmup": 0.1, **DOUBLE}]) == [
        "growth 1: at iteration 1,000, in the stable phase of WSD: 241,792 -> 475,264 parameters (2-fold); updates "
        "after it: 100, 0.1 of those before the first growth",
        "  as configured: new_keys zero, row_norm joint, rates of all alike; a schedule of its own from 0.001, 10 "
        "updates of warm-up",
        "  near it, 2-fold and 0.1, so configured: -0.010 (-0.015 to -0.005) nats against training on without growth; "
        "-0.150 (-0.200 to -0.100) against as many updates from scratch; saving 2.5 (2 to 3) after the growth, 0.25 "
        "(0.2 to 0.3) in all (2 seeds)",
        "  best there: row_norm: segment, lr_scale: {old: 0.1}, warmup: 0.05: -0.065 (-0.070 to -0.060) nats against "
        "training on without growth; -0.250 (-0.300 to -0.200) against as many updates from scratch; saving >6.5 (6 to "
        "7) after the growth, >0.65 (0.6 to 0.7) in all (2 seeds)",
        "  grown after the decay instead: +0.030 nats",
        "growth, measured: docs/a.md, 4 of 9 trials; a base of 1,000 parameters and 890 tokens a parameter, a text as "
        "bytes; saving: updates from scratch to the same loss, over those of the growth; other sizes and texts may do "
        "otherwise",
    ]


@pytest.mark.usefixtures("_made_up")
@pytest.mark.parametrize(
    ("keys", "growth", "said"),
    [
        ({}, {"row_norm": "segment"}, "so configured: -0.080 nats against training on without growth; saving not "
                                      "measured yet (1 seed)"),
        ({}, {"new_keys": "rotated"}, "so configured: -0.045 (-0.050 to -0.040) nats"),
        ({}, {"old_tokens_lr_scale": 0.5}, "old_keys x 0.5, old_values x 0.5, other x 0.5; a schedule"),
        ({}, {"freeze_old_tokens": True}, "near it, 2-fold and 0.1, this way was not measured"),
        ({"train_iters": 1500}, {}, "expected saving: unknown; nothing was measured near this factor and length"),
        ({}, {"qkv_slot_num": 1200}, "expected saving: unknown"),
        ({}, {"qkv_slot_num": 340}, "near it, 3-fold and 0.1, so configured: -0.030 nats"),
        ({"lr_wsd_decay_iters": 200}, {"lr_policy": "continue"}, "in the decay of WSD"),
        ({"lr_wsd_decay_iters": 200}, {"lr_policy": "continue"}, "the schedule of the rate goes on"),
        ({"lr_decay_style": "cosine"}, {}, "after 100% of a cosine decay"),
        ({"lr_decay_style": "cosine", "warmup": 0.0}, {"lr_policy": "continue"}, "after 91% of a cosine decay"),
        ({"lr_warmup_iters": 1000}, {"lr_policy": "continue"}, "in the warm-up"),
        ({"lr_decay_style": "constant"}, {}, "at a constant rate"),
    ],
)  # fmt: skip
def test_what_is_configured_is_told_and_what_is_not_known(
    keys: dict[str, Any], growth: dict[str, Any], said: str
) -> None:
    assert any(said in line for line in lines([{"at_iteration": 1000, **DOUBLE, **growth}], **keys))


@pytest.mark.usefixtures("_made_up")
def test_growths_of_a_chain_are_counted_block_by_block() -> None:
    growth = [{"at_tokens": 1000 * 512, "layers": [1], **DOUBLE}, {"at_iteration": 1200, **DOUBLE}]
    found = lines(growth, train_iters=1300)
    config = load_config([], {**SMALL, **TOKENS, "growth": growth})
    for number, line in enumerate(line for line in found if "-fold); " in line):
        grown = GrowthSchedule(config.scaling).after(config.language.with_vocabulary(512), number + 1).model
        assert f"-> {LanguageModel(grown, device='meta').num_parameters():,} parameters" in line
    assert "at iteration 1,000" in found[0] and "updates after it: 200, 0.2 of" in found[0]


def test_a_plan_has_these_lines_and_one_without_growth_has_none() -> None:
    growth = [{"at_iteration": 10, "qkv_slot_num": 128}]
    plan = load_config([], {**SMALL, **TOKENS, "train_iters": 11, "growth": growth})
    assert "growth 1: at iteration 10" in report(plan, H200, 2) and "docs/growth_regime.md" in report(plan, H200, 2)
    assert not lines([])


def test_what_is_advised_was_measured() -> None:
    known = measurements(FILE)
    for growth in known.measured:
        load_config([], {**SMALL, **TOKENS, "growth": [{"at_iteration": 1, "ffn_slot_num": 512, **growth.keys}]})
    near = known.near(2.1, 0.1)
    best = best_of(near)
    assert best and best.gain == max(each.gain for each in near if len(each.losses) == len(best.losses))
    assert best.keys == RECIPES["own_norm"], "the recipe of this name is the advised one"
