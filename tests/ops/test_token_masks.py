"""Masks over parameter tokens: what a masked token means, in every backend of Pattention and in its gradients."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron.model.pattention import ACTIVATIONS, Pattention
from megatron.ops.pattention import ParameterTokens
from megatron.ops.pattention_backends import BACKENDS, select_backend
from tests.interpreter import rounds_to_nearest

pytestmark = pytest.mark.usefixtures(rounds_to_nearest.__name__)
__all__ = ["rounds_to_nearest"]

WAYS = (*BACKENDS, "recomputed")
GROUPS: dict[str, tuple[int, ...]] = {"one norm": (), "two norms": (7, 4)}
ROWS, TOKENS, WIDTH = 4, 11, 6


def problem(layers: int = 1, dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], list[Tensor]]:
    """(x, keys and values of each layer), (gradient of each output)."""
    torch.manual_seed(0)
    shapes = [(ROWS, WIDTH)] + [(TOKENS, WIDTH), (TOKENS, 5)] * layers
    return [torch.randn(s, dtype=dtype) for s in shapes], [torch.randn(ROWS, 5, dtype=dtype) for _ in range(layers)]


def results(
    way: str,
    activation: str,
    inputs: Sequence[Tensor],
    grads: Sequence[Tensor],
    masks: Sequence[Tensor | None],
    columns: tuple[int, ...] = (),
    tau: int | list[int] = 9,
) -> list[Tensor]:
    """Outputs, then the gradients of all inputs."""
    name, recompute = ("fused", True) if way == "recomputed" else (way, False)
    x, *tokens = (tensor.clone().requires_grad_() for tensor in inputs)
    pairs = zip(tokens[::2], tokens[1::2], masks, strict=True)
    layers = [ParameterTokens(key, value, torch.tensor(tau), columns, mask) for key, value, mask in pairs]
    outputs = select_backend(name, "cpu", recompute)[1](x, layers, activation)
    torch.autograd.backward(outputs, list(grads))
    return [tensor for tensor in (*outputs, x.grad, *(t.grad for t in tokens)) if tensor is not None]


def tau_of(columns: tuple[int, ...]) -> int | list[int]:
    return [9, 5] if columns else 9


def close(found: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("columns", GROUPS.values(), ids=GROUPS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("way", WAYS)
def test_a_mask_of_ones_changes_no_bit(way: str, activation: str, columns: tuple[int, ...]) -> None:
    inputs, grads = problem(3)
    ones = torch.ones(ROWS, TOKENS, dtype=torch.bool)
    plain = results(way, activation, inputs, grads, [None] * 3, columns, tau_of(columns))
    for masks in ([ones[0], None, ones[0]], [ones, ones[0], None]):
        masked = results(way, activation, inputs, grads, masks, columns, tau_of(columns))
        assert all(torch.equal(a, b) for a, b in zip(plain, masked, strict=True))


@pytest.mark.parametrize("columns", GROUPS.values(), ids=GROUPS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("way", WAYS)
def test_a_masked_token_is_one_that_the_layer_does_not_have(
    way: str, activation: str, columns: tuple[int, ...]
) -> None:
    """But for tau, which stays: outputs and all gradients, those of the masked tokens being zero."""
    inputs, grads = problem()
    x, key, value = inputs
    mask = torch.tensor([True, False, True, True, False, False, True, True, False, True, True])
    found = results(way, activation, inputs, grads, [mask], columns, tau_of(columns))
    left = tuple(int(part.sum()) for part in mask.split(columns)) if columns else ()
    out, grad_x, grad_key, grad_value = found
    absent = results("reference", activation, [x, key[mask], value[mask]], grads, [None], left, tau_of(columns))
    close([out, grad_x, grad_key[mask], grad_value[mask]], absent)
    assert not grad_key[~mask].any() and not grad_value[~mask].any()


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("way", WAYS)
def test_each_row_may_have_tokens_of_its_own(way: str, activation: str) -> None:
    """Three layers in one call, one of them without a mask, one masked alike in all rows."""
    inputs, grads = problem(3)
    masks: list[Tensor | None] = [torch.rand(ROWS, TOKENS) > 0.4, None, torch.rand(TOKENS) > 0.4]
    found = results(way, activation, inputs, grads, masks)
    expected = [torch.zeros_like(t) for t in found]
    for row in range(ROWS):  # by itself, as layers of the tokens that it has
        for i, mask in enumerate(masks):
            own = torch.ones(TOKENS, dtype=torch.bool) if mask is None else mask.expand(ROWS, -1)[row]
            x, (key, value) = inputs[0][row : row + 1], inputs[1 + 2 * i : 3 + 2 * i]
            one = results("reference", activation, [x, key[own], value[own]], [grads[i][row : row + 1]], [None])
            expected[i][row], expected[3][row] = one[0], expected[3][row] + one[1]
            expected[4 + 2 * i][own] += one[2]
            expected[5 + 2 * i][own] += one[3]
    close(found, expected)


def official(x: Tensor, key: Tensor, value: Tensor, mask: Tensor, activation: str) -> Tensor:
    """As the official code has it: the scores are multiplied by the mask, then normed over all columns."""
    scores = x @ key.T
    if activation == "softmax":
        return (scores + torch.where(mask, 0.0, -torch.inf)).softmax(-1) * len(key) @ value
    scores = scores * mask
    if activation == "l2_norm_gelu":
        return F.gelu(scores / scores.norm(dim=-1, keepdim=True) * math.sqrt(len(key))) @ value
    return F.gelu(scores) / F.gelu(scores).norm(dim=-1, keepdim=True) * math.sqrt(len(key)) @ value


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("way", WAYS)
def test_masks_are_those_of_the_official_code(way: str, activation: str) -> None:
    inputs, grads = problem()
    mask = torch.rand(ROWS, TOKENS) > 0.4
    found = results(way, activation, inputs, grads, [mask], tau=TOKENS)
    x, key, value = (tensor.clone().requires_grad_() for tensor in inputs)
    out = official(x, key, value, mask, activation)
    out.backward(grads[0])
    close(found, [t for t in (out, x.grad, key.grad, value.grad) if t is not None])


@pytest.mark.parametrize("columns", GROUPS.values(), ids=GROUPS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("backend", ["reference", "fused", "compiled"])
def test_the_backward_pass_is_the_derivative(backend: str, activation: str, columns: tuple[int, ...]) -> None:
    inputs, _ = problem(dtype=torch.float64)
    mask = torch.rand(ROWS, TOKENS) > 0.4
    mask[0] = False
    mask[1, :7] = False  # all of the first norm group
    function = select_backend(backend, "cpu")[1]

    def layer(x: Tensor, key: Tensor, value: Tensor) -> Tensor:
        tokens = ParameterTokens(key, value, torch.tensor(tau_of(columns)), columns, mask)
        return function(x, [tokens], activation)[0]

    assert torch.autograd.gradcheck(layer, [tensor.requires_grad_() for tensor in inputs])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("way", WAYS)
def test_a_row_without_tokens_gives_zeros(way: str, activation: str, dtype: torch.dtype) -> None:
    inputs, grads = problem(dtype=dtype)
    mask = torch.ones(ROWS, TOKENS, dtype=torch.bool)
    mask[2] = False
    out, grad_x, grad_key, grad_value = results(way, activation, inputs, grads, [mask])
    assert not out[2].any() and not grad_x[2].any() and out[[0, 1, 3]].any(-1).all()
    others = [0, 1, 3]
    x, key, value = inputs
    rest = results(way, activation, [x[others], key, value], [grads[0][others]], [mask[others]])
    for a, b in zip((grad_key, grad_value), rest[2:], strict=True):
        torch.testing.assert_close(a, b, rtol=0.02, atol=0.05 if dtype != torch.float32 else 1e-5)


def test_a_layer_takes_a_mask_over_its_segments() -> None:
    layer = Pattention(WIDTH, 5, [6, 0, 5], row_norms=["joint", "joint", "segment"], dtype=torch.float64)
    x, mask = torch.randn(2, 3, WIDTH, dtype=torch.float64), torch.rand(2, 1, TOKENS) > 0.3
    found = layer(x, mask)
    for i in range(2):
        assert torch.allclose(found[i], layer(x[i], mask[i, 0]), atol=1e-12)
    assert torch.equal(layer(x, torch.ones(TOKENS, dtype=torch.bool)), layer(x))
    assert not torch.allclose(found, layer(x))


def test_frozen_tokens_are_masked_like_others() -> None:
    found = []
    for frozen in (False, True):
        torch.manual_seed(0)
        layer = Pattention(WIDTH, 5, [6, 5])
        for name, parameter in layer.named_parameters():
            parameter.requires_grad_(not (frozen and name.endswith("_0")))
        out = layer(torch.randn(3, WIDTH), torch.rand(3, TOKENS) > 0.4)
        out.sum().backward()
        found.append([out, layer.get_parameter("key_tokens_1").grad, layer.get_parameter("value_tokens_1").grad])
        assert (layer.get_parameter("key_tokens_0").grad is None) == frozen
    assert all(a is not None and b is not None and torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize(
    ("mask", "found"),
    [
        (torch.ones(TOKENS), r"float32 \[11\]"),
        (torch.ones(3, TOKENS + 1, dtype=torch.bool), r"bool \[3, 12\]"),
        (torch.tensor(True), r"bool \[\]"),
    ],
)
def test_what_is_no_mask_is_refused_in_one_line(mask: Tensor, found: str) -> None:
    with pytest.raises(ValueError, match=rf"token_mask: expected bool \[\.\., 11\], got {found}$"):
        Pattention(WIDTH, 5, TOKENS)(torch.randn(3, WIDTH), mask)
