"""Kills and SIGTERMs to all processes of a run: nothing saved is lost, and the end is bit for bit the same.

`make soak` runs it longer: SOAK_STRIKES of each signal, SOAK_SEED for other instants.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.faults.killed_runs import LAST, SAVED_EVERY, plan, run_to_the_end, strike
from tests.growth.grown_runs import assert_equal, tensors
from tests.launched import write_config

pytestmark = pytest.mark.processes

STRIKES = int(os.environ.get("SOAK_STRIKES", "2"))
SEED = int(os.environ.get("SOAK_SEED", "5"))
KINDS = ("model", "optimizer", "rng")
KEYS = {
    "train_iters": LAST, "checkpoint_factor": SAVED_EVERY, "num_workers": 2, "hidden_dropout": 0.1,
    "zero_optimization": {"stage": 1}, "eval_iters": 3, "eval_interval": 20, "keep_last_n_checkpoints": 2,
}  # fmt: skip
WORLDS = [1, 2, 4] if STRIKES > 2 else [2]


@pytest.mark.parametrize("world", WORLDS)
def test_a_run_struck_at_random_instants_ends_as_if_nothing_had_happened(
    world: int, tmp_path: Path, tokenizer_file: Path, corpus_prefix: str
) -> None:
    def run(name: str) -> tuple[Path, Path]:
        folder = tmp_path / name
        keys = {**KEYS, "save": str(folder), "load": str(folder)}
        return write_config(tmp_path / f"{name}.yml", tokenizer_file, corpus_prefix, **keys), folder

    config, undisturbed = run("undisturbed")
    longest = run_to_the_end(config, world)
    expected, ends = tensors(undisturbed, kinds=KINDS), 0
    config, folder = run("struck0")
    for number, delay in plan(STRIKES, longest, SEED):
        if strike(config, folder, world, number, delay):
            assert_equal(tensors(folder, kinds=KINDS), expected)
            ends += 1
            config, folder = run(f"struck{ends}")
    run_to_the_end(config, world)
    assert_equal(tensors(folder, kinds=KINDS), expected)
