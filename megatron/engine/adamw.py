"""torch's AdamW without torch's compiler.

torch.optim imports torch._dynamo when it is first used, to tell the compiler to stay away: a second of every start, for
runs that compile no optimizer. Here the same functions are called without what torch puts around them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch

_step = inspect.unwrap(torch.optim.Adam.step)
_add_param_group = inspect.unwrap(torch.optim.Optimizer.add_param_group)
_zero_grad = inspect.unwrap(torch.optim.Optimizer.zero_grad)


class AdamW(torch.optim.AdamW):
    """torch.optim.AdamW; its arguments, its state, its arithmetic."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update."""
        return _step(self, closure)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's."""
        _add_param_group(self, param_group)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As torch's."""
        _zero_grad(self, set_to_none)
