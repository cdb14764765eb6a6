"""What one rank meets alone reaches all of them, in one line; and what holds a slice or a share is what it seems."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from megatron.checkpoint import store
from megatron.config import RunConfig
from megatron.engine import build
from megatron.errors import UserError
from megatron.mpu import processes
from megatron.tasks.language import LanguageTask
from megatron.training import train
from megatron.training.loop import Trainer
from tests.ranks import run_ranks

pytestmark = pytest.mark.processes

MakeConfig = Callable[..., RunConfig]


def message_of(config: RunConfig) -> str:
    try:
        train(config)
    except UserError as error:
        return str(error)
    return "nothing"


def loss_of_rank_1_breaks(configs: list[RunConfig]) -> list[str]:
    real = LanguageTask.loss

    def broken(*arguments: Any, **keywords: Any) -> Any:
        return real(*arguments, **keywords) * (float("nan") if os.environ["RANK"] == "1" else 1.0)

    LanguageTask.loss = broken  # type: ignore[method-assign]
    return [message_of(config) for config in configs]


def test_a_loss_that_one_data_rank_sees_stops_all_of_them(tiny_config: MakeConfig, tmp_path: Path) -> None:
    configs = [
        tiny_config(train_iters=2, save=str(tmp_path / str(stage)), zero_optimization={"stage": stage})
        for stage in (0, 1, 2, 3)
    ]
    for messages in run_ranks(2, loss_of_rank_1_breaks, configs):
        assert all("is not finite, stopped before anything was saved" in message for message in messages), messages
    assert not list(tmp_path.glob("*/global_step*"))


def full_disk(config: RunConfig) -> str:
    def refuse(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    store.write_text = refuse
    return message_of(config)


def damaged(config: RunConfig) -> str:
    return message_of(config)


def test_a_full_disk_and_a_damaged_checkpoint_are_the_same_line_on_every_rank(
    tiny_config: MakeConfig, tmp_path: Path
) -> None:
    keys = {"save": str(tmp_path), "load": str(tmp_path), "zero_optimization": {"stage": 1}}
    first, second = run_ranks(2, full_disk, tiny_config(train_iters=1, **keys))
    assert first == second and "No space left on device" in first
    train_two = tiny_config(train_iters=1, **keys)
    assert run_ranks(2, message_of, train_two) == ["nothing", "nothing"]
    file = next((tmp_path / "global_step1").glob("model-*"))
    file.write_bytes(file.read_bytes()[:-1])
    first, second = run_ranks(2, damaged, tiny_config(train_iters=2, **keys))
    assert first == second and f"is damaged: {file.name} has" in first


def start_at_stage_3(config: RunConfig) -> tuple[str, list[int]]:
    """What an unknown order of slices says, and the largest number of parameters that were whole at one time."""
    whole: list[int] = []
    real = build.partition_parameters

    def counting(module: torch.nn.Module, *arguments: Any) -> None:
        whole.append(sum(p.numel() for p in module.parameters()))
        real(module, *arguments)

    build.partition_parameters = counting
    run = Trainer(config)
    left = [p.numel() for p in run.engine.model.parameters()]
    run.close()
    return "", [max(whole), sum(left)]


def test_zero_3_never_holds_the_whole_model(tiny_config: MakeConfig) -> None:
    zero = {"stage": 3, "stage3_param_persistence_threshold": 0}
    config = tiny_config(num_layers=4, zero_optimization=zero)
    from megatron.model import LanguageModel

    total = LanguageModel(config.with_vocabulary(300).model, device="meta").num_parameters()
    for _, (largest, left) in run_ranks(2, start_at_stage_3, config):
        assert largest < total / 3 and left == 0


def test_fp32_values_in_an_unknown_order_are_refused_before_training(tiny_config: MakeConfig) -> None:
    """The command line refuses this key; the engine itself sees that the slices do not hold the parameters."""
    config = tiny_config(zero_optimization={"stage": 1, "round_robin_gradients": True})
    messages = run_ranks(2, message_of, config)
    assert any("in an order that cannot be checkpointed here" in message for message in messages), messages


def timeouts() -> list[float]:
    layout = processes.join(2, "gloo")
    groups = (layout.tensor.group, layout.data.group)
    dist.barrier()  # the first rank keeps the store: it must not be gone while others still connect
    return [g._get_backend(torch.device("cpu")).options._timeout.total_seconds() for g in groups if g is not None] + [
        dist.get_world_size()
    ]


def test_every_group_of_an_evaluation_waits_long_enough() -> None:
    for first, second, world in run_ranks(4, timeouts):
        assert first == second == processes._TIMEOUT.total_seconds() and world == 4


def limits_of_training(configs: list[RunConfig]) -> list[set[float]]:
    """Seconds that the collectives of each run wait, over the groups of this process; one rank alone never waits."""
    found = []
    for config in configs:
        train(config)
        groups = [group for group in distributed_c10d._world.pg_map if group.size() > 1]
        found.append({g._get_backend(torch.device("cpu")).options._timeout.total_seconds() for g in groups})
    return found


def test_every_group_of_training_has_the_limit_of_the_configuration(
    tiny_config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    """Those that DeepSpeed makes for itself too."""
    layouts: list[dict[str, Any]] = [
        {"zero_optimization": {"stage": 1}}, {"model_parallel_size": 2}, {"pipe_parallel_size": 2}
    ]  # fmt: skip
    configs = [
        tiny_config(**keys, train_iters=1, eval_iters=0, save=str(tmp_path / str(i)), distributed_timeout_minutes=3)
        for i, keys in enumerate(layouts)
    ]
    assert run_ranks(2, limits_of_training, configs) == [[{180.0}] * len(configs)] * 2
