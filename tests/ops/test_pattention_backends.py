"""What each backend of Pattention gets right to the last digits, keeps, and is compiled to."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron.model.pattention import Pattention
from megatron.ops import pattention_fused, pattention_rows, pattention_triton
from megatron.ops.pattention import ParameterTokens, joint_reference, pattention_reference
from megatron.ops.pattention_backends import BACKENDS, select_backend
from tests.interpreter import rounds_to_nearest
from tools.bench.measure import kept_bytes, peak_bytes

ACTIVATIONS = ("l2_norm_gelu", "gelu_l2_norm", "softmax")
OURS = tuple(name for name in BACKENDS if name != "reference")
pytestmark = pytest.mark.usefixtures(rounds_to_nearest.__name__)
__all__ = ["rounds_to_nearest"]


def problem(tokens: int, n: int, count: int, dtype: torch.dtype, width: int = 8) -> tuple[list[Tensor], list[Tensor]]:
    """(x, keys and values of each layer), (gradient of each output), in a dtype."""
    shapes = [(tokens, width)] + [(n, width), (n, 5)] * count
    return [torch.randn(s).to(dtype) for s in shapes], [torch.randn(tokens, 5).to(dtype) for _ in range(count)]


def results(
    backend: str,
    activation: str,
    inputs: Sequence[Tensor],
    grads: Sequence[Tensor],
    recompute: bool = False,
    columns: tuple[int, ...] = (),
) -> list[Tensor]:
    """Outputs and all gradients; `columns` of each layer are in a norm group."""
    x, *tokens = (tensor.detach().clone().requires_grad_() for tensor in inputs)
    pairs = zip(tokens[::2], tokens[1::2], strict=True)
    layers = [ParameterTokens(key, value, tau(len(key), i, columns), columns) for i, (key, value) in enumerate(pairs)]
    outputs = select_backend(backend, "cpu", recompute)[1](x, layers, activation)
    torch.autograd.backward(outputs, list(grads))
    found = [*outputs, x.grad, *(t.grad for t in tokens)]
    return [tensor for tensor in found if tensor is not None]


def tau(n: int, layer: int, columns: tuple[int, ...] = ()) -> Tensor:
    """tau^2 that is another number in every layer and norm group."""
    return torch.tensor([count + 2 + i + layer for i, count in enumerate(columns)] if columns else n + layer)


def sums(activation: str, inputs: Sequence[Tensor], grads: Sequence[Tensor], columns: tuple[int, ...]) -> list[Tensor]:
    """`results` with norm groups by their meaning, in fp64: each a layer of its own, their outputs added."""
    x, *tokens = (tensor.detach().double().requires_grad_() for tensor in inputs)
    outputs = []
    for i, (key, value) in enumerate(zip(tokens[::2], tokens[1::2], strict=True)):
        parts = zip(key.split(columns), value.split(columns), tau(len(key), i, columns), strict=True)
        outputs.append(sum(pattention_reference(x, k, v, count, activation) for k, v, count in parts))
    torch.autograd.backward(outputs, [g.double() for g in grads])
    return [tensor for tensor in (*outputs, x.grad, *(t.grad for t in tokens)) if tensor is not None]


def exact(activation: str, inputs: Sequence[Tensor], grads: Sequence[Tensor]) -> list[Tensor]:
    """The formula in fp64, for inputs that may be rounded."""
    return results("reference", activation, [t.double() for t in inputs], [g.double() for g in grads])


def error(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Sum over the tensors of the squared relative errors."""
    pairs = zip(found, expected, strict=True)
    return sum(((a.double() - b).norm() / b.norm()).item() ** 2 for a, b in pairs if b.norm() > 0)


@pytest.mark.long
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_errors_are_at_most_one_and_a_half_times_the_formulas(activation: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    total = dict.fromkeys(BACKENDS, 0.0)
    for tokens, n, count in [(5, 48, 1), (3, 100, 3), (2, 700, 1), (4, 33, 2)] * 3:
        inputs, grads = problem(tokens, n, count, dtype)
        expected = exact(activation, inputs, grads)
        for backend in BACKENDS:
            total[backend] += error(results(backend, activation, inputs, grads), expected)
    for backend in OURS:
        assert total[backend] ** 0.5 <= 1.5 * total["reference"] ** 0.5, (backend, total)


@pytest.mark.long
@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    tokens=st.integers(1, 6),
    n=st.integers(1, 70),
    count=st.integers(1, 3),
    activation=st.sampled_from(ACTIVATIONS),
    is_zero=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_any_shape_is_computed(tokens: int, n: int, count: int, activation: str, is_zero: bool, seed: int) -> None:
    torch.manual_seed(seed)
    inputs, grads = problem(tokens, n, count, torch.float32)
    if is_zero:
        inputs[0][0] = 0.0  # a row of scores that is all zero
    expected, formula = exact(activation, inputs, grads), results("reference", activation, inputs, grads)
    # Where scores are few and far below 0, fp32 has no digits left of their GELU, in the formula either.
    bars = [1e-4 * (1 + b.norm()) + 3 * (c - b).norm() for b, c in zip(expected, formula, strict=True)]
    for backend in OURS:
        for recompute in (False, True):
            found = results(backend, activation, inputs, grads, recompute)
            for a, b, bar in zip(found, expected, bars, strict=True):
                assert torch.isfinite(a).all() and (a - b).norm() <= bar, (backend, recompute)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("backend", ["fused", "triton"])
def test_long_rows_and_many_tokens_are_taken_in_chunks(
    backend: str, activation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pattention_rows, "_CPU_CHUNK", 100)
    monkeypatch.setattr(pattention_triton, "RESIDENT_COLUMNS", 16)
    monkeypatch.setattr(pattention_triton, "_CHUNK", 16)
    inputs, grads = problem(5, 37, 2, torch.float32)
    found = results(backend, activation, inputs, grads)
    assert error(found, exact(activation, inputs, grads)) ** 0.5 < 1e-5
    found = results(backend, activation, inputs, grads, columns=(20, 17))
    assert error(found, sums(activation, inputs, grads, (20, 17))) ** 0.5 < 1e-5


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_norm_groups_are_a_sum_of_layers(backend: str, activation: str) -> None:
    """Outputs and gradients; a row of scores that is zero in all groups, and one in the second alone."""
    torch.manual_seed(4)
    for tokens, count, columns in ((5, 1, (6, 4)), (4, 3, (16, 1, 20))):
        inputs, grads = problem(tokens, sum(columns), count, torch.float64)
        inputs[0][0] = inputs[0][1, :-1] = inputs[1][columns[0] : columns[0] + columns[1], -1] = 0.0
        bar = 1e-5 if backend == "triton" else 1e-12
        inputs = [t.float() for t in inputs] if backend == "triton" else inputs
        grads = [g.to(inputs[0]) for g in grads]
        expected = sums(activation, inputs, grads, columns)
        for recompute in (False, True) if backend != "reference" else (False,):
            found = results(backend, activation, inputs, grads, recompute, columns)
            assert all(torch.isfinite(t).all() for t in found) and error(found, expected) ** 0.5 < bar


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("backend", ["reference", "fused", "compiled"])
def test_the_backward_pass_of_norm_groups_is_the_derivative(backend: str, activation: str) -> None:
    inputs = [torch.randn(n, 5, dtype=torch.float64, requires_grad=True) for n in (3, 7, 7)]
    function = select_backend(backend, "cpu")[1]

    def layer(x: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return function(x, [ParameterTokens(key, value, torch.tensor([9, 3]), (5, 2))], activation)[0]

    assert torch.autograd.gradcheck(layer, inputs)


def test_rows_are_held_in_pieces_and_not_padded() -> None:
    pieces = {n: pattention_triton.Launch.of(n).sizes for n in (48, 768, 1792, 3072, 7168, 8192)}
    assert [sum(sizes.values()) for sizes in pieces.values()] == [48, 768, 1792, 3072, 7168, 8192]
    assert pattention_triton.Launch.of(8193).sizes == {"SIZE": 2048}


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_three_segments_of_growth_are_one_layer(backend: str, activation: str) -> None:
    torch.manual_seed(3)
    grown = Pattention(8, 8, [6, 5, 7], activation, backend=backend, tau_tokens=6)
    whole = Pattention(8, 8, 18, activation, backend="reference", tau_tokens=6)
    with torch.no_grad():
        whole.key_tokens_0.copy_(grown.key_param_tokens)
        whole.value_tokens_0.copy_(grown.value_param_tokens)
    x = torch.randn(2, 3, 8)
    assert torch.allclose(grown(x), whole(x), atol=1e-5)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_one_norm_group_is_joint_bit_for_bit(backend: str, activation: str) -> None:
    """Also where a segment with a norm of its own has no tokens in this layer."""
    found = []
    for row_norms in (None, ["segment", "segment", "joint"]):
        torch.manual_seed(5)
        layer = Pattention(8, 8, [6, 0, 7], activation, backend=backend, row_norms=row_norms)  # type: ignore[arg-type]
        out = layer(torch.randn(2, 3, 8))
        out.sum().backward()
        found.append([layer.tau_tokens, out, *(p.grad for p in layer.parameters())])
    assert all(a is not None and torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize(("recompute", "scores"), [(False, 1), (True, 0)])
@pytest.mark.parametrize("backend", OURS)
def test_what_is_kept_is_the_scores_or_nothing(backend: str, recompute: bool, scores: int) -> None:
    layer = Pattention(16, 16, 64, backend=backend, recompute_scores=recompute)
    x = torch.randn(32, 16, requires_grad=True)
    found = kept_bytes(lambda: layer(x), (x, *layer.parameters()))
    assert found == pytest.approx(scores * 32 * 64 * 4 + 32 * 4, abs=16)
    layer = Pattention(16, 16, [40, 24], backend=backend, recompute_scores=recompute, row_norms=["joint", "segment"])
    found = kept_bytes(lambda: layer(x), (x, *layer.parameters()))
    joined = 2 * 64 * 16 * 4  # keys and values
    assert found == pytest.approx(scores * 32 * 64 * 4 + 2 * 32 * 4 + joined, abs=32)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_without_gradients_the_bits_are_the_same(backend: str, activation: str) -> None:
    """Of several layers and norm groups, masked tokens among them; what is read is left as it is."""
    (x, *tokens), _ = problem(5, 20, 2, torch.float32)
    function, before = select_backend(backend, "cpu")[1], [tensor.clone() for tensor in (x, *tokens)]
    for columns in ((), (14, 6)):
        for mask in (None, torch.rand(5, 20) < 0.5):
            pairs = zip(tokens[::2], tokens[1::2], strict=True)
            layers = [ParameterTokens(k, v, tau(20, i, columns), columns, mask) for i, (k, v) in enumerate(pairs)]
            expected = function(x.requires_grad_(), layers, activation)
            with torch.no_grad():
                found = function(x, layers, activation)
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert all(torch.equal(a, b) for a, b in zip((x, *tokens), before, strict=True))


def test_on_a_cpu_the_weights_take_the_place_of_the_scores() -> None:
    """Without gradients; in the backward pass there are the scores, their gradients, the weights and a chunk."""
    layer, x = Pattention(8, 8, 512, backend="fused"), torch.randn(1024, 8)
    scores = 1024 * 512 * 4
    with torch.no_grad():
        assert scores <= peak_bytes(lambda: layer(x), x.device) < 1.5 * scores
    assert peak_bytes(lambda: layer(x).sum().backward(), x.device) < 4.5 * scores


@pytest.mark.parametrize("recompute", [False, True])
def test_one_product_over_the_keys_of_all_layers_is_the_same(recompute: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pattention_fused, "_stacks", lambda x, keys: len(keys) > 1)
    inputs, grads = problem(6, 40, 3, torch.float32)
    for backend in OURS:
        found = results(backend, "l2_norm_gelu", inputs, grads, recompute)
        assert error(found, exact("l2_norm_gelu", inputs, grads)) ** 0.5 < 1e-5


def test_recomputed_scores_give_the_same_bits() -> None:
    inputs, grads = problem(6, 40, 3, torch.float32)
    plain, again = (results("fused", "l2_norm_gelu", inputs, grads, recompute) for recompute in (False, True))
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


@pytest.mark.long
def test_compiled_row_functions_are_those_that_run_uncompiled() -> None:
    """In a process of its own: the suite runs with torch.compile turned off."""
    code = (
        "import json, torch; from tests.ops.test_pattention_backends import error, exact, problem, results\n"
        "torch.manual_seed(0); found = {}\n"
        "for activation in ('l2_norm_gelu', 'softmax'):\n"
        "    p = problem(6, 40, 3, torch.float32)\n"
        "    found[activation] = error(results('compiled', activation, *p), exact(activation, *p)) ** 0.5\n"
        "print(json.dumps([found, torch._dynamo.utils.counters['stats']['unique_graphs']]))"
    )
    env = {**os.environ, "TORCHDYNAMO_DISABLE": "0"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    found, graphs = json.loads(done.stdout.splitlines()[-1])
    assert all(value < 1e-5 for value in found.values()) and graphs == 4


@pytest.mark.long
def test_kernels_compile_for_gpus_without_spills() -> None:
    """Ahead of time, in a process of its own: the suite runs the kernels under the interpreter."""
    env = {**os.environ, "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-m", "tools.bench.kernels", "--columns", "768", "3072", "--json", "-"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    kernels = json.loads(done.stdout[done.stdout.index("{") :])["kernels"]
    assert len(kernels) >= 3 * 2 * 2 * 3
    for kernel in kernels:
        assert kernel["spill_bytes"] == 0 and kernel["registers"] <= 128, kernel


def test_the_kernels_are_the_formula(monkeypatch: pytest.MonkeyPatch) -> None:
    """What triton computes does not come from torch's row functions."""
    for name in ("row_forward", "row_backward", "row_weights"):
        monkeypatch.setattr(pattention_rows, name, lambda *_: pytest.fail("torch computed it"))
    inputs, grads = problem(3, 20, 2, torch.float32)
    expected = [t for t in exact("l2_norm_gelu", inputs, grads)]
    assert error(results("triton", "l2_norm_gelu", inputs, grads), expected) ** 0.5 < 1e-5
    assert joint_reference is select_backend("reference", "cpu")[1]
