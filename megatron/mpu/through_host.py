"""Collectives of GPU tensors through the host's memory, for several processes on one GPU.

NCCL refuses two processes on a GPU. gloo takes them, but sends and receives CPU tensors only, and knows few collectives
of GPU tensors. This is slow, and meant for trying layouts on one card.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from torch import Tensor

# The argument that the result is written to; None where there is none.
_RESULTS: dict[str, int | None] = {
    "all_gather": 0, "all_gather_into_tensor": 0, "all_gather_single": 0, "all_reduce": 0, "all_to_all_single": 0,
    "broadcast": 0, "gather": 1, "irecv": 0, "isend": None, "recv": 0, "reduce": 0, "reduce_scatter": 0,
    "reduce_scatter_single": 0, "reduce_scatter_tensor": 0, "scatter": 0, "send": None,
}  # fmt: skip
_MARK = "through_host"


class _Done:
    """The handle of an asynchronous call that has ended."""

    def wait(self, timeout: Any = None) -> bool:
        """There is nothing to wait for."""
        return True

    def is_completed(self) -> bool:
        """It is."""
        return True


def take_collectives_through_host(is_staged: Callable[[Tensor], bool] = lambda tensor: tensor.is_cuda) -> None:
    """From now on torch.distributed copies the tensors that `is_staged` picks to the CPU, and the results back."""
    for name, result in _RESULTS.items():
        original = getattr(dist, name, None)
        if original is not None and not hasattr(original, _MARK):
            setattr(dist, name, _staged(original, result, is_staged))


def _staged(
    original: Callable[..., Any], result: int | None, is_staged: Callable[[Tensor], bool]
) -> Callable[..., Any]:
    signature = inspect.signature(original)
    written = None if result is None else list(signature.parameters)[result]

    @functools.wraps(original)
    def call(*args: Any, **kwargs: Any) -> Any:
        copies: list[tuple[Tensor, Tensor]] = []

        def stage(value: Any) -> Any:
            if isinstance(value, (list, tuple)):
                return [stage(item) for item in value]
            if not isinstance(value, Tensor) or not is_staged(value):
                return value
            copies.append((value, value.detach().to("cpu", copy=True)))
            return copies[-1][1]

        bound = signature.bind(*args, **kwargs)
        outputs: list[tuple[Tensor, Tensor]] = []
        for name, value in bound.arguments.items():
            bound.arguments[name] = stage(value)
            if name == written:  # an input must not be written to: the backward pass may need it as it is
                outputs = copies[:]
            copies.clear()
        work = original(*bound.args, **bound.kwargs)
        if hasattr(work, "wait"):
            work.wait()
            work = _Done()
        for place, copy in outputs:
            place.detach().copy_(copy)
        return work

    setattr(call, _MARK, True)
    return call
