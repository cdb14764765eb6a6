"""Pattention against the outputs and gradients of the official code, and where that gives NaN."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from megatron.errors import ConfigError
from megatron.ops.pattention import ParameterTokens, pattention_reference
from megatron.ops.pattention_backends import BACKENDS, _fault, select_backend

GOLDEN = load_file(Path(__file__).parents[1] / "fixtures" / "golden" / "pattention.safetensors")
CASES = sorted({name.split(".")[0] for name in GOLDEN})
ACTIVATIONS = ("l2_norm_gelu", "gelu_l2_norm", "softmax")


def pattention(backend: str, x: Tensor, key: Tensor, value: Tensor, tau_tokens: Tensor, activation: str) -> Tensor:
    """One layer, by a backend, or by one that recomputes its scores."""
    name, recomputes = ("fused", True) if backend == "recomputed" else (backend, False)
    return select_backend(name, "cpu", recomputes)[1](x, [ParameterTokens(key, value, tau_tokens)], activation)[0]


def distance(a: Tensor, b: Tensor) -> float:
    return ((a - b).abs() / (1 + b.abs())).max().item()


@pytest.mark.parametrize("backend", [*BACKENDS, "recomputed"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("dtype", "tag", "bar"), [(torch.float32, "f32", 2e-5), (torch.float64, "f64", 1e-12)])
@pytest.mark.parametrize("case", CASES)
def test_output_and_every_gradient_equal_the_official_ones(
    case: str, dtype: torch.dtype, tag: str, bar: float, activation: str, backend: str
) -> None:
    names = ("x", "key_param_tokens", "value_param_tokens")
    x, key, value = (GOLDEN[f"{case}.{name}"].to(dtype, copy=True).requires_grad_() for name in names)
    out = pattention(backend, x, key, value, torch.tensor(len(key)), activation)
    out.backward(GOLDEN[f"{case}.grad_out"].to(dtype))
    found = {"out": out, "grad_x": x.grad, "grad_key": key.grad, "grad_value": value.grad}
    for name, tensor in found.items():
        assert tensor is not None
        assert distance(tensor, GOLDEN[f"{case}.{activation}.{tag}.{name}"]) < bar, name


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("activation", ["l2_norm_gelu", "gelu_l2_norm"])
@pytest.mark.parametrize("zero", ["input row", "keys"])
def test_a_zero_score_row_gives_zeros_and_zero_gradients(zero: str, activation: str, backend: str) -> None:
    x, key, value = torch.randn(3, 4), torch.randn(6, 4), torch.randn(6, 5)
    (x[1] if zero == "input row" else key).zero_()
    x, key, value = (tensor.requires_grad_() for tensor in (x, key, value))
    out = pattention(backend, x, key, value, torch.tensor(6), activation)
    out.sum().backward()
    rows = [1] if zero == "input row" else [0, 1, 2]
    assert (out[rows] == 0).all()
    assert x.grad is not None and (x.grad[rows] == 0).all()
    assert all(torch.isfinite(t.grad).all() for t in (x, key, value) if t.grad is not None)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gelu_that_underflows_in_every_column_gives_zeros(backend: str) -> None:
    x, key = torch.ones(1, 1, requires_grad=True), torch.full((4, 1), -30.0)
    out = pattention(backend, x, key, torch.randn(4, 3), torch.tensor(4), "gelu_l2_norm")
    out.sum().backward()
    assert (out == 0).all() and x.grad is not None and torch.isfinite(x.grad).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_softmax_of_large_scores_does_not_overflow(dtype: torch.dtype) -> None:
    out = pattention_reference(
        torch.full((1, 4), 10.0, dtype=dtype), torch.full((3, 4), 10.0, dtype=dtype),
        torch.ones(3, 2, dtype=dtype), torch.tensor(3), "softmax",
    )  # fmt: skip
    assert torch.allclose(out, torch.full_like(out, 3.0))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_parameter_tokens_are_unordered(activation: str) -> None:
    x, key, value = (torch.randn(n, 8, dtype=torch.float64) for n in (5, 12, 12))
    order, tau = torch.randperm(12), torch.tensor(12)
    out = pattention_reference(x, key, value, tau, activation)
    shuffled = pattention_reference(x, key[order], value[order], tau, activation)
    assert torch.allclose(out, shuffled, rtol=0, atol=1e-12)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("backend", ["fused", "compiled"])
def test_the_backward_pass_is_the_derivative(backend: str, activation: str) -> None:
    inputs = [torch.randn(n, 5, dtype=torch.float64, requires_grad=True) for n in (4, 7, 7)]
    assert torch.autograd.gradcheck(lambda *t: pattention(backend, *t, torch.tensor(9), activation), inputs)


@pytest.mark.parametrize("backend", BACKENDS)
def test_bf16_follows_fp32(backend: str) -> None:
    x, key, value = torch.randn(9, 32), torch.randn(64, 32), torch.randn(64, 32)
    exact = pattention_reference(x, key, value, torch.tensor(64), "l2_norm_gelu")
    rounded = pattention(backend, *(t.bfloat16() for t in (x, key, value)), torch.tensor(64), "l2_norm_gelu")
    assert rounded.dtype == torch.bfloat16
    assert (rounded.float() - exact).norm() / exact.norm() < 0.02


def test_backends_are_picked_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    assert select_backend("auto", "cpu")[0] == "fused"
    assert select_backend("auto", "cuda")[0] == "triton"
    with pytest.raises(ValueError, match="pattention_backend: unknown 'magic'"):
        select_backend("magic", "cpu")
    with pytest.raises(ConfigError, match="recompute_scores: the reference backend keeps what autograd keeps"):
        select_backend("reference", "cpu", recompute_scores=True)


def test_a_backend_that_cannot_run_here_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    _fault.cache_clear()
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(ConfigError, match=r"pattention_backend: triton needs an NVIDIA GPU of .* 8\.0 or newer; set"):
        select_backend("triton", "cpu")
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(ConfigError, match="pattention_backend: compiled needs a C.. compiler; set"):
        select_backend("compiled", "cpu")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    _fault.cache_clear()
    with pytest.raises(ConfigError, match="triton needs the package triton, which comes with torch's CUDA build"):
        select_backend("triton", "cuda")
    assert select_backend("auto", "cuda")[0] == "fused"
    _fault.cache_clear()
