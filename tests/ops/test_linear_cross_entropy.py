"""The head and its loss in chunks equal the head and its loss at once, in less memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron.ops import linear_cross_entropy as module
from megatron.ops.cross_entropy import cross_entropy
from megatron.ops.linear_cross_entropy import chunk_rows, linear_cross_entropy
from tools.bench.measure import peak_bytes

TOKENS, WIDTH, VOCABULARY = 40, 24, 150
Loss = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]


def eager(hidden: Tensor, weight: Tensor, labels: Tensor, mask: Tensor | None) -> Tensor:
    return cross_entropy(hidden @ weight.T, labels, mask)


@pytest.fixture
def chunks_of(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, torch.dtype], None]:
    """Makes chunks of so many rows, which go through fp32 two at a time."""

    def choose(rows: int, dtype: torch.dtype) -> None:
        monkeypatch.setitem(module.CHUNK_BYTES, "cpu", rows * VOCABULARY * dtype.itemsize)
        monkeypatch.setitem(module.PIECE_BYTES, "cpu", 2 * VOCABULARY * 4)

    return choose


def example(dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(2, TOKENS // 2, WIDTH, generator=generator).to(dtype)
    weight = (torch.randn(VOCABULARY, WIDTH, generator=generator) * 0.3).to(dtype)
    labels = torch.randint(VOCABULARY, (2, TOKENS // 2), generator=generator)
    return hidden, weight, labels, torch.rand(2, TOKENS // 2, generator=generator) > 0.3


def results(loss: Loss, dtype: torch.dtype, mask: Tensor | None, factor: float = 1.0) -> list[Tensor]:
    """Loss, gradient of hidden, gradient of the weight; computed in `dtype`, from inputs that bf16 can hold."""
    hidden, weight, labels, _ = example(torch.bfloat16)
    hidden, weight = (x.to(dtype).requires_grad_() for x in (hidden, weight))
    value = loss(hidden, weight, labels, mask)
    value.backward(torch.tensor(factor, dtype=value.dtype))
    assert hidden.grad is not None and weight.grad is not None
    return [value.detach(), hidden.grad, weight.grad]


@pytest.mark.parametrize("masked", ["no mask", "mask", "nothing counts"])
@pytest.mark.parametrize("rows", [1, 7, 40, 1000])
def test_loss_and_gradients_equal_those_of_whole_logits(rows: int, masked: str, chunks_of: Any) -> None:
    mask = {"no mask": None, "mask": example(torch.float32)[3], "nothing counts": torch.zeros(2, TOKENS // 2)}[masked]
    for dtype, tolerance in ((torch.float64, 1e-14), (torch.float32, 1e-6)):
        chunks_of(rows, dtype)
        found, expected = results(linear_cross_entropy, dtype, mask), results(eager, dtype, mask)
        for left, right in zip(found, expected, strict=True):
            assert left.dtype == right.dtype and left.shape == right.shape
            assert torch.allclose(left, right, rtol=0, atol=tolerance)
        assert (found[1].abs().max() > 1e-3) == (masked != "nothing counts")


@pytest.mark.parametrize("wanted", [(True, True), (True, False), (False, True)])
def test_gradcheck(wanted: tuple[bool, bool], chunks_of: Any) -> None:
    chunks_of(7, torch.float64)
    hidden, weight, labels, mask = example(torch.float64)
    inputs = [x[..., :3].clone().requires_grad_(flag) for x, flag in zip((hidden, weight[:20]), wanted, strict=True)]
    assert torch.autograd.gradcheck(lambda h, w: linear_cross_entropy(h, w, labels % 20, mask), inputs)


@pytest.mark.parametrize("rows", [7, 1000])
@pytest.mark.parametrize(
    ("dtype", "factor"), [(torch.bfloat16, 1.0), (torch.bfloat16, 0.5), (torch.float16, 2.0**16 / 8)], ids=str
)
def test_16_bit_gradients_are_as_exact_as_those_of_whole_logits(
    dtype: torch.dtype, factor: float, rows: int, chunks_of: Any
) -> None:
    """Factors as the engine has them: an update's share of a micro-batch, and a loss scale."""
    chunks_of(rows, dtype)
    mask = example(dtype)[3]
    exact = results(eager, torch.float64, mask, factor)

    def distances(loss: Loss) -> list[float]:
        pairs = zip(results(loss, dtype, mask, factor), exact, strict=True)
        return [((found - right).norm() / right.norm()).item() for found, right in pairs]

    for found, at_once in zip(distances(linear_cross_entropy), distances(eager), strict=True):
        assert found <= 1.05 * at_once


def test_a_factor_that_16_bits_cannot_hold_is_not_rounded(chunks_of: Any) -> None:
    """A third, as with three micro-batches an update: rounded to bf16 it would be off by 0.1 % in every entry."""
    chunks_of(7, torch.bfloat16)
    whole, third = (results(linear_cross_entropy, torch.bfloat16, None, factor)[1:] for factor in (1.0, 1 / 3))
    for left, right in zip(third, whole, strict=True):
        ratio = (left.double() * right.double()).sum() / right.double().square().sum()
        assert ratio.item() * 3 == pytest.approx(1.0, abs=5e-4)


def test_gradients_that_fp16_could_not_hold_before_the_loss_scale_arrive(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A token in 131072 has gradients of logits of 1e-5 times a probability, of which fp16 would make zero."""
    tokens, columns = 4096, 1024
    monkeypatch.setitem(module.CHUNK_BYTES, "cpu", 512 * columns * 2)
    hidden, weight = torch.zeros(tokens, 8, dtype=torch.float16), torch.zeros(columns, 8, dtype=torch.float16)
    hidden[:, 0] = 1.0
    weight.requires_grad_()
    (linear_cross_entropy(hidden, weight, torch.zeros(tokens, dtype=torch.int64)) * 2.0**14).backward()
    assert weight.grad is not None
    assert weight.grad[1:, 0].float() == pytest.approx(2.0**14 / columns, rel=2e-3)


def test_nothing_but_losses_is_computed_without_gradients(chunks_of: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    chunks_of(7, torch.float32)
    hidden, weight, labels, mask = example(torch.float32)
    weight.requires_grad_()
    expected = linear_cross_entropy(hidden, weight, labels, mask)
    for name in ("_add_product", "_logits_to_gradient"):
        monkeypatch.setattr(module, name, lambda *_: pytest.fail("a gradient was computed"))
    with torch.no_grad():
        found = linear_cross_entropy(hidden, weight, labels, mask)
    assert torch.equal(found, expected.detach()) and not found.requires_grad
    assert torch.equal(linear_cross_entropy(hidden, weight.detach(), labels, mask), found)


def test_backward_twice_gives_the_same_gradients() -> None:
    hidden, weight, labels, _ = example(torch.float32)
    hidden.requires_grad_()
    loss = linear_cross_entropy(hidden, weight, labels)
    first, second = (torch.autograd.grad(loss, hidden, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


# ---- memory ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_memory_beyond_a_chunk_does_not_grow_with_the_vocabulary(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Extrapolated to 64 x 2048 tokens, a vocabulary of 50304 and chunks as on a GPU, it stays below 2 GiB."""
    width, vocabulary, e = 16, 5000, dtype.itemsize
    monkeypatch.setitem(module.CHUNK_BYTES, "cpu", 128 * vocabulary * e)
    monkeypatch.setitem(module.PIECE_BYTES, "cpu", 16 * vocabulary * 4)

    def peak(tokens: int, loss: Loss) -> int:
        hidden, weight = (torch.randn(n, width, dtype=dtype, requires_grad=True) for n in (tokens, vocabulary))
        labels = torch.randint(vocabulary, (tokens,))
        return peak_bytes(lambda: loss(hidden, weight, labels, None).backward(), hidden.device)

    small, large = (peak(tokens, linear_cross_entropy) for tokens in (512, 2048))
    logits = 2048 * vocabulary * e
    assert peak(2048, eager) > 2 * logits, "the measure sees logits and their gradient"
    assert small < 1.1 * (128 * e + 16 * 8) * vocabulary + 5 * vocabulary * width * 4
    a_token = (large - small) / (2048 - 512)
    assert a_token < 2 * width * e + 64, "two gradients of a row of hidden, and a few numbers"

    tokens, width, vocabulary = 64 * 2048, 768, 50304
    rows_of_hidden, gradient_of_weight = tokens * (2 * width * e + 64), (4 + e) * vocabulary * width
    chunk = module.CHUNK_BYTES["cuda"] + 2 * module.PIECE_BYTES["cuda"]
    assert rows_of_hidden + gradient_of_weight + chunk < 2 * 2**30


def test_chunks_have_the_rows_that_fit_their_bytes() -> None:
    assert chunk_rows(50304, 2, "cuda") == 5248 and chunk_rows(50304, 4, "cuda") == 2560
    assert chunk_rows(25152, 2, "cuda") == 10624, "two tensor ranks"
    assert chunk_rows(2**40, 2, "cuda") == 1
