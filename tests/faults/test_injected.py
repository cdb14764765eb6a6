"""A run of two ranks that meets one fault after the other, and is started again after each, ends as if none had been.

A few of each kind here; `make soak` has SOAK_ROUNDS times as many, at other instants.
"""

from __future__ import annotations

import os
import random
import signal
from contextlib import suppress
from pathlib import Path

import pytest

from megatron.checkpoint.store import RunFolder
from tests.faults.injected import KINDS, Fault, damage_newest, draw_fault
from tests.faults.killed_runs import Group, members, start_group
from tests.growth.grown_runs import assert_equal, tensors
from tests.launched import wait_until, write_config

pytestmark = pytest.mark.processes

ROUNDS = int(os.environ.get("SOAK_ROUNDS", "1"))
SEED = int(os.environ.get("SOAK_SEED", "3"))
WORLD, LAST, KIB = 2, 24, 300
PARTS = ("model", "optimizer", "rng")
KEYS = {
    "train_iters": LAST, "checkpoint_factor": 3, "zero_optimization": {"stage": 1}, "hidden_dropout": 0.1,
    "keep_last_n_checkpoints": 3,
    "watchdog": {"limits": {"forward_backward": 8, "batch": 8}, "heartbeat_seconds": 10},
}  # fmt: skip


def attempt(config: Path, fault: Fault | None) -> list[int]:
    """Exit codes of the ranks of one start, all of which end: those that are stopped are killed then."""
    group = start_group(config, WORLD, fault)
    others = [process for rank, process in enumerate(group.processes) if fault is None or rank != fault.rank]
    assert wait_until(lambda: not any(process.is_alive() for process in others), 90), f"{fault}: a rank hangs"
    if fault is not None and fault.kind == "stop":
        with suppress(ProcessLookupError):
            os.killpg(group.id, signal.SIGKILL)
    return ended(group, fault)


def ended(group: Group, fault: Fault | None) -> list[int]:
    for process in group.processes:
        process.join(30)
    assert wait_until(lambda: not members(group.id), 10), f"{fault} leaves {members(group.id)}"
    return [process.exitcode for process in group.processes]


def expected_codes(kind: str) -> set[int]:
    """What a rank may end with: nothing but what is documented."""
    own = {"kill": -9, "torn write": -9, "stop": -9, "error": 1, "nan": 2, "full disk": 2}
    return {0, own.get(kind, 0), *({75, 1} if kind in ("kill", "torn write", "stop", "error") else ())}


def test_a_run_that_meets_every_fault_ends_as_if_none_had_been(
    tmp_path: Path, tokenizer_file: Path, corpus_prefix: str
) -> None:
    def written(name: str) -> tuple[Path, Path]:
        folder = tmp_path / name
        keys = {**KEYS, "save": str(folder), "load": str(folder)}
        return write_config(tmp_path / f"{name}.yml", tokenizer_file, corpus_prefix, **keys), folder

    config, undisturbed = written("undisturbed")
    assert attempt(config, None) == [0] * WORLD
    expected, draw = tensors(undisturbed, kinds=PARTS), random.Random(SEED)
    kinds = [*KINDS] * ROUNDS
    draw.shuffle(kinds)
    config, folder = written("struck0")
    whole: list[int] = []
    for number, kind in enumerate(kinds):
        fault = draw_fault(kind, WORLD, max([0, *whole]), LAST, KIB, draw)
        codes = attempt(config, fault)
        assert set(codes) <= expected_codes(fault.kind), (fault, codes)
        saved = RunFolder(folder).iterations()
        assert saved[-1:] >= whole[-1:], f"{fault} loses a checkpoint"
        whole = saved
        if saved[-1:] == [LAST]:
            assert_equal(tensors(folder, kinds=PARTS), expected)
            config, folder = written(f"struck{number + 1}")
            whole = []
        elif draw.random() < 0.5 and damage_newest(folder, draw):
            whole = saved[:-1]
    assert attempt(config, None) == [0] * WORLD
    assert_equal(tensors(folder, kinds=PARTS), expected)
