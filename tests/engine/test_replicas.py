"""Bits that one data rank alone has otherwise: found at the next check, by rank, node and tensor."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from megatron.config import RunConfig
from megatron.engine.base import Engine
from megatron.engine.replicas import fingerprint
from megatron.errors import MachineError
from megatron.failures import node_name, read_failures
from megatron.training.loop import train
from tests.ranks import run_ranks

MakeConfig = Callable[..., RunConfig]
RUN = {"train_iters": 6, "eval_iters": 0, "train_micro_batch_size_per_gpu": 2, "check_replicas_interval": 2}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.float64])
def test_every_bit_counts(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron.engine.replicas._CHUNK", 4)
    tensor = torch.randn(3, 5, generator=torch.Generator().manual_seed(0)).to(dtype).t()
    whole = int(fingerprint(tensor))
    copy = tensor.contiguous().clone()
    raw = copy.view(-1).view(torch.uint8)
    bits = [1] if dtype == torch.bool else [1 << bit for bit in range(8)]
    for place in range(len(raw)):
        for bit in bits:
            raw[place] ^= bit
            assert int(fingerprint(copy)) != whole, (place, bit)
            raw[place] ^= bit
    assert int(fingerprint(copy)) == whole, "however it lies in memory"


def test_positions_count() -> None:
    values = torch.arange(10.0)
    assert len({int(fingerprint(values.roll(shift))) for shift in range(10)}) == 10
    assert int(fingerprint(torch.zeros(0))) == 0


def flipped(engine: Engine, kind: str) -> str:
    """Flip the lowest bit of one number that this rank holds; its name."""
    name, parameter = list(engine.state.parameters.items())[-1]
    average = engine.state.average
    if kind == "average":
        assert average is not None
        tensor, name = average.of(parameter), f"ema/{name}"
    else:
        tensor = parameter if kind == "weight" else engine.state.inner.state[parameter]["exp_avg"]
        name = name if kind == "weight" else f"exp_avg/{name}"
    with torch.no_grad():
        tensor.view(-1).view(torch.uint8)[1] ^= 1
    return name


def trained(config: RunConfig, rank: int, at: int, kind: str) -> tuple[str, str, int, bool]:
    """(how the run ends, the tensor that a rank holds otherwise from iteration `at` on, iterations done, here?)."""
    real, count, name = Engine._finish_step, [0], [""]

    def step(engine: Engine, *arguments: Any) -> Any:
        count[0] += 1
        if count[0] == at and engine.layout.rank == rank:
            name[0] = flipped(engine, kind)
        return real(engine, *arguments)

    with patch.object(Engine, "_finish_step", step):
        try:
            return f"iteration {train(config).iteration}", name[0], count[0], False
        except MachineError as error:
            return str(error), name[0], count[0], error.is_here


AT_THREE = {"extra_save_iters": [3], "ema_decay": 0.9}
# Data ranks, keys, the rank that goes wrong, in which iteration, in what, and the iteration that tells.
CASES: dict[str, tuple[int, dict[str, Any], int, int, str, int]] = {
    "dp2-weight": (2, {}, 1, 3, "weight", 4),
    "dp2-moment": (2, {}, 0, 1, "moment", 2),
    "dp2-zero1-bf16": (2, {"zero_optimization": {"stage": 1}, "precision": "bf16"}, 1, 4, "weight", 4),
    "pp2-dp2": (4, {"pipe_parallel_size": 2}, 3, 1, "weight", 2),
    "dp4": (4, {}, 2, 2, "weight", 2),
    "before a save": (4, {"check_replicas_interval": 100, **AT_THREE}, 2, 2, "average", 3),
    "all is well": (2, {"zero_optimization": {"stage": 2}}, 9, 1, "weight", 0),
}


@pytest.mark.processes
@pytest.mark.parametrize("name", CASES)
def test_the_odd_one_out_is_named(tiny_config: MakeConfig, tmp_path: Path, name: str) -> None:
    world, keys, rank, at, kind, told = CASES[name]
    config = tiny_config(**{**RUN, "save": str(tmp_path), **keys})
    found = run_ranks(world, trained, config, rank, at, kind)
    ends = {end for end, *_ in found}
    if not told:
        assert ends == {"iteration 6"}
        return
    [end] = ends
    place, tensor = f"({node_name()})", found[rank][1]
    assert f"check_replicas_interval: iteration {told}: " in end and tensor and tensor in end
    if world == 4 and "pp" not in name:
        assert f": rank {rank} {place} differs from the other data ranks in " in end
        assert [is_here for *_, is_here in found] == [number == rank for number in range(4)]
        [failure] = read_failures(tmp_path)
        assert (failure.node, failure.rank, failure.iteration) == (node_name(), rank, told) and failure.reason == end
    else:  # of two nobody can tell which one it is
        assert f"rank {rank - rank % 2} {place}, rank {rank - rank % 2 + 1} {place} differ in " in end
        assert "cannot be told" in end and not read_failures(tmp_path)
        assert [is_here for *_, is_here in found] == [number // 2 == rank // 2 for number in range(world)]
    assert {count for _, _, count, _ in found} == {told} and not list(tmp_path.glob("global_step*"))


@pytest.mark.usefixtures("single_process")
def test_one_data_rank_has_nothing_to_compare(
    tiny_config: MakeConfig, package_log: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megatron.engine.replicas.fingerprint", None)
    assert train(tiny_config(**RUN)).iteration == 6
    assert "there is one data rank, and nothing to compare" in package_log.text
