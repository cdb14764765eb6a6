"""Losses and norms that are not finite or stand out: what each action makes of them, on every kind of grid."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch

from megatron.checkpoint import store
from megatron.config import RunConfig
from megatron.data import IndexedDataset
from megatron.errors import UserError
from megatron.tasks import LanguageTask
from megatron.training.loop import Trainer, train
from megatron.training.spikes import robust_score
from megatron.training.state import TrainState
from tests.ranks import run_ranks
from tests.training.test_gpu_terms import fp16_on_the_cpu

MakeConfig = Callable[..., RunConfig]

LAST, BAD = 12, 10
RUN = {
    "train_iters": LAST, "checkpoint_factor": 3, "eval_iters": 0, "log_interval": 1, "gradient_clipping": 0.5,
    "train_batch_size": 8, "lr_decay_iters": 40, "warmup": 0.2, "ema_decay": 0.9,
}  # fmt: skip
SPIKES = {"window": 8, "threshold": 25.0, "limit": 2}
NAN, HIGH = float("nan"), 60.0
# Loss of the bad iteration on the last rank is multiplied by this.
LAYOUTS: dict[str, tuple[int, float, dict[str, Any]]] = {
    "dp2-zero1-bf16": (2, NAN, {"zero_optimization": {"stage": 1}, "precision": "bf16"}),
    "dp2-zero3": (2, HIGH, {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}),
    "tp2-zero0": (2, NAN, {"model_parallel_size": 2}),
    "pp2-zero0": (2, HIGH, {"pipe_parallel_size": 2}),
    "pp2-zero1": (2, NAN, {"pipe_parallel_size": 2, "zero_optimization": {"stage": 1}}),
    "dp4-zero0": (4, HIGH, {}),
}


@contextmanager
def injected(factor: float, iterations: tuple[int, ...]) -> Iterator[None]:
    """Inside, the last rank's loss is multiplied in these iterations."""
    real, iterate, now = LanguageTask.loss, Trainer._iterate, [0]
    is_last = os.environ.get("RANK", "0") == str(int(os.environ.get("WORLD_SIZE", "1")) - 1)

    def counting(run: Trainer, *arguments: Any) -> Any:
        now[0] = run.state.iteration + 1
        return iterate(run, *arguments)

    def loss(*arguments: Any, **keywords: Any) -> Any:
        return real(*arguments, **keywords) * (factor if now[0] in iterations and is_last else 1.0)

    with patch.object(Trainer, "_iterate", counting), patch.object(LanguageTask, "loss", loss):
        yield


def end_of(config: RunConfig) -> TrainState | str:
    try:
        return train(config)
    except UserError as error:
        return str(error)


def trained(runs: list[tuple[RunConfig, float]]) -> list[TrainState | str]:
    found = []
    for config, factor in runs:
        with injected(factor, (BAD,)):
            found.append(end_of(config))
    return found


def content(folder: Path, iteration: int = LAST) -> dict[str, Any]:
    """Everything of a checkpoint that a run goes on from, but for which iterations it was told to skip how."""
    step = folder / f"global_step{iteration}"
    state = json.loads((step / "train_state.json").read_text())
    del state["skips"], state["spikes_in_a_row"]
    return {"state": state} | {file.name: file.read_bytes() for file in step.glob("*.safetensors")}


def metrics(folder: Path) -> list[tuple[Any, ...]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(line["iteration"], line["lm_loss"], line["learning_rate"], line["consumed_samples"]) for line in lines]


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "spikes.jsonl").read_text().splitlines()]


def the_runs(make: MakeConfig, root: Path, name: str) -> list[tuple[RunConfig, float]]:
    """A run that rewinds, one that skips the update, and one that is told by hand to skip it."""
    world, factor, keys = LAYOUTS[name]
    ranks = world // (keys.get("model_parallel_size", 1) * keys.get("pipe_parallel_size", 1))
    base = {**RUN, **keys, "train_micro_batch_size_per_gpu": 4 // ranks}

    def config(folder: str, action: str, **more: Any) -> RunConfig:
        place = str(root / name / folder)
        return make(**{**base, "save": place, "load": place, "spikes": {**SPIKES, "action": action}, **more})

    return [
        (config("rewound", "rewind"), factor),
        (config("withheld", "skip_update"), factor),
        (config("by hand", "log", skip_iterations=[[BAD, BAD]]), 1.0),
    ]


@pytest.fixture(scope="module")
def ends(tiny_config: MakeConfig, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[Any]]]:
    """All runs of all layouts, and on every rank how each ended."""
    root, found = tmp_path_factory.mktemp("spikes"), dict[str, list[Any]]()
    for world in (2, 4):
        names = [name for name, (size, *_) in LAYOUTS.items() if size == world]
        runs = {name: the_runs(tiny_config, root, name) for name in names}
        ranks = run_ranks(world, trained, [run for name in names for run in runs[name]])
        each = len(runs[names[0]])
        for number, name in enumerate(names):
            found[name] = [rank[each * number : each * (number + 1)] for rank in ranks]
    return root, found


@pytest.mark.processes
@pytest.mark.parametrize("name", LAYOUTS)
def test_a_rewound_run_equals_one_told_to_skip_the_same(ends: Any, name: str) -> None:
    root, states = ends[0] / name, ends[1][name]
    for rewound, _, by_hand in states:
        assert rewound.iteration == by_hand.iteration == LAST and rewound.consumed_samples == 8 * LAST
        assert rewound.skips == [[BAD, BAD]] and by_hand.skips == []
        assert rewound.left_out_iterations == by_hand.left_out_iterations == 1
    expected = content(root / "by hand")
    assert len(expected) > 3 and content(root / "rewound") == expected
    lines = metrics(root / "by hand")
    assert [line[0] for line in lines] == [i + 1 for i in range(LAST) if i + 1 != BAD]
    assert metrics(root / "rewound") == lines
    assert not (root / "by hand" / "spikes.jsonl").exists()


@pytest.mark.processes
@pytest.mark.parametrize("name", LAYOUTS)
def test_an_update_is_withheld_before_it_changes_anything(ends: Any, name: str) -> None:
    root, states = ends[0] / name, ends[1][name]
    for _, withheld, _ in states:
        assert withheld.iteration == LAST and withheld.skips == []
        assert withheld.left_out_iterations == 1 and withheld.skipped_iterations == withheld.spikes_in_a_row == 0
    assert content(root / "withheld") == content(root / "by hand")
    assert metrics(root / "withheld")[BAD:] == metrics(root / "by hand")[BAD - 1 :]


@pytest.mark.processes
@pytest.mark.parametrize("name", LAYOUTS)
def test_the_documents_of_a_spike_are_named(ends: Any, name: str, corpus_prefix: str, tiny_config: MakeConfig) -> None:
    _, factor, _ = LAYOUTS[name]
    for folder, action in (("rewound", "rewind"), ("withheld", "skip_update")):
        [record] = records(ends[0] / name / folder)
        assert record["iteration"] == BAD and record["action"] == action
        if factor == HIGH:
            assert record["z"]["lm_loss"] > SPIKES["threshold"] and record["lm_loss"] > 10
        else:
            assert record["lm_loss"] == "nan" and record["z"]["lm_loss"] is None
        assert record.get("skip_iterations") == ([BAD, BAD] if action == "rewind" else None)
        documents = record["documents"]
        assert {document["set"] for document in documents} == {corpus_prefix}
        corpus = IndexedDataset(corpus_prefix)
        told = [corpus.get(d["index"], d["offset"], d["length"]) for d in documents]
        samples = LanguageTask(tiny_config(**RUN)).datasets([8 * LAST, 0, 0], {}).train
        read = [samples[number] for number in range(8 * (BAD - 1), 8 * BAD)]
        assert np.array_equal(np.concatenate(told), np.concatenate(read))


def run_here(make: MakeConfig, folder: Path, factor: float, iterations: tuple[int, ...], **keys: Any) -> Any:
    place = {"save": str(folder), "load": str(folder)}
    with injected(factor, iterations):
        return end_of(make(**{**RUN, "train_micro_batch_size_per_gpu": 8, **place, **keys}))


@pytest.mark.usefixtures("single_process")
def test_where_nobody_waits_the_next_iteration_is_skipped_too_on_resuming_as_well(
    tiny_config: MakeConfig, tmp_path: Path
) -> None:
    keys = {"log_interval": 100, "spikes": {**SPIKES, "action": "rewind"}, "hidden_dropout": 0.1}
    for name, end in (("whole", LAST), ("parts", 7)):
        state = run_here(tiny_config, tmp_path / name, NAN, (4,), **keys, exit_interval=end)
        assert state.skips == [[4, 5]] and state.left_out_iterations == 2 and state.iteration == end
    run_here(tiny_config, tmp_path / "parts", 1.0, (), **keys)
    run_here(tiny_config, tmp_path / "by hand", 1.0, (), **keys, skip_iterations=[[4, 5]])
    assert content(tmp_path / "whole") == content(tmp_path / "parts") == content(tmp_path / "by hand")


@pytest.mark.usefixtures("single_process")
def test_a_run_without_a_checkpoint_goes_back_to_its_start(tiny_config: MakeConfig, tmp_path: Path) -> None:
    keys = {"spikes": {**SPIKES, "action": "rewind"}}
    state = run_here(tiny_config, tmp_path / "rewound", NAN, (1, 2), **keys)
    assert state.skips == [[1, 1], [2, 2]] and state.left_out_iterations == 2
    run_here(tiny_config, tmp_path / "by hand", 1.0, (), **keys, skip_iterations=[[2, 2], [1, 1]])
    assert content(tmp_path / "rewound") == content(tmp_path / "by hand")
    # From another run's checkpoint: back to that one, until there is one of its own.
    other = {"load": str(tmp_path / "by hand"), "train_iters": 18, "save": str(tmp_path / "on")}
    spikes = (14, 16, 17)
    state = run_here(tiny_config, tmp_path, NAN, spikes, **{**keys, **other, "spikes": {**keys["spikes"], "limit": 3}})
    assert state.skips == [[spike, spike] for spike in spikes] and state.iteration == 18


@pytest.mark.usefixtures("single_process")
def test_a_checkpoint_that_could_not_be_written_is_not_gone_back_to(tiny_config: MakeConfig, tmp_path: Path) -> None:
    run_here(tiny_config, tmp_path / "other", 1.0, (), train_iters=6)
    keys = {"load": str(tmp_path / "other"), "on_save_failure": "continue", "spikes": {**SPIKES, "action": "rewind"}}
    with patch.object(store, "write_pieces", side_effect=OSError(28, "No space left on device")):
        said = run_here(tiny_config, tmp_path / "on", NAN, (10,), **keys)
    assert "global_step12" in said and "No space left" in said, "the last one has to be written"
    state = run_here(tiny_config, tmp_path / "on", NAN, (10,), **keys)
    assert state.skips == [[10, 10]] and state.iteration == LAST and state.left_out_iterations == 1
    [first, second] = records(tmp_path / "on")
    assert first["lm_loss"] == second["lm_loss"] == "nan" and first["documents"] == second["documents"]


@pytest.mark.usefixtures("single_process")
def test_a_run_that_was_rolled_back_goes_back_to_where_it_was_rolled_back_to(
    tiny_config: MakeConfig, tmp_path: Path
) -> None:
    run_here(tiny_config, tmp_path, 1.0, ())
    keys = {"iteration": 3, "spikes": {**SPIKES, "action": "rewind"}}
    state = run_here(tiny_config, tmp_path, NAN, (5, 8), **keys)
    assert state.rollbacks == [3] and state.skips == [[5, 5], [8, 8]] and state.iteration == LAST


@pytest.mark.usefixtures("single_process")
def test_a_growth_on_the_way_is_made_again(tiny_config: MakeConfig, tmp_path: Path) -> None:
    growth = [{"at_iteration": 4, "ffn_slot_num": 48, "lr_policy": "continue"}]
    keys = {"growth": growth, "checkpoint_factor": 100, "spikes": {**SPIKES, "action": "rewind"}}
    state = run_here(tiny_config, tmp_path / "rewound", NAN, (3, 6), **keys)
    assert state.skips == [[3, 3], [6, 6]] and len(state.lineage) == 1
    run_here(tiny_config, tmp_path / "by hand", 1.0, (), **keys, skip_iterations=[[3, 3], [6, 6]])
    assert content(tmp_path / "rewound") == content(tmp_path / "by hand")


@pytest.mark.usefixtures("single_process")
@pytest.mark.parametrize("action", ["rewind", "skip_update"])
def test_after_so_many_the_run_stops(tiny_config: MakeConfig, tmp_path: Path, action: str) -> None:
    said = run_here(tiny_config, tmp_path, NAN, tuple(range(3, 9)), spikes={**SPIKES, "action": action})
    reason = {"rewind": "the run has gone back 2 times", "skip_update": "2 updates in a row were skipped"}[action]
    assert f"spikes.limit: spike at iteration 5: lm_loss nan, grad_norm nan, and {reason} (2 allowed)" in said
    assert [record["action"] for record in records(tmp_path)] == [action, action, "stop"]
    assert [path.name for path in tmp_path.glob("global_step*")] == ["global_step3"], "of the weights of iteration 2"


ENGINES: dict[str, tuple[float, dict[str, Any]]] = {
    "accumulated": (NAN, {"gradient_accumulation_steps": 2, "train_micro_batch_size_per_gpu": 4}),
    "SGD": (HIGH, {"optimizer": {"type": "SGD", "params": {"lr": 0.01, "momentum": 0.9}}}),
    "Lion-zero2": (HIGH, {"optimizer": {"type": "Lion", "params": {"lr": 1e-4}}, "zero_optimization": {"stage": 2}}),
    "Muon": (NAN, {"optimizer": {"type": "Muon", "params": {"lr": 1e-3}}}),
    "offloaded": (HIGH, {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}),
    "accumulated-zero3-bf16": (NAN, {
        "zero_optimization": {"stage": 3}, "precision": "bf16", "gradient_accumulation_steps": 2,
        "train_micro_batch_size_per_gpu": 4,
    }),
    "fp16": (HIGH, {"precision": "fp16", "fp16": {"initial_scale_power": 20, "hysteresis": 1}}),
    "fp16-zero3": (NAN, {
        "precision": "fp16", "fp16": {"initial_scale_power": 20, "hysteresis": 1}, "zero_optimization": {"stage": 3},
    }),
}  # fmt: skip


@contextmanager
def held() -> Iterator[list[dict[str, Any]]]:
    """Inside, what this process's engine holds of values and moments after each iteration is noted."""
    iterate, found = Trainer._iterate, list[dict[str, Any]]()

    def noting(run: Trainer, *arguments: Any) -> Any:
        step = iterate(run, *arguments)
        pieces = run.engine.state.pieces(with_optimizer=True)
        found.append({f"{piece.kind}/{piece.name}": piece.tensor.clone() for piece in pieces})
        return step

    with patch.object(Trainer, "_iterate", noting):
        yield found


@pytest.mark.usefixtures("single_process")
@pytest.mark.parametrize("name", ENGINES)
def test_every_optimizer_holds_still_when_an_update_is_withheld(
    tiny_config: MakeConfig, tmp_path: Path, name: str
) -> None:
    factor, keys = ENGINES[name]
    with held() as found, fp16_on_the_cpu() if "fp16" in name else nullcontext():
        state = run_here(
            tiny_config, tmp_path, factor, (BAD,), spikes={**SPIKES, "action": "skip_update"}, save=None, load=None,
            **keys,
        )  # fmt: skip
    assert state.left_out_iterations == 1 and bool(state.skipped_iterations) == ("fp16" in name)
    before, at, after = found[BAD - 2 : BAD + 1]
    assert before.keys() == at.keys() and all(torch.equal(at[key], value) for key, value in before.items())
    assert not all(torch.equal(after[key], value) for key, value in at.items())
    assert all(tensor.isfinite().all() for tensor in after.values())


@pytest.mark.usefixtures("single_process")
def test_what_is_only_logged_changes_nothing(tiny_config: MakeConfig, tmp_path: Path) -> None:
    log = {"spikes": {**SPIKES, "action": "log"}}
    run_here(tiny_config, tmp_path / "logged", HIGH, (BAD,), **log)
    run_here(tiny_config, tmp_path / "plain", HIGH, (BAD,))
    logged, plain = content(tmp_path / "logged"), content(tmp_path / "plain")
    assert logged["state"].pop("spike_window")["lm_loss"][-LAST + BAD - 1] > 10 and not plain["state"].pop(
        "spike_window"
    )
    assert logged == plain
    [record] = records(tmp_path / "logged")
    assert record["iteration"] == BAD and record["action"] == "log"
    for allows, end in ((False, "lm_loss: nan is not finite"), (True, LAST)):
        said = run_here(
            tiny_config, tmp_path / str(allows), NAN, (LAST,), **log, allow_nonfinite_loss=allows, save=None
        )
        assert str(end) in str(said)


@pytest.mark.usefixtures("single_process")
def test_a_run_may_begin_with_iterations_that_are_skipped(tiny_config: MakeConfig, tmp_path: Path) -> None:
    """Its checkpoint has no moments yet, and is whole all the same."""
    keys = {"skip_iterations": [[1, 5]]}
    run_here(tiny_config, tmp_path / "parts", 1.0, (), **keys, exit_interval=4)
    state = run_here(tiny_config, tmp_path / "parts", 1.0, (), **keys)
    assert state.left_out_iterations == 5 and state.updates == LAST
    run_here(tiny_config, tmp_path / "whole", 1.0, (), **keys)
    assert content(tmp_path / "parts") == content(tmp_path / "whole")


def test_scores_are_told_by_medians() -> None:
    past = [2.0, 2.2, 1.8, 2.1, 1.9, 2.0, 2.1, 50.0]
    assert robust_score(2.05, past) == 0 and robust_score(2.05 + 0.14826, past) == pytest.approx(1 / 0.75, rel=0.5)
    assert robust_score(9.0, past) > 30 > 0 > robust_score(1.0, past)
    assert robust_score(1.01, [1.0] * 8) == pytest.approx(10.0), "what never varied is taken to vary a little"
