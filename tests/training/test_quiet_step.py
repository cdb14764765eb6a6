"""A step that neither logs nor saves nor evaluates: nobody waits for the device, all learn in time what went wrong."""

from __future__ import annotations

import os
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from megatron.config import RunConfig
from megatron.errors import UserError
from megatron.signals import StopRequest
from megatron.tasks import LanguageTask
from megatron.training.loop import Trainer, train
from tests.host_looks import Step, counted
from tests.ranks import run_ranks

pytestmark = pytest.mark.processes

MakeConfig = Callable[..., RunConfig]

QUIET = {"log_interval": 100, "eval_interval": 100, "gradient_clipping": 0.5, "train_iters": 4}
COUNTED = 3
"""An iteration with quiet ones before and after it."""
STAGES = {
    f"zero{stage}-{precision}": {"zero_optimization": {"stage": stage}, "precision": precision}
    for stage in (0, 1, 2, 3)
    for precision in ("fp32", "bf16")
    if (stage, precision) != (0, "bf16")  # is stage 1
}
AXES = {
    f"{axis}2-zero{stage}-{precision}": {**STAGES[f"zero{stage}-{precision}"], **keys}
    for axis, keys in {"tp": {"model_parallel_size": 2}, "pp": {"pipe_parallel_size": 2}}.items()
    for stage, precision in ((0, "fp32"), (1, "fp32"), (1, "bf16"))
}
WATCHED = {"spikes": {"action": "log", "window": 8}, "check_replicas_interval": 100}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    **{name: (1, keys) for name, keys in STAGES.items()},
    "zero0-watched": (1, {**STAGES["zero0-fp32"], **WATCHED}),
    "dp2-zero0-watched": (2, {**STAGES["zero0-fp32"], **WATCHED}),
    "zero0-accumulated": (1, {**STAGES["zero0-fp32"], "gradient_accumulation_steps": 2}),
    "zero0-averaged": (1, {**STAGES["zero0-fp32"], "ema_decay": 0.9}),
    "dp2-zero3-averaged": (2, {**STAGES["zero3-bf16"], "ema_decay": 0.9}),
    "zero0-masked": (1, {**STAGES["zero0-fp32"], "eod_mask_loss": True, "hidden_dropout": 0.1}),
    **{f"dp2-{name}": (2, keys) for name, keys in STAGES.items()},
    **{name: (2, keys) for name, keys in AXES.items()},
    "tp2-sequence": (2, {**AXES["tp2-zero0-fp32"], "sequence_parallel": True}),
}
# What the model and the gradient norm exchange, and what tells the ranks of a step.
MAY_SEND = ("mpu/collectives.py", "engine/gradients.py", "engine/watch.py")


def steps_of(configs: dict[str, RunConfig]) -> dict[str, Step]:
    """Of each run the step between the beginnings of two quiet iterations."""
    found = {}
    for name, config in configs.items():
        iterate = Trainer._iterate
        with counted() as report:

            def counting(run: Trainer, *arguments: Any, iterate: Any = iterate, report: Any = report) -> Any:
                report.next_step()
                assert run.engine.state.inner.defaults["fused"]
                return iterate(run, *arguments)

            with patch.object(Trainer, "_iterate", counting):
                train(config)
        assert len(report.steps) == QUIET["train_iters"] + 1
        found[name] = report.steps[COUNTED]
        assert report.steps[-1].ours(report.steps[-1].looks), "the last step is looked at: the counting works"
    return found


@pytest.fixture(scope="module")
def found(tiny_config: MakeConfig) -> dict[str, list[Step]]:
    """Of each layout what every rank counted."""
    steps: dict[str, list[Step]] = {}
    for world in (1, 2):
        configs = {name: tiny_config(**QUIET, **keys) for name, (size, keys) in LAYOUTS.items() if size == world}
        ranks = run_ranks(world, steps_of, configs)
        steps |= {name: [rank[name] for rank in ranks] for name in configs}
    return steps


@pytest.mark.parametrize("name", LAYOUTS)
def test_only_deepspeed_waits_for_the_device(found: dict[str, list[Step]], name: str) -> None:
    for step in found[name]:
        assert step.ours(step.looks) == Counter()
    if "zero0" in name and "pp2" not in name:  # a pipeline's first stage makes room for the loss from the last one
        assert all(not step.looks for step in found[name])


@pytest.mark.parametrize("name", LAYOUTS)
def test_one_message_tells_the_ranks_of_a_step(found: dict[str, list[Step]], name: str) -> None:
    for step in found[name]:
        files = Counter[str]()
        for place, number in step.ours(step.messages).items():
            files[place.partition(":")[0]] += number
        assert set(files) <= set(MAY_SEND)
        assert files["engine/watch.py"] == (1 if LAYOUTS[name][0] > 1 else 0)
        assert files["engine/gradients.py"] <= 1
        assert not files["mpu/collectives.py"] or name.startswith("tp2")


def message_of(config: RunConfig) -> str:
    try:
        train(config)
    except UserError as error:
        return str(error)
    return "nothing"


def broken_at(iteration: int, configs: list[RunConfig]) -> list[tuple[str, int]]:
    """The loss of the last rank is not a number in this iteration: what each run says, and how many losses it took."""
    found = []
    for config in configs:
        real, calls = LanguageTask.loss, []

        def broken(*arguments: Any, real: Any = real, calls: list[int] = calls, **keywords: Any) -> Any:
            calls.append(1)
            is_last = os.environ["RANK"] == str(int(os.environ["WORLD_SIZE"]) - 1)
            return real(*arguments, **keywords) * (float("nan") if len(calls) == iteration and is_last else 1.0)

        with patch.object(LanguageTask, "loss", broken):
            found.append((message_of(config), len(calls)))
    return found


@pytest.mark.parametrize("world", [1, 2])
def test_a_loss_that_is_not_finite_is_never_saved(tiny_config: MakeConfig, tmp_path: Path, world: int) -> None:
    runs = {
        "a step later": {"train_iters": 7, "checkpoint_factor": 4},
        "before it is saved": {"train_iters": 7, "checkpoint_factor": 3},
        "before it is logged": {"train_iters": 7, "log_interval": 3},
        "at the end": {"train_iters": 3},
        "without a folder": {"train_iters": 3},
    }
    configs = []
    for name, keys in runs.items():
        save = {} if name == "without a folder" else {"save": str(tmp_path / name)}
        configs.append(tiny_config(**{**QUIET, "zero_optimization": {"stage": 0}, **save, **keys}))
    for rank in run_ranks(world, broken_at, 3, configs):
        assert all("lm_loss: nan is not finite, stopped before" in message for message, _ in rank), rank
        assert [calls for _, calls in rank] == [4, 3, 3, 3, 3]
    assert not list(tmp_path.glob("*/global_step*"))
    assert not (tmp_path / "before it is logged/metrics.jsonl").read_text()


def stopped_in(iteration: int, config: RunConfig) -> int:
    """The last rank gets a signal in an iteration; the one that this rank ends with."""
    step = Trainer._iterate

    def signalled(run: Trainer, *arguments: Any) -> Any:
        if run.state.iteration + 1 == iteration and run.layout.rank == run.layout.world_size - 1:
            os.kill(os.getpid(), signal.SIGUSR1)
            time.sleep(0.2)  # until the thread has heard it
        return step(run, *arguments)

    with patch.object(Trainer, "_iterate", signalled), StopRequest() as stop:
        return train(config, stop).iteration


@pytest.mark.parametrize("keys", [{}, {"pipe_parallel_size": 2}], ids=["data ranks", "stages"])
def test_all_ranks_stop_after_the_same_iteration_and_save_it(
    tiny_config: MakeConfig, tmp_path: Path, keys: dict[str, int]
) -> None:
    config = tiny_config(**{**QUIET, "train_iters": 9}, save=str(tmp_path / "out"), load=str(tmp_path / "out"), **keys)
    assert run_ranks(2, stopped_in, 4, config) == [5, 5]
    assert (tmp_path / "out" / "latest").read_text().strip() == "global_step5"
    whole = tiny_config(**{**QUIET, "train_iters": 9}, save=str(tmp_path / "whole"), **keys)
    run_ranks(2, message_of, config)
    run_ranks(2, message_of, whole)
    first, second = (
        {file.name: file.read_bytes() for file in (tmp_path / name / "global_step9").glob("*.safetensors")}
        for name in ("out", "whole")
    )
    assert first and first == second


def test_one_process_stops_at_once(tiny_config: MakeConfig, tmp_path: Path) -> None:
    config = tiny_config(**QUIET, save=str(tmp_path / "out"))
    assert run_ranks(1, stopped_in, 4, config) == [4]
    assert (tmp_path / "out" / "latest").read_text().strip() == "global_step4"
