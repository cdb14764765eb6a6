"""A job killed at any moment around a growth ends, once resumed, with the bits of the job that was not killed."""

from __future__ import annotations

import itertools
import os
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron.checkpoint.store import FolderLock
from megatron.config import RunConfig
from megatron.errors import UserError
from megatron.training import train
from tests.growth.grown_runs import CONTINUE, MakeConfig, assert_equal, metric, stage, state, tensors
from tests.ranks import start_process

pytestmark = pytest.mark.usefixtures("single_process")
GROWTH, LAST = 6, 24
AGES = {
    "lr_scale": {"new_keys": 30.0, "old": 0.5}, "new_tokens_warmup": 5, "new_keys_decay": "at_old_rms",
    "new_moments": "mean",
}  # fmt: skip
KEYS = {
    "train_iters": LAST, "hidden_dropout": 0.1, "checkpoint_factor": 4, "eval_interval": GROWTH, "eval_iters": 1,
    "lr_decay_style": "WSD", "lr_wsd_decay_iters": 8, "ema_decay": 0.9,
}  # fmt: skip
GROWTHS: dict[str, tuple[dict[str, Any], int, int]] = {
    "zero keys": (AGES, 6, 16), "rotated keys": ({**AGES, "new_keys": "rotated", "proj_slot_num": 48}, 4, 6),
    "own row norm": ({**AGES, "row_norm": "segment"}, 4, 6),
}  # fmt: skip
"""What a growth says, how often it is killed, and in which update its keys are as large as the old ones and decay."""
KINDS = ("model", "optimizer", "ema", "rng")


def poll(seconds: float = 60.0) -> Iterator[None]:
    """Every two milliseconds; fails when it takes too long."""
    end = time.monotonic() + seconds
    while True:
        yield
        assert time.monotonic() < end, "the run did not get there in time"
        time.sleep(0.002)


def reached(folder: Path, iteration: int) -> bool:
    """Has the run logged this iteration?"""
    file = folder / "metrics.jsonl"
    return file.exists() and f'"iteration": {iteration},' in file.read_text()


def is_saved(folder: Path) -> bool:
    """Is the checkpoint at the growth, or a later one, the latest?"""
    latest = folder / "latest"
    return latest.exists() and int(latest.read_text().strip().removeprefix("global_step")) >= GROWTH


def is_unlocked(folder: Path) -> bool:
    """Can another run write there? A compiler that DeepSpeed was just starting holds the lock until it runs."""
    try:
        FolderLock(folder).close()
    except UserError:
        return False
    return True


def start_and_wait(config: RunConfig, folder: Path, after_save: bool) -> Any:
    """The run in a process of its own, at its last iteration before the growth, or just when it has saved there."""
    process = start_process(train, config)
    for _ in poll():
        if is_saved(folder) if after_save else reached(folder, GROWTH - 1):
            return process


def runs_alike(tiny_config: MakeConfig, root: Path, **growth: Any) -> Iterator[tuple[Path, RunConfig]]:
    """Folder and configuration of one run after the other."""
    keys = {**KEYS, "growth": [stage(GROWTH, **CONTINUE, **growth)]}
    for folder in (root / str(number) for number in itertools.count()):
        yield folder, tiny_config(**keys, save=str(folder), load=str(folder))


@pytest.mark.processes
@pytest.mark.parametrize("kind", GROWTHS)
def test_a_run_killed_around_a_growth_ends_as_if_nothing_had_happened(
    kind: str, tiny_config: MakeConfig, tmp_path: Path
) -> None:
    growth, kills, decays = GROWTHS[kind]
    configs = runs_alike(tiny_config, tmp_path, **growth)
    folder, config = next(configs)
    process = start_and_wait(config, folder, after_save=False)
    begin = time.monotonic()
    moments = {}
    for name, arrived in (("saved", lambda: is_saved(folder)), ("grown", lambda: reached(folder, GROWTH + 2))):
        for _ in poll():
            if arrived():
                moments[name] = time.monotonic() - begin
                break
    process.join()
    expected = tensors(folder, kinds=KINDS)
    (entry,) = state(folder)["lineage"]
    assert process.exitcode == 0 and entry["decays_since"] == dict.fromkeys(("qkv", "proj", "ffn"), decays)
    # Half of the delays from the iteration before the save on, half from the save on until after the growth.
    generator, saved_at_kill = random.Random(7), []
    for kill in range(kills):
        after_save = kill >= kills // 2
        longest = moments["grown"] - moments["saved"] if after_save else moments["saved"]
        delay = (kill % (kills // 2) + generator.random()) / (kills // 2) * longest
        killed, config = next(configs)
        process = start_and_wait(config, killed, after_save)
        end = time.monotonic() + delay
        for _ in poll():
            if time.monotonic() >= end or reached(killed, GROWTH + 2):  # this machine may be faster than before
                break
        assert process.is_alive(), "the kill came too late"
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert process.exitcode == -signal.SIGKILL
        assert not reached(killed, LAST)
        saved_at_kill.append(is_saved(killed))
        for _ in poll():
            if is_unlocked(killed):
                break
        train(config)
        assert metric(killed)[LAST] == metric(folder)[LAST], (kill, delay)
        assert_equal(tensors(killed, kinds=KINDS), expected)
        assert len(state(killed)["lineage"]) == 1
        assert not list(killed.glob(".saving-*")), "a later save removes what a kill left behind"
    assert not all(saved_at_kill) and any(saved_at_kill), saved_at_kill
