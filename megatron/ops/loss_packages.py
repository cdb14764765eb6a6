"""Other people's head and loss in chunks: liger-kernel and quack-kernels, where they are installed and asked for.

Both compute on one GPU, with a whole vocabulary. They are asked for the sum over the tokens that count and the mean is
taken here: so the gradients that they keep in 16 bits are as large as probabilities.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from megatron.errors import UserError
from megatron.mpu.layout import ALONE, Axis
from megatron.ops.linear_cross_entropy import linear_cross_entropy

LinearLoss = Callable[[Tensor, Tensor, Tensor, "Tensor | None", Axis, "int | None"], Tensor]
"""`linear_cross_entropy` or what serves in its place."""

_IGNORED = -100
"""Label of a token that does not count, in both packages."""
_QUACK_ROWS = 8
"""Its matrix products want numbers of tokens that this divides."""
# Name of the key's value: (package of pip, module, function).
_PACKAGES = {
    "liger": ("liger-kernel", "liger_kernel.transformers.functional", "liger_fused_linear_cross_entropy"),
    "quack": ("quack-kernels", "quack.linear_cross_entropy", "chunked_linear_cross_entropy"),
}


def select_linear_loss(name: str) -> LinearLoss:
    """The head and loss called `name`: liger, quack, or this project's own for any other.

    Raises: UserError for a package that is not installed or has no such function.
    """
    if name not in _PACKAGES:
        return linear_cross_entropy
    package, module, function = _PACKAGES[name]
    try:
        found = getattr(import_module(module), function)
    except (ImportError, AttributeError) as error:
        missing = isinstance(error, ModuleNotFoundError) and (error.name or "").split(".")[0] == module.split(".")[0]
        why = "is not installed" if missing else f"cannot be used: {' '.join(str(error).split())[:200]}"
        raise UserError(
            f"cross_entropy: {name}: {package} {why}; "
            f"pip install -r requirements/requirements-{name}.txt, or set cross_entropy: auto"
        ) from error
    return _Package(name, found)


class _Package:
    """A package's function in the form of `linear_cross_entropy`."""

    def __init__(self, name: str, function: Callable[..., Any]) -> None:
        self.name, self.function = name, function

    def __call__(
        self,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        loss_mask: Tensor | None = None,
        axis: Axis = ALONE,
        vocabulary_size: int | None = None,
    ) -> Tensor:
        """See `linear_cross_entropy`. Raises: UserError for what the package cannot do."""
        hidden, labels = hidden.flatten(0, -2), labels.flatten()
        assert axis.size == 1, "megatron.config.checks refuses it beside tensor parallelism"
        self._check(hidden)
        if loss_mask is None:
            return self._sum(hidden, weight, labels) / len(labels)
        mask = loss_mask.flatten().bool()
        return self._sum(hidden, weight, torch.where(mask, labels, _IGNORED)) / mask.sum().clamp(min=1)

    def _check(self, hidden: Tensor) -> None:
        reason = None
        if hidden.device.type == "cpu":
            reason = "it needs a GPU"
        elif self.name == "quack" and len(hidden) % _QUACK_ROWS:
            reason = f"{len(hidden)} tokens of a micro-batch are no multiple of {_QUACK_ROWS}"
        if reason is not None:
            raise UserError(f"cross_entropy: {self.name}: {reason}; set cross_entropy: auto")

    def _sum(self, hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        if self.name == "liger":
            # Its gradient of the weight would be added up in 16 bits.
            result = self.function(
                hidden, weight, labels, ignore_index=_IGNORED, reduction="sum", accum_dtype=torch.float32
            )
        else:
            result = self.function(hidden, weight, labels, ignore_index=_IGNORED, reduction="sum")
        loss: Tensor = result
        return loss
