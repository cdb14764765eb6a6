"""The head and its loss in chunks train as with whole logits: every layout, ZeRO stage, head, mask, accumulation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from megatron.config import RunConfig
from megatron.model.embedding import HeadInput
from megatron.ops import linear_cross_entropy as chunked
from megatron.training.loop import Trainer
from tests.ranks import run_ranks
from tests.training.cases import Case
from tests.whole_state import Whole

pytestmark = pytest.mark.processes

MakeConfig = Callable[..., RunConfig]
CASES = [
    *(Case(data=2, zero=stage, model=model) for stage in (0, 1, 2, 3) for model in ("tokenformer", "untied")),
    *(Case(tensor=2, model=model, sequence=flag) for model in ("tokenformer", "untied") for flag in (False, True)),
    Case(tensor=2, zero=3, model="untied"),
    *(Case(pipeline=2, zero=zero, model=model) for zero in (0, 1) for model in ("tokenformer", "untied")),
    Case(tensor=4, keys={"num_attention_heads": 4}),
    Case(tensor=4, model="untied", sequence=True, keys={"num_attention_heads": 4}),
    Case(data=2, pipeline=2, zero=1, model="untied"),
]  # fmt: skip
UPDATES = 2


@contextmanager
def chunks_of(rows: int, config: RunConfig) -> Iterator[list[int]]:
    """Chunks so small that a micro-batch has several; the rows that each had."""
    columns = 320 // config.parallel.model_parallel_size
    sizes: list[int] = []
    statistics = chunked._statistics

    def noted(logits: Tensor, *others: Any) -> Any:
        sizes.append(len(logits))
        return statistics(logits, *others)

    with patch.dict(chunked.CHUNK_BYTES, cpu=rows * columns * 4), patch.object(chunked, "_statistics", noted):
        yield sizes


def trained(config: RunConfig) -> dict[str, Tensor]:
    """Losses, an evaluation, gradient norms, weights and moments after two updates."""
    run = Trainer(config)
    found: dict[str, Tensor] = {}
    try:
        batches = run.data.training()
        for update in range(UPDATES):
            step = run.engine.train_step(next(batches), 1e-3)
            norm = torch.as_tensor(step.grad_norm, dtype=torch.float32).detach().clone()
            found |= {f"loss {update}": step.loss.detach().clone(), f"norm {update}": norm}
            run.state.consumed_samples += run.data.update_samples
        held_out = run.engine.evaluate(islice(next(batches), 2))
        found |= {f"measured {name}": torch.tensor(value) for name, value in held_out.items()}
        whole = Whole(run.engine.state)
        found |= whole.tensors["model"] | whole.tensors["optimizer"]
    finally:
        run.close()
    return found


def largest_differences(pairs: list[tuple[RunConfig, RunConfig]]) -> list[tuple[float, str, list[int]]]:
    answers = []
    for eager, chunks in pairs:
        expected = trained(eager)
        with chunks_of(24, chunks) as sizes:
            found = trained(chunks)
        assert found.keys() == expected.keys()
        distances = {name: (found[name] - expected[name]).abs().max().item() for name in expected}
        worst = max(distances, key=distances.__getitem__)
        answers.append((distances[worst], worst, sizes))
    return answers


@pytest.mark.parametrize("world", sorted({case.world for case in CASES}))
def test_chunks_train_as_whole_logits_do(tiny_config: MakeConfig, world: int) -> None:
    """Within 1e-6 in fp32; micro-batches of 32 or 64 rows go in chunks of 24."""
    cases = [case for case in CASES if case.world == world]
    pairs = []
    for case in cases:
        keys = case.config_keys()
        pairs.append(tuple(tiny_config(**keys, cross_entropy=name) for name in ("eager", "chunked")))
    for case, *answers in zip(cases, *run_ranks(world, largest_differences, pairs), strict=True):
        for distance, worst, sizes in answers:
            assert distance < 1e-6, (case.name, worst)
            assert not sizes or (max(sizes) == 24 and len(sizes) > 2 * UPDATES), (case.name, sizes)
        with_a_head = sum(bool(sizes) for _, _, sizes in answers)
        assert with_a_head == world // case.pipeline, case.name


def test_a_head_that_is_not_trained_gets_no_gradient() -> None:
    """With freeze_old_tokens the head's matrix is given, and the loss still reaches what is below it."""
    hidden, weight = torch.randn(6, 4, requires_grad=True), torch.randn(9, 4)
    with patch.object(chunked, "_add_product", lambda *_: pytest.fail("a gradient that nobody needs")):
        chunked.linear_cross_entropy(hidden, weight, torch.arange(6)).backward()
    assert hidden.grad is not None and weight.grad is None


def test_the_engine_of_a_run_computes_no_logits(tiny_config: MakeConfig, single_process: None) -> None:
    run = Trainer(tiny_config(eval_iters=0))
    try:
        with torch.no_grad():
            output = run.engine.model(torch.zeros(1, 16, dtype=torch.int64))
        assert isinstance(output, HeadInput) and output.hidden.shape == (1, 16, 32)
        assert output.through(torch.nn.functional.linear).shape == (1, 16, 320)
    finally:
        run.close()
