"""Filling a module, or this tensor rank's share of it, from whole tensors."""

from __future__ import annotations

import torch
from torch import nn

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
        spec, name = shard_spec(target), prefix + name
        if spec is None:
            target.copy_(tensors.tensor("model", name))
        else:
            target.copy_(tensors.part("model", name, *spec.ranges(layout.tensor)))
