"""What an engine leaves in memory once it is closed: in a run that grows, the next one is built in its place."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import megatron.training.loop as training_loop
from megatron.config import RunConfig
from megatron.training import train
from megatron.training.loop import Trainer
from tests.growth.grown_runs import CONTINUE
from tests.ranks import run_ranks

MakeConfig = Callable[..., RunConfig]

# ZeRO 3 first sees the order of the modules, then plans by it and keeps the plan for each module.
UPDATES = 3
FAST = {"eval_iters": 0, "peak_tflops": 1.0, "ema_decay": 0.9}
# The state of generators, a batch, a loss: far less than a parameter's fp32 values.
SMALL = 2_000


def live_bytes() -> int:
    """Bytes of all tensors that something refers to, each storage once. Leaves garbage in circles uncollected."""
    tensors = [thing for thing in gc.get_objects() if issubclass(type(thing), Tensor)]
    storages = [tensor.untyped_storage() for tensor in tensors]
    # A fake tensor, as torch.compile keeps them, says it is on the CPU; its storage says meta.
    return sum({s.data_ptr(): s.nbytes() for s in storages if s.device.type != "meta"}.values())


@contextmanager
def without_collector() -> Iterator[None]:
    """From a clean start, circles of references stay until someone asks for their collection."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def bytes_of_an_engine(config: RunConfig) -> tuple[int, int]:
    """Bytes that a trained engine takes, and those that are left of it after `close`."""
    with without_collector():
        before = live_bytes()
        run = Trainer(config)
        batches = run.data.training()
        for _ in range(UPDATES):
            run.engine.train_step(next(batches), 1e-3)
        trained = live_bytes()
        run.close()
        return trained - before, live_bytes() - before


def assert_nothing_is_left(engine: int, left: int) -> None:
    assert engine > 100_000, "an engine was measured at all"
    assert left < SMALL, (engine, left)


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_nothing_is_left_of_a_closed_engine(zero: int, tiny_config: MakeConfig, single_process: None) -> None:
    config = tiny_config(**FAST, zero_optimization={"stage": zero}, precision="bf16" if zero else "fp32")
    assert_nothing_is_left(*bytes_of_an_engine(config))


def bytes_of_each(configs: list[RunConfig]) -> list[tuple[int, int]]:
    return [bytes_of_an_engine(config) for config in configs]


@pytest.mark.processes
def test_nothing_is_left_on_two_ranks(tiny_config: MakeConfig) -> None:
    tensor, pipeline = {"model_parallel_size": 2}, {"pipe_parallel_size": 2, "precision": "bf16"}
    layouts: list[tuple[dict[str, Any], int]] = [(tensor, 0), (tensor, 1), (pipeline, 1)]
    configs = [tiny_config(**FAST, **axes, zero_optimization={"stage": zero}) for axes, zero in layouts]
    for answers in run_ranks(2, bytes_of_each, configs):
        for answer in answers:
            assert_nothing_is_left(*answer)


def test_a_run_that_grows_holds_one_engine_at_a_time(
    tiny_config: MakeConfig, tmp_path: Path, single_process: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, build = [], training_loop.build_engine

    def counting_build(*arguments: Any) -> Any:
        found.append(live_bytes())
        return build(*arguments)

    monkeypatch.setattr(training_loop, "build_engine", counting_build)
    folders = {"save": str(tmp_path), "load": str(tmp_path)}
    growth = [{"at_iteration": UPDATES, "ffn_slot_num": 48, **CONTINUE}]
    config = tiny_config(**FAST, **folders, growth=growth, train_iters=UPDATES + 1, zero_optimization={"stage": 3})
    with without_collector():
        train(config)
    first, second = found
    assert second - first < SMALL


def test_an_engine_that_broke_off_in_its_forward_pass(tiny_config: MakeConfig, single_process: None) -> None:
    """Its modules go from DeepSpeed's list, those of another model stay, and the next engine trains."""
    from deepspeed.runtime.zero.parameter_offload import FWD_MODULE_STACK

    def fail(*_: Any) -> None:
        raise RuntimeError("broken off")

    other, config = nn.Linear(1, 1), tiny_config(**FAST, zero_optimization={"stage": 3})
    with without_collector():
        before = live_bytes()
        FWD_MODULE_STACK.append(other)
        run = Trainer(config)
        run.engine.train_step(next(run.data.training()), 1e-3)
        list(run.engine.model.modules())[-1].register_forward_pre_hook(fail)
        try:
            run.engine.train_step(next(run.data.training()), 1e-3)
        except RuntimeError as error:
            assert str(error) == "broken off"
        assert len(FWD_MODULE_STACK) > 2, "the error has left modules there"
        engine = live_bytes() - before
        run.close()
        assert_nothing_is_left(engine, live_bytes() - before)
    assert FWD_MODULE_STACK.pop() is other and not FWD_MODULE_STACK
    again = Trainer(config)
    assert torch.isfinite(again.engine.train_step(next(again.data.training()), 1e-3).loss)
    again.close()


def test_weights_that_zero_has_not_partitioned_stay_with_their_model(
    tiny_config: MakeConfig, single_process: None
) -> None:
    run = Trainer(tiny_config(**FAST, zero_optimization={"stage": 1}))
    model = run.engine.model
    run.engine.train_step(next(run.data.training()), 1e-3)
    weights = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    run.close()
    assert all(torch.equal(parameter, weights[name]) for name, parameter in model.named_parameters())
