"""Filling a module, or this tensor rank's share of it, from whole tensors."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from megatron.checkpoint.tensors import Tensors
from megatron.mpu.layout import SINGLE, Layout
from megatron.mpu.shard import shard_spec


@torch.no_grad()
def fill(module: nn.Module, tensors: Tensors, layout: Layout = SINGLE, prefix: str = "") -> None:
    """Copy into every parameter and buffer what its name means among `tensors`; a tensor rank reads its share only.

    Args:
        prefix: where in the model the module is, for example `layers.3.`.
    """
    for name, target in (*module.named_parameters(), *module.named_buffers()):
        target.copy_(share_of(tensors, prefix + name, target, layout))


def share_of(tensors: Tensors, name: str, target: Tensor, layout: Layout) -> Tensor:
    """What a parameter or buffer is to hold of the whole tensor `name`."""
    spec = shard_spec(target)
    return tensors.tensor("model", name) if spec is None else tensors.part("model", name, *spec.ranges(layout.tensor))
