"""Volumes of communication and the bubble of a pipeline."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from megatron.growth import TokenCounts, grown_config
from megatron.planner import Choice
from megatron.planner.step_time import data_volumes, step_time, tensor_elements
from tests.planner.workloads import H200, small


@pytest.mark.parametrize(("kind", "units", "statistics"), [("tokenformer", 16, 20), ("global", 8, 0)])
def test_tensor_volumes_of_a_layer(kind: str, units: int, statistics: int) -> None:
    work = small(kind)
    count = 2 * 256
    entries, rows = tensor_elements(work, Choice(4, 1, 1, False, 0, 2, 1, False), kind)
    assert entries == units * count * 64 * 3 / 4
    assert rows == statistics * count * 3 / 4
    if kind == "tokenformer":
        growth = {"qkv": 96, "ffn": 300}
        grown = grown_config(grown_config(work.model, TokenCounts(**growth, row_norm="segment")), TokenCounts())
        assert tensor_elements(replace(work, model=grown), Choice(4, 1, 1, False, 0, 2, 1, False), kind)[1] == 2 * rows


def test_data_volumes_of_each_zero_stage() -> None:
    def volume(stage: int, **zero: Any) -> tuple[float, float]:
        work = small(precision="bf16", zero_optimization={"stage": max(1, stage), **zero})
        return data_volumes(work, Choice(1, 1, 4, False, stage, 2, 5, False), 1000)

    unit = 2 * 1000 * 3 / 4
    assert volume(0) == (2 * unit, 0)
    assert volume(1) == volume(2) == (2 * unit, unit)
    assert volume(2, use_multi_rank_bucket_allreduce=False) == (unit, unit)
    assert volume(3) == (unit, 2 * 5 * unit)


def test_bubble_is_the_known_fraction() -> None:
    work = small(num_layers=4)
    time = step_time(work, Choice(1, 4, 1, False, 0, 2, 16, False), H200)
    assert time.bubble == pytest.approx((time.compute + time.pipeline) * 3 / 16)
