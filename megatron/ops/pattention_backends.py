"""The implementations of Pattention by name, and the choice between them.

| name      | what it is                                                                     | keeps        |
|-----------|--------------------------------------------------------------------------------|--------------|
| reference | the formula in autograd                                                        | 3 u          |
| fused     | a backward pass of its own (megatron.ops.pattention_fused), torch's operations | 1 u, or none |
| compiled  | the same, its row functions fused by torch.compile                             | 1 u, or none |
| triton    | the same, its row functions hand-written (megatron.ops.pattention_triton)      | 1 u, or none |

u is one score matrix.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Callable, Sequence
from functools import cache, partial

import torch
from torch import Tensor

from megatron.errors import ConfigError
from megatron.mpu.layout import ALONE, Axis
from megatron.ops.pattention import (
    ParameterTokens,
    PattentionFunction,
    joint_reference,
    joint_weights_reference,
)
from megatron.ops.pattention_fused import Method, joint_rowwise, joint_weights
from megatron.ops.pattention_rows import CompiledRows, Rows, TorchRows

BACKENDS = ("reference", "fused", "compiled", "triton")
_OLDEST_GPU = (8, 0)
"""Compute capability from which Triton has bf16."""


def select_backend(name: str, device_type: str, recompute_scores: bool = False) -> tuple[str, PattentionFunction]:
    """The implementation called `name` and its resolved name.

    `auto` takes triton on a GPU that can run it, else fused: it never compiles on a CPU.

    Args:
        recompute_scores: keep the input only, and multiply by the keys again in the backward pass; not of `reference`.

    Raises: ValueError for an unknown name, ConfigError for one that cannot run here.
    """
    resolved = _auto(device_type) if name == "auto" else name
    if resolved not in BACKENDS:
        raise ValueError(f"pattention_backend: unknown '{name}'; choose auto, {', '.join(BACKENDS)}")
    if fault := _fault(resolved, device_type):
        raise ConfigError("pattention_backend", f"{resolved} needs {fault}", "set pattention_backend: auto")
    if resolved == "reference":
        if recompute_scores:
            advice = "set pattention_backend: auto"
            raise ConfigError("recompute_scores", "the reference backend keeps what autograd keeps", advice)
        return resolved, joint_reference
    return resolved, partial(_joint, resolved, recompute_scores)


def weights_function(name: str) -> PattentionFunction:
    """What gives the weights [.., n] of the layers where the backend `name`, resolved, gives outputs; no gradients."""
    return joint_weights_reference if name == "reference" else partial(_joint_weights, name)


def planned_backend(name: str) -> str:
    """What `name` resolves to on a GPU of today."""
    return "triton" if name == "auto" else name


def _auto(device_type: str) -> str:
    if device_type == "cuda" and _fault("triton", device_type) is None:
        return "triton"
    return "fused"


@cache
def _fault(name: str, device_type: str) -> str | None:
    """What a backend lacks on this machine."""
    if name == "triton":
        if importlib.util.find_spec("triton") is None:
            return "the package triton, which comes with torch's CUDA build"
        if os.environ.get("TRITON_INTERPRET") == "1":
            return None
        if device_type != "cuda" or torch.cuda.get_device_capability() < _OLDEST_GPU:
            return f"an NVIDIA GPU of compute capability {_OLDEST_GPU[0]}.{_OLDEST_GPU[1]} or newer"
    if name == "compiled":
        if device_type == "cuda" and importlib.util.find_spec("triton") is None:
            return "the package triton, which comes with torch's CUDA build"
        if device_type == "cpu" and not any(map(shutil.which, (os.environ.get("CXX", "g++"), "g++", "clang++"))):
            return "a C++ compiler"
    return None


def _joint(
    name: str,
    recompute_scores: bool,
    x: Tensor,
    layers: Sequence[ParameterTokens],
    activation: str,
    axis: Axis = ALONE,
) -> list[Tensor]:
    return joint_rowwise(x, layers, Method(_rows_for(name, x)(activation), axis, recompute_scores))


def _joint_weights(
    name: str, x: Tensor, layers: Sequence[ParameterTokens], activation: str, axis: Axis = ALONE
) -> list[Tensor]:
    return joint_weights(x, layers, Method(_rows_for(name, x)(activation), axis))


def _rows_for(name: str, x: Tensor) -> Callable[[str], Rows]:
    return _rows("fused" if name == "triton" and x.dtype == torch.float64 else name)


@cache
def _rows(name: str) -> Callable[[str], Rows]:
    if name == "triton":
        from megatron.ops.pattention_triton import TritonRows

        return TritonRows
    return CompiledRows if name == "compiled" else TorchRows
