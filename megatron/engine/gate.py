"""An update that may be withheld: decided on all ranks from the same numbers, when its gradients are there.

Every engine comes to the step of a torch optimizer at last, whatever the ZeRO stage: DeepSpeed calls it for each group
or partition, once the gradient norm is known. That step is where the gate stands. What DeepSpeed does around it, such
as copying fp32 values to 16-bit weights, then finds the values that were there before.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megatron.engine.watch import StepWatch

Numbers = tuple[Tensor | float, Tensor | float | None]
"""This rank's loss and gradient norm of an update."""


class UpdateGate:
    """Stands before the step of an optimizer.

    Args:
        optimizer: whose step it takes the place of.
        watch: tells the mean over all ranks.
        numbers: asked when gradients are there and weights are as they were.
        is_bad: told the mean loss and norm: is the update to be withheld? The same on all ranks.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        watch: StepWatch,
        numbers: Callable[[], Numbers],
        is_bad: Callable[[float, float | None], bool],
    ) -> None:
        self._watch, self._numbers, self._is_bad = watch, numbers, is_bad
        self._withheld: bool | None = None
        self._step = optimizer.step
        optimizer.step = self._gated  # type: ignore[method-assign]

    def _gated(self, *arguments: Any, **options: Any) -> Any:
        if self._withheld is None:
            self._decide(*self._numbers())
        return None if self._withheld else self._step(*arguments, **options)

    def _decide(self, loss: Tensor | float, norm: Tensor | float | None) -> None:
        self._withheld = self._is_bad(*self._watch.mean_now(loss, norm))

    def close_step(self, loss: Tensor | float, norm: Tensor | float | None) -> bool:
        """Was the update that has just ended withheld? Where DeepSpeed skipped it by itself, it is judged only now."""
        if self._withheld is None:
            self._decide(loss, norm)
        withheld, self._withheld = self._withheld, None
        return bool(withheld)
