"""A loss over all micro-batches of an update together, one of which at a time keeps activations.

The outputs of all of them are computed without gradients first; then the loss of all, and its gradients by outputs;
then each micro-batch once more, whose backward pass starts from those (GradCache: Gao et al., 2021). So the loss does
not depend on how an update is divided into micro-batches and ranks, at the price of a second forward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from megatron.mpu import Layout
from megatron.tasks import Task
from megatron.tasks.task import Tensors


@contextmanager
def rehearsed(device: torch.device) -> Iterator[None]:
    """Inside there are no gradients, and afterwards the same random numbers are drawn again."""
    with torch.no_grad(), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield


def losses_of_parts(
    task: Task[Any], outputs: Sequence[Tensors], targets: Sequence[Tensors], layout: Layout
) -> list[Callable[..., Tensor]]:
    """For each micro-batch what to make of its outputs: the loss of all, with its part of the gradient.

    The mean of the parts' gradients is that of the loss. Collective over the data ranks.

    Args:
        outputs, targets: of all micro-batches of this process; outputs are tuples of tensors.
    """
    leaves = [tuple(tensor.detach().requires_grad_() for tensor in of_part) for of_part in outputs]
    with torch.enable_grad():
        loss = task.loss(*task.joined(leaves, targets), layout)
    flat = [tensor for of_part in leaves for tensor in of_part]
    gradients = iter(torch.autograd.grad(loss, flat, allow_unused=True))
    by_part = [[next(gradients) for _ in of_part] for of_part in leaves]
    return [partial(_with_gradients, loss.detach(), of_part, len(outputs)) for of_part in by_part]


def _with_gradients(
    value: Tensor, gradients: Sequence[Tensor | None], parts: int, outputs: Tensors, **_: Any
) -> Tensor:
    """`value`, whose backward pass gives each output `parts` times its gradient."""
    products = [(x * gradient).sum() for x, gradient in zip(outputs, gradients, strict=True) if gradient is not None]
    total = parts * torch.stack(products).sum()
    return value + (total - total.detach())
