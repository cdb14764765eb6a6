"""Runs on a GPU's terms, in every layout: fp16 with overflows, NCCL's rules for messages, no communicator too many.

Every layout makes one run with two growths, saves and evaluates, and goes on once more from the middle, in the same
process.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

import megatron.training.loop as loop_module
from megatron.config import RunConfig
from megatron.engine.base import StepResult
from megatron.training import train
from megatron.training.loop import Trainer
from tests.growth.grown_runs import (
    CONTINUE,
    DATA,
    PIPELINE,
    TENSOR,
    assert_equal,
    metric,
    stage,
    state,
    tensors,
    zero,
)
from tests.ranks import run_ranks
from tests.strict_collectives import Traffic, order_faults, strict_collectives

MakeConfig = Callable[..., RunConfig]

ITERATIONS, RESUMED_FROM = 7, 4
GROWTHS = [stage(3, **CONTINUE), stage(6, qkv_slot_num=None, proj_slot_num=None, ffn_slot_num=104, **CONTINUE)]
# Iteration -> the one rank (from the end) whose gradients overflow in it.
OVERFLOWS = {1: -1, 2: 0, 5: -1}
SKIPPED = [1, 2, 2, 2, 3, 3, 3]
SCALES = [512, 256, 256, 512, 256, 256, 512]  # from 1024; a growth does not begin again
RUN: dict[str, Any] = {
    "train_batch_size": 4, "train_iters": ITERATIONS, "eval_interval": 4, "eval_iters": 1,
    "extra_save_iters": [1, 2, 4, 5], "lr_decay_iters": 40, "weight_decay": 0.1, "gradient_clipping": 0.5,
    "norm": "layernorm", "split": "80,10,10", "peak_tflops": 1, "pattention_backend": "fused", "growth": GROWTHS,
    "ema_decay": 0.9,
}  # fmt: skip
# The scale doubles with the second update in a row and each one after it.
FP16 = {"precision": "fp16", "fp16": {"initial_scale_power": 10, "loss_scale_window": 1, "hysteresis": 1}}
SEQUENCE = {**TENSOR, "sequence_parallel": True}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, {}),
    "dp2": (2, DATA),  # stage 0 is stage 1 in fp16
    "dp2-zero2": (2, {**DATA, **zero(2)}),
    "dp2-zero3": (2, {**DATA, **zero(3)}),
    "tp2": (2, TENSOR),
    "tp2-sp": (2, SEQUENCE),
    "pp2": (2, PIPELINE),
    "tp2-pp2-sp": (4, {**SEQUENCE, **PIPELINE}),
}
FP16_RUNS = [f"{layout}-fp16" for layout in LAYOUTS if layout != "one"]
RUNS = [*FP16_RUNS, "dp2-fp32", "tp2-fp32", "pp2-fp32"]


@dataclass
class Report:
    """What one rank saw of a run: its messages, and of each iteration (number, skipped so far, loss scale)."""

    traffic: Traffic = field(default_factory=Traffic)
    steps: list[tuple[int, int, float | None]] = field(default_factory=list)


@contextmanager
def fp16_on_the_cpu() -> Iterator[None]:
    """Let fp16 through where there is no GPU."""
    from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

    join = loop_module.initialize_distributed

    def join_in_fp32(config: RunConfig) -> Any:
        return join(config.model_copy(update={"precision": type(config.precision)(precision="fp32")}))

    with (
        patch.object(CPU_Accelerator, "is_fp16_supported", lambda self: True),
        patch.object(loop_module, "initialize_distributed", join_in_fp32),
    ):
        yield


@contextmanager
def overflow_on_one_rank(run: Trainer) -> Iterator[None]:
    """Inside, the gradient of one parameter of this rank is infinite, if the iteration is one with an overflow."""
    rank = OVERFLOWS.get(run.state.iteration + 1)
    if run.config.precision.dtype != "fp16" or rank is None or run.layout.rank != rank % run.layout.world_size:
        yield
        return
    parameter = next(p for name, p in run.engine.model.named_parameters() if "value_tokens_0" in name)
    handle = parameter.register_hook(lambda gradient: gradient * float("inf"))
    yield
    handle.remove()


@contextmanager
def reported() -> Iterator[Report]:
    """Trains under the eyes of a Report."""
    report, start, iterate = Report(), Trainer.__init__, Trainer._iterate

    def start_noted(run: Trainer, *arguments: Any) -> None:
        start(run, *arguments)
        report.traffic.note_groups()

    def iterate_noted(run: Trainer, batches: Any) -> StepResult:
        with overflow_on_one_rank(run):
            step = iterate(run, batches)
        report.steps.append(
            (run.state.iteration, run.state.skipped_iterations, run.engine.loss_scaler.get("cur_scale"))
        )
        return step

    with (
        strict_collectives() as report.traffic,
        patch.object(Trainer, "__init__", start_noted),
        patch.object(Trainer, "_iterate", iterate_noted),
    ):
        yield report


def train_and_resume(configs: tuple[RunConfig, RunConfig]) -> Report:
    """A run from its start and from its middle, as one rank saw it."""
    gc.freeze()  # a closed engine is collected at once, which takes long with all that is imported here
    with fp16_on_the_cpu(), reported() as report:
        for config in configs:
            train(config)
    return report


class Runs:
    """The runs, each made when it is first asked for; resumed, it has a second folder."""

    def __init__(self, root: Path, make: MakeConfig) -> None:
        self.root, self.make = root, make
        self._reports: dict[str, list[Report]] = {}

    def folder(self, name: str, resumed: bool = False) -> Path:
        self.reports(name)
        return self.root / f"{name}{'-resumed' if resumed else ''}"

    def reports(self, name: str) -> list[Report]:
        """What its ranks saw."""
        if name not in self._reports:
            world, layout = LAYOUTS[name[:-5]]
            settings = {**RUN, **layout, **(FP16 if name.endswith("fp16") else {})}
            whole, resumed = str(self.root / name), str(self.root / f"{name}-resumed")
            again = {**settings, "load": whole, "iteration": RESUMED_FROM, "extra_save_iters": []}
            configs = self.make(**settings, save=whole), self.make(**again, save=resumed)
            self._reports[name] = run_ranks(world, train_and_resume, configs)
        return self._reports[name]


@pytest.fixture(scope="module")
def runs(tiny_config: MakeConfig, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("gpu_terms"), tiny_config)


@pytest.mark.processes
@pytest.mark.parametrize("name", FP16_RUNS)
def test_an_overflow_that_one_rank_sees_is_skipped_by_all(runs: Runs, name: str) -> None:
    first, *others = [report.steps for report in runs.reports(name)]
    assert all(steps == first for steps in others)
    whole = first[:ITERATIONS]
    assert [skipped for _, skipped, _ in whole] == SKIPPED
    folder = runs.folder(name)
    for iteration in (2, 5):
        before, skipped, after = (tensors(folder, iteration + step) for step in (-1, 0, 1))
        assert_equal(skipped, before)
        changed = [n for n in skipped if n in after and not torch.equal(after[n], skipped[n])]
        assert any(n.startswith("model/") for n in changed), iteration


@pytest.mark.processes
@pytest.mark.parametrize("name", FP16_RUNS)
def test_a_skipped_update_counts_in_state_scale_and_schedule(runs: Runs, name: str) -> None:
    folder = runs.folder(name)
    steps = runs.reports(name)[0].steps[:ITERATIONS]
    assert [scale for _, _, scale in steps] == SCALES
    for iteration, skipped, scale in steps:
        saved = state(folder, iteration)
        assert (saved["skipped_iterations"], saved["loss_scaler"]["cur_scale"]) == (skipped, scale)
    averages = [tensors(folder, iteration, ("ema",)) for iteration in (4, 5)]
    assert_equal(*averages)
    weights = tensors(folder, 4, ("model",))
    assert not torch.equal(averages[0]["ema/final_norm.weight"], weights["model/final_norm.weight"])
    rates = metric(folder, "learning_rate")
    for iteration in OVERFLOWS:
        assert rates[iteration + 1] == rates[iteration] > 0
    assert rates[5] != rates[4] != rates[3]


@pytest.mark.processes
@pytest.mark.parametrize("name", FP16_RUNS)
def test_fp16_resumes_bit_for_bit_through_overflow_and_growth(runs: Runs, name: str) -> None:
    whole, resumed = runs.folder(name), runs.folder(name, resumed=True)
    for key in ("lm_loss", "learning_rate", "grad_norm", "loss_scale"):
        expected = {at: value for at, value in metric(whole, key).items() if at > RESUMED_FROM}
        assert metric(resumed, key) == expected, key
    kinds = ("model", "optimizer", "ema", "rng")
    assert_equal(tensors(resumed, ITERATIONS, kinds), tensors(whole, ITERATIONS, kinds))
    assert state(resumed, ITERATIONS) == {**state(whole, ITERATIONS), "rollbacks": [RESUMED_FROM]}


@pytest.mark.processes
@pytest.mark.parametrize("name", FP16_RUNS)
def test_fp16_trains_in_a_layout_as_in_one_process(runs: Runs, name: str) -> None:
    found, expected = (metric(runs.folder(run)) for run in (name, "one-fp16"))
    assert found == pytest.approx(expected, abs=5e-3)


@pytest.mark.processes
@pytest.mark.parametrize("name", FP16_RUNS)
def test_fp16_grows_without_a_change_and_keeps_its_scale(runs: Runs, name: str) -> None:
    folder = runs.folder(name)
    lineage = state(folder, ITERATIONS)["lineage"]
    assert [entry["iteration"] for entry in lineage] == [3, 6]
    assert all(entry["logit_difference"] < 1e-5 for entry in lineage)
    assert list(metric(folder, "loss_scale").values()) == SCALES


def test_stage_0_is_stage_1_in_fp16(tiny_config: MakeConfig) -> None:
    assert tiny_config(**FP16, **zero(0)).parallel.zero_optimization.stage == 1


@pytest.mark.processes
@pytest.mark.parametrize("name", RUNS)
def test_every_message_is_one_that_nccl_takes_and_waits_for(runs: Runs, name: str) -> None:
    reports = runs.reports(name)
    assert [report.traffic.faults for report in reports] == [[]] * len(reports)
    assert min(len(report.traffic.messages) for report in reports) > 100
    folder = runs.folder(name)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    # What is read before its time is not a number.
    assert all(value == value for line in lines for value in line.values())
    assert all(tensor.isfinite().all() for tensor in tensors(folder, ITERATIONS).values())


@pytest.mark.processes
@pytest.mark.parametrize("name", RUNS)
def test_all_ranks_send_in_the_same_order(runs: Runs, name: str) -> None:
    assert order_faults([report.traffic.messages for report in runs.reports(name)]) == []


@pytest.mark.processes
@pytest.mark.parametrize("name", RUNS)
def test_no_growth_and_no_further_run_makes_a_process_group(runs: Runs, name: str) -> None:
    for report in runs.reports(name):
        assert len(report.traffic.groups) == 5, "two growths, and one after the run was taken up again"
        assert len(set(report.traffic.groups)) == 1
