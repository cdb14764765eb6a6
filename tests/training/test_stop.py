"""A request to stop, on one rank of several."""

from __future__ import annotations

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
