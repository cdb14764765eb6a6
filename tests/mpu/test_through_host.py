"""Collectives through the host: the same results, in place and asynchronously, for every layout."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megatron.config import RunConfig
from megatron.mpu.through_host import take_collectives_through_host
from megatron.training import train
from tests.ranks import run_ranks

pytestmark = pytest.mark.processes

LAYOUTS = (
    {"model_parallel_size": 2, "sequence_parallel": True}, {"pipe_parallel_size": 2},
    {"zero_optimization": {"stage": 3}},
)  # fmt: skip


def train_staged(configs: list[RunConfig], staged: bool) -> int:
    """How many tensors were copied; every tensor counts as one of a GPU."""
    copied = 0

    def is_staged(tensor: torch.Tensor) -> bool:
        nonlocal copied
        copied += 1
        return True

    if staged:
        take_collectives_through_host(is_staged)
        take_collectives_through_host(is_staged)  # twice is once
    for config in configs:
        train(config)
    return copied


def test_runs_through_the_host_are_the_same(tiny_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    losses = {}
    for staged in (False, True):
        folders = [tmp_path / f"{staged}-{i}" for i in range(len(LAYOUTS))]
        configs = [
            tiny_config(**keys, train_iters=3, eval_iters=1, eval_interval=3, save=str(folder))
            for keys, folder in zip(LAYOUTS, folders, strict=True)
        ]
        copied = run_ranks(2, train_staged, configs, staged)
        assert all(copied) == staged
        losses[staged] = [
            [{k: v for k, v in json.loads(line).items() if "loss" in k} for line in (f / "metrics.jsonl").open()]
            for f in folders
        ]
    assert losses[False] == losses[True]


def asynchronous() -> list[float]:
    take_collectives_through_host(lambda tensor: True)
    dist.init_process_group("gloo")
    x = torch.full((3,), float(dist.get_rank() + 1))
    work = dist.all_reduce(x, async_op=True)
    assert work is not None and work.wait() and work.is_completed()
    return x.tolist()


def test_an_asynchronous_collective_is_done_when_it_returns() -> None:
    assert run_ranks(2, asynchronous) == [[3.0] * 3] * 2
