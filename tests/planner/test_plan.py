"""Layouts are valid, fit, and the fastest comes first."""

from __future__ import annotations

from megatron.config.checks import find_parallel_mistakes
from megatron.planner import MACHINES, Workload, candidates, plan
from tests.planner.workloads import H200, published


def test_every_layout_is_one_the_configuration_accepts() -> None:
    config = published("tokenformer/150M")
    found = candidates(Workload.of(config), H200, 24)
    assert {c.choice.tensor for c in found} <= {1, 2, 3, 4, 6, 12}
    for candidate in found:
        choice = candidate.choice
        assert choice.gpus == 24
        assert choice.samples == 1024
        assert choice.pipeline == 1 or choice.zero_stage <= 1
        zero = config.parallel.zero_optimization.model_copy(update={"stage": choice.zero_stage})
        axes = {"model_parallel_size": choice.tensor, "pipe_parallel_size": choice.pipeline, "zero_optimization": zero}
        asked = config.model_copy(update={"parallel": config.parallel.model_copy(update=axes)})
        assert not [*find_parallel_mistakes(asked.model, asked.parallel)]


def test_best_comes_first_and_everything_fits() -> None:
    best = plan(Workload.of(published("tokenformer/1-5B")), MACHINES["A100-40GB"], 8)
    assert all(candidate.memory.total <= MACHINES["A100-40GB"].usable_bytes for candidate in best)
    assert all(a.time.total < 1.011 * b.time.total for a, b in zip(best, best[1:], strict=False))
    assert 0 < best[0].mfu < 1
