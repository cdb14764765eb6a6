"""Learning rates equal those of the official code."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron.config import RunConfig
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
