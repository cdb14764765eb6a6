"""Process groups are made once for each purpose."""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megatron.mpu import Layout
from megatron.mpu.groups import process_group
from tests.ranks import run_ranks

pytestmark = pytest.mark.processes


def groups_of_a_process() -> list[int]:
    """Number of groups of this rank after each step."""
    dist.init_process_group("gloo")
    world = dist.distributed_c10d._world
    counts = [len(world.pg_map)]
    layout = Layout.for_world(dist.get_rank(), 4, pipeline_size=2, tensor_size=2).connect()
    counts.append(len(world.pg_map))
    again = Layout.for_world(dist.get_rank(), 4, pipeline_size=2, tensor_size=2).connect()
    counts.append(len(world.pg_map))
    assert again.tensor.group is layout.tensor.group and again.pipeline.group is layout.pipeline.group
    # The same ranks for another purpose, and with another limit.
    process_group("other", range(4))
    assert process_group("other", [3, 2, 1, 0]) is process_group("other", range(4)) is not layout.replica.group
    counts.append(len(world.pg_map))
    layout.connect(timedelta(days=1))
    counts.append(len(world.pg_map))
    total = torch.ones(1)
    dist.all_reduce(total, group=again.tensor.group)
    assert total.item() == 2
    dist.barrier()
    dist.destroy_process_group()
    with pytest.raises(ValueError, match="no process group to be part of"):
        process_group("other", range(4))
    return counts


def test_a_group_is_made_once_for_each_role_and_limit() -> None:
    # The world; tensor and pipeline axis; nothing; one; both axes with another limit.
    assert run_ranks(4, groups_of_a_process) == [[1, 3, 3, 4, 6]] * 4


def sums_in_two_worlds(folder: str) -> float:
    total = torch.ones(1)
    for name in ("first", "second"):
        rank, store = int(os.environ["RANK"]), f"file://{folder}/{name}"
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
        dist.all_reduce(total, group=process_group("other", [0, 1]))
        dist.barrier()
        dist.destroy_process_group()
    return total.item()


def test_a_world_that_is_left_takes_its_groups_with_it(tmp_path: Path) -> None:
    assert run_ranks(2, sums_in_two_worlds, str(tmp_path)) == [4.0, 4.0]
