"""Learning rates equal those of the official code."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron.config import RunConfig
from megatron.config.checks import find_training_mistakes
from megatron.errors import UserError
from megatron.training import LRSchedule

GOLDEN = json.loads((Path(__file__).parents[1] / "fixtures" / "golden" / "lr_schedule.json").read_text())


@pytest.mark.parametrize("style", ["cosine", "linear", "exponential", "constant"])
def test_rates_equal_the_official_ones_up_to_the_last_iteration(
    tiny_config: Callable[..., RunConfig], style: str
) -> None:
    last = int(GOLDEN["total_iters"])
    config = tiny_config(
        optimizer={"params": {"lr": GOLDEN["start_lr"]}}, min_lr=GOLDEN["min_lr"], warmup=GOLDEN["warmup"],
        train_iters=last, lr_decay_style=style,
    )  # fmt: skip
    schedule, compared = LRSchedule(config), 0
    for iteration, rate in zip(GOLDEN["iters"], GOLDEN[style], strict=True):
        if iteration <= last:
            assert schedule(iteration) == pytest.approx(rate, abs=1e-12), iteration
            compared += 1
    assert compared > 30


def test_rates_stay_at_the_floor_after_the_end(tiny_config: Callable[..., RunConfig]) -> None:
    schedule = LRSchedule(tiny_config(lr_decay_iters=100, min_lr=1e-4, warmup=0.1))
    assert schedule(100) == schedule(150) == schedule(10_000) == pytest.approx(1e-4)


def test_without_warm_up_the_first_update_has_the_peak_rate(tiny_config: Callable[..., RunConfig]) -> None:
    assert LRSchedule(tiny_config(warmup=0.0))(0) == pytest.approx(1e-3)


def wsd(t: int, style: str, peak: float, floor: float, warmup: int, total: int, decay: int) -> float:
    """The written formula, t finished updates."""
    if t <= warmup:
        return peak * t / warmup
    r = (t - (total - decay)) / decay
    if r <= 0:
        return peak
    if r > 1:
        return floor
    f = {
        "exponential": 2.0 * 2.0**-r - 1.0,
        "linear": 1.0 - r,
        "cosine": (1.0 + math.cos(math.pi * r)) / 2.0,
        "minus_sqrt": 1.0 - r**0.5,
    }
    return floor + f[style] * (peak - floor)


@pytest.mark.parametrize("style", ["exponential", "linear", "cosine", "minus_sqrt"])
def test_wsd_equals_its_formula(tiny_config: Callable[..., RunConfig], style: str) -> None:
    keys = {"lr_decay_style": "WSD", "lr_wsd_decay_style": style, "min_lr": 1e-4, "train_iters": 500}
    for warmup in ({"lr_warmup_iters": 20, "warmup": 0.5}, {"warmup": 0.04}):
        schedule = LRSchedule(tiny_config(**keys, **warmup, lr_wsd_decay_iters=90), start=7)
        for t in range(600):
            assert schedule(t + 7) == pytest.approx(wsd(t, style, 1e-3, 1e-4, 20, 500, 90), abs=1e-12, rel=0), t
        assert schedule(417) == 1e-3 > schedule(418) > schedule(506) > schedule(507) == schedule(600) == 1e-4


def test_a_trunk_never_decays(tiny_config: Callable[..., RunConfig]) -> None:
    schedule = LRSchedule(tiny_config(lr_decay_style="WSD", lr_warmup_iters=3, train_iters=50))
    assert {schedule(t) for t in range(3, 200)} == {1e-3} and schedule(2) < 1e-3


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"lr_wsd_decay_iters": 5}, "lr_wsd_decay_iters: 5 is of WSD, and lr_decay_style is cosine"),
        ({"lr_decay_style": "WSD", "lr_wsd_decay_iters": -1}, "lr_wsd_decay_iters: must be at least 0"),
        ({"lr_decay_style": "wds"}, "'wds' is not supported; choose one of linear, cosine, exponential, constant, WSD"),
        ({"lr_decay_style": "WSD", "lr_wsd_decay_style": "sqrt"}, "choose one of exponential, linear, cosine, minus_"),
    ],
)
def test_mistakes_in_a_wsd_schedule(tiny_config: Callable[..., RunConfig], keys: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        tiny_config(**keys)


def test_a_decay_longer_than_what_follows_the_warm_up_is_refused(tiny_config: Callable[..., RunConfig]) -> None:
    keys = {"lr_decay_style": "WSD", "lr_wsd_decay_iters": 45, "train_iters": 50}
    for warmup, length in (({"lr_warmup_iters": 6}, "6"), ({"warmup": 0.25}, "12.5")):
        (found,) = find_training_mistakes(tiny_config(**keys, **warmup))
        assert f"lr_wsd_decay_iters: 45 of 50 iterations, of which {length} are warm-up" in str(found)
    assert not list(find_training_mistakes(tiny_config(**keys, lr_warmup_iters=5)))
