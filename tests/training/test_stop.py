"""A request to stop, on one rank of several."""

from __future__ import annotations

import math
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron.config import RunConfig
from megatron.signals import StopRequest
from megatron.training.data import RunData
from megatron.training.loop import train
from tests.growth.grown_runs import assert_equal, tensors
from tests.ranks import run_ranks

pytestmark = pytest.mark.processes


def stopped_in_validation(config: RunConfig) -> tuple[int, float]:
    """Rank 1 gets a signal at its third batch; the iteration a rank ends with, and the batches it evaluated."""
    evaluated, batches = 0, RunData.evaluation

    def counted(run: RunData, split: str) -> object:
        nonlocal evaluated
        for batch in batches(run, split) or ():
            evaluated += 1
            if evaluated == 3 and os.environ["RANK"] == "1":
                os.kill(os.getpid(), signal.SIGUSR2)
                time.sleep(0.2)  # until the thread has heard it
            yield batch

    RunData.evaluation = counted  # type: ignore[method-assign, assignment]
    with StopRequest() as stop:
        state = train(config, stop)
    return state.iteration, evaluated


def stopped_by_the_clock(config: RunConfig) -> int:
    """The iteration a rank ends with; the second rank's clock says the opposite of the first one's."""
    with StopRequest() as stop:
        if os.environ["RANK"] == "1":
            stop._began = math.inf if (config.training.exit_duration_in_mins or 0) < 1 else -math.inf
        return train(config, stop).iteration


def test_all_ranks_stop_when_the_first_has_run_long_enough_and_the_run_resumes(
    tmp_path: Path, tiny_config: Callable[..., RunConfig]
) -> None:
    keys = {"train_iters": 5, "eval_iters": 0, "hidden_dropout": 0.1}
    run_ranks(2, stopped_by_the_clock, tiny_config(**keys, save=str(tmp_path / "whole")))
    folders = {"save": str(tmp_path / "parts"), "load": str(tmp_path / "parts")}
    ends = run_ranks(2, stopped_by_the_clock, tiny_config(**keys, **folders, exit_duration_in_mins=1e-9))
    assert ends[0] == ends[1] and 0 < ends[0] < 5, "every start trains a little, or the run would never end"
    assert run_ranks(2, stopped_by_the_clock, tiny_config(**keys, **folders, exit_duration_in_mins=60.5)) == [5, 5]
    assert_equal(tensors(tmp_path / "parts"), tensors(tmp_path / "whole"))


@pytest.mark.parametrize("keys", [{}, {"pipe_parallel_size": 2}], ids=["data ranks", "stages"])
def test_a_validation_ends_between_batches_on_all_ranks_and_leaves_no_line(
    tmp_path: Path, tiny_config: Callable[..., RunConfig], keys: dict[str, int]
) -> None:
    save = tmp_path / "out"
    config = tiny_config(save=str(save), eval_iters=12, eval_interval=3, **keys)
    ends = run_ranks(2, stopped_in_validation, config)
    assert [iteration for iteration, _ in ends] == [3, 3]
    assert len({batches for _, batches in ends}) == 1 and ends[0][1] < 12
    assert (save / "latest").read_text().strip() == "global_step3"
    assert "valid" not in (save / "metrics.jsonl").read_text()
