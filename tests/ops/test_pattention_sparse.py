"""Which weights of a row are kept, and what they are multiplied by."""

from __future__ import annotations

import math

import pytest
import torch

from megatron.model.pattention import ACTIVATIONS
from megatron.mpu.layout import ALONE
from megatron.ops import pattention_sparse
from megatron.ops.pattention import ParameterTokens, theta
from megatron.ops.pattention_backends import BACKENDS, select_backend, weights_function
from megatron.ops.pattention_sparse import Limits, Selection, kept, product_of_kept
from tests.interpreter import rounds_to_nearest

pytestmark = pytest.mark.usefixtures(rounds_to_nearest.__name__)
__all__ = ["rounds_to_nearest"]

ROW = torch.tensor([[3.0, -4.0, 0.0, 1.0, -1.0, 0.5]])


@pytest.mark.parametrize(
    ("selection", "expected"),
    [
        (Selection(count=1), [1]),
        (Selection(count=2), [0, 1]),
        (Selection(count=3), [0, 1, 3, 4]),  # 1 and -1 are as large
        (Selection(count=6), [0, 1, 3, 4, 5]),  # 0 gives nothing
        (Selection(threshold=1.0), [0, 1, 3, 4]),
        (Selection(threshold=5.0), []),
        (Selection(), [0, 1, 3, 4, 5]),
    ],
)
def test_the_largest_weights_are_kept_whatever_their_sign(selection: Selection, expected: list[int]) -> None:
    assert kept([ROW], [selection])[0][0].nonzero().flatten().tolist() == expected


def test_each_row_of_each_layer_has_a_choice_of_its_own() -> None:
    weights = [torch.randn(2, 3, 7), torch.randn(2, 3, 12)]
    found = kept(weights, [Selection(count=2), Selection(threshold=0.7)])
    order = weights[0].abs().argsort(dim=-1, descending=True)
    assert torch.equal(found[0], torch.zeros_like(found[0]).scatter(-1, order[..., :2], True))
    assert torch.equal(found[1], weights[1].abs() >= 0.7)


FORMS = {"summed": Limits(math.inf, 0.0), "gathered": Limits(-1.0, 1.0), "all": Limits(-1.0, -1.0)}


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [(1,), (5,), (2, 3)])
@pytest.mark.parametrize("form", FORMS)
def test_all_forms_of_the_product_are_one(
    form: str, rows: tuple[int, ...], dtype: torch.dtype, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A row may keep nothing, and a batch all; values that no row uses are not read where they need not be."""
    monkeypatch.setattr(pattention_sparse, "LIMITS", FORMS[form])
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    for share in (0.0, 0.3, 1.0):
        weights, values, keep = torch.randn(*rows, 12), torch.randn(12, 4), torch.rand(*rows, 12) < share
        keep.view(-1, 12)[0] &= share == 1.0
        expected = torch.where(keep, weights, 0.0).double() @ values.double()
        if form != "all":
            values[~keep.flatten(0, -2).any(0)] = torch.nan
        found = product_of_kept(weights.to(dtype), keep, values.to(dtype))
        bar = 0.1 if dtype == torch.bfloat16 else 1e-5
        torch.testing.assert_close(found.double(), expected, rtol=bar, atol=bar)
        assert found.dtype == dtype


@pytest.mark.parametrize(
    ("rows", "kept_of_each", "form"),
    [(1, 100, "summed"), (10, 20, "summed"), (10, 21, "gathered"), (10, 50, "gathered"), (10, 51, "all")],
)
def test_the_form_follows_what_a_batch_uses(rows: int, kept_of_each: int, form: str) -> None:
    """Of 100 tokens, the same in all rows. All of them may be multiplied by something faster than a plain product."""
    weights, values, keep = torch.randn(rows, 100), torch.randn(100, 4), torch.zeros(rows, 100, dtype=torch.bool)
    keep[:, :kept_of_each] = True
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pattention_sparse, "_summed", lambda *_: torch.zeros(rows, 1))
        found = product_of_kept(weights, keep, values, lambda w: w[:, :2])
    assert found.shape[-1] == {"summed": 1, "all": 2, "gathered": 4}[form]


@pytest.mark.parametrize("columns", [(), (20, 13)])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_weights_are_those_that_the_backend_multiplies(backend: str, activation: str, columns: tuple[int, ...]) -> None:
    """To the last bit, for layers alike and not, and theta of all tokens."""
    torch.manual_seed(0)
    x, counts = torch.randn(1, 2, 8), torch.tensor([21, 12] if columns else 31)
    layers = [ParameterTokens(torch.randn(33, 8), torch.randn(33, 5), counts, columns) for _ in range(2)]
    layers.append(ParameterTokens(torch.randn(9, 8), torch.randn(9, 5), torch.tensor(9)))
    weights = weights_function(backend)(x, layers, activation, ALONE)
    outputs = select_backend(backend, "cpu")[1](x, layers, activation, ALONE)
    for weight, layer, output in zip(weights, layers, outputs, strict=True):
        assert torch.equal(weight.flatten(0, -2) @ layer.value, output.flatten(0, -2))
    expected = theta(x @ layers[2].key.T, layers[2].tau_tokens, activation)
    torch.testing.assert_close(weights[2], expected, rtol=1e-4, atol=1e-5)
