"""Recorded steps give the texts of steps that are not.

A tape stands in for CUDA graphs: it notes every operation that a function starts and the tensors in it, and plays them
again into the same memory. As in a graph, no Python runs in a replay, and a number brought to the host is an error.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron.inference.cache import FixedStep, KVCache
from megatron.inference.generate import Completion, generate
from megatron.model import LanguageModel
from megatron.tokenizer import CharLevelTokenizer
from tests.random_models import make_model

PROMPTS = ["The state of the Union", "a", "", "My fellow citizens,", "We", "liberty and"]


class Tape(TorchDispatchMode):
    """The operations that ran in it."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("operation not permitted when stream is capturing")
        result = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, result))
        return result

    def replay(self) -> None:
        """Run them again, on and into the tensors of the first time."""
        for func, args, kwargs, result in self.calls:
            if func.is_view:
                continue
            again = func(*args, **kwargs)
            if not func._schema.is_mutable:
                for old, new in zip(tree_leaves(result), tree_leaves(again), strict=True):
                    if isinstance(old, Tensor):
                        old.copy_(new)


class TapeRecorder:
    """A recorder of tapes; all of them are kept."""

    def __init__(self) -> None:
        self.tapes: list[Tape] = []

    def record(self, function: Callable[[], Tensor]) -> tuple[Callable[[], Any], Tensor]:
        with Tape() as tape:
            result = function()
        result.fill_(torch.nan)  # recording computes nothing
        self.tapes.append(tape)
        return tape.replay, result


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> TapeRecorder:
    """Records the steps of all decoders, anew after every five slots."""
    found = TapeRecorder()
    monkeypatch.setattr("megatron.inference.decoding.recorder_for", lambda device: found)
    monkeypatch.setattr("megatron.inference.cuda_graphs.SPAN", 5)
    return found


def completed(model: LanguageModel, **options: Any) -> list[Completion]:
    """Without times, and with log-probabilities to nine digits."""
    found = generate(model, CharLevelTokenizer(), PROMPTS, logprobs=True, **options)
    rounded = [[round(x, 9) for x in completion.logprobs or []] for completion in found]
    return [replace(c, duration_seconds=0.0, logprobs=probs) for c, probs in zip(found, rounded, strict=True)]


@pytest.mark.parametrize("batch_size", [1, 3, 6])
@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.9, "top_p": 0.9, "repetition_penalty": 1.2, "seed": 7}])
def test_recorded_steps_give_the_same_texts(
    model: LanguageModel, recorder: TapeRecorder, batch_size: int, sampling: dict[str, Any]
) -> None:
    options: dict[str, Any] = {"maximum_tokens": 30, "batch_size": batch_size, **sampling}
    if sampling:
        options["stop"] = [completed(model, fast=False, **options)[0].text[6:8]]
    expected = completed(model, fast=False, **options)
    assert not recorder.tapes and len({completion.length for completion in expected}) > 1
    assert completed(model, **options) == expected
    assert recorder.tapes and all(len(tape.calls) == len(recorder.tapes[0].calls) for tape in recorder.tapes)


def test_a_step_is_recorded_once_for_several_tokens(recorder: TapeRecorder) -> None:
    model = make_model(seq_length=48)
    generate(model, CharLevelTokenizer(), ["abc"], maximum_tokens=32, stop_at_eod=False)
    # The prompt fills 3 slots and 31 tokens more; the last one goes nowhere.
    assert len(recorder.tapes) == 7


def test_decoding_goes_on_where_a_step_cannot_be_recorded(
    capsys: pytest.CaptureFixture[str], recorder: TapeRecorder
) -> None:
    model = make_model()
    expected = completed(model, maximum_tokens=20, fast=False)
    # A hook that looks at a number, as a graph does not allow.
    model.final_norm.register_forward_hook(lambda module, inputs, output: output * float(output[0, 0, 0].isfinite()))
    assert completed(model, maximum_tokens=20, batch_size=2) == expected
    line = "decoding without CUDA graphs: operation not permitted when stream is capturing\n"
    assert capsys.readouterr().out.count(line) == 3, "one a batch"


@torch.no_grad()
def test_slots_that_are_not_filled_do_not_matter(model: LanguageModel) -> None:
    padding = torch.tensor([0, 3])
    ids = torch.randint(1, 600, (2, 12), generator=torch.Generator().manual_seed(0))
    caches = [KVCache(len(model.layers), padding, 24) for _ in range(2)]
    for cache in caches:
        model(ids[:, :8], cache.step(8))
    for layer in caches[1].layers:
        for buffer in layer.buffers:
            buffer[:, :, 8:] = torch.nan
    fixed = FixedStep(caches[1], 17)
    for i in range(8, 12):
        fixed.go_to(i)
        found = model(ids[:, i : i + 1], fixed.begin())
        torch.testing.assert_close(found, model(ids[:, i : i + 1], caches[0].step(1)), rtol=1e-11, atol=1e-11)
