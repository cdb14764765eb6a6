"""What a step tells all ranks, one step later."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron.engine.watch import StepWatch
from megatron.errors import UserError
from megatron.mpu import SINGLE, Layout
from tests.ranks import run_ranks

CPU = torch.device("cpu")
NAN, INF = float("nan"), float("inf")


def watch(layout: Layout = SINGLE, **options: Any) -> StepWatch:
    return StepWatch(layout, CPU, "loss", **options)


def error_of(watch: StepWatch) -> str:
    try:
        watch.look()
    except UserError as error:
        return str(error).partition(" is not finite")[0]
    return ""


@pytest.mark.parametrize(
    ("loss", "norm", "message"),
    [
        (1.5, 2.0, ""), (1.5, None, ""), (3e38, 0.0, ""),
        (NAN, 2.0, "loss: nan"), (-INF, NAN, "loss: -inf"), (1.5, INF, "grad_norm: inf"), (1.5, NAN, "grad_norm: nan"),
    ],
)  # fmt: skip
def test_what_is_not_finite_is_named(loss: float, norm: float | None, message: str) -> None:
    for make in (torch.tensor, lambda x: torch.tensor(x, dtype=torch.bfloat16), float):
        told = watch()
        told.post(torch.tensor(loss), None if norm is None else make(norm), False, 1)
        assert error_of(told) == message
        assert error_of(told) == "", "it was looked at"


def test_the_next_step_looks_at_the_one_before() -> None:
    told = watch()
    told.post(torch.tensor(NAN), None, False, 1)
    with pytest.raises(UserError, match="stopped before anything was saved"):
        told.post(torch.tensor(1.0), None, False, 1)


def test_a_request_to_stop_passes_where_nothing_has_to_be_finite() -> None:
    told = watch(allow_nonfinite=True)
    told.post(torch.tensor(NAN), INF, False, 1)
    told.look()
    assert not told.stops
    told.post(torch.tensor(NAN), INF, True, 1)
    assert told.stops, "one process has nobody to tell"


def told_by_others() -> list[Any]:
    """The last of four ranks meets something: what this rank knows of it before and after it looks, and says."""
    dist.init_process_group("gloo")
    layout, is_last = Layout.for_world(dist.get_rank(), 4, 2, 1), dist.get_rank() == 3
    found: list[Any] = []
    for allow, loss, norm, stop in ((False, 1.0, 1.0, True), (False, 1.0, INF, False), (True, NAN, INF, True)):
        told = watch(layout, allow_nonfinite=allow)
        told.post(torch.tensor(loss if is_last else 1.0), norm if is_last else 0.5, stop and is_last, 1)
        before = told.stops
        found.append((before, error_of(told), told.stops))
    return found


@pytest.mark.processes
def test_what_one_rank_meets_all_know_after_they_look() -> None:
    expected = [(False, "", True), (False, "grad_norm: inf", False), (False, "", True)]
    assert run_ranks(4, told_by_others) == [expected] * 4
