"""How a parameter's tensor on one tensor rank relates to the whole, canonical tensor.

A parameter that is sharded over the tensor axis carries a `ShardSpec` as its attribute `shard`; one without is the
same on every tensor rank. Shares follow `Axis.share`: when the size is no multiple of the number of ranks, some
ranks hold one row more. No layer here needs equal shares (only row statistics and full-width outputs are exchanged),
so nothing is padded and no inert row takes memory, is updated or has to be left out of a checkpoint.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from megatron.mpu.layout import Axis


@dataclass(frozen=True)
class ShardSpec:
    """A parameter is rows `Axis.share(shape[dim])` of dimension `dim` of a whole tensor of `shape`."""

    dim: int
    shape: torch.Size

    def ranges(self, axis: Axis) -> tuple[slice, ...]:
        """Where in the whole tensor this rank's part is: a range of each dimension up to `dim`."""
        return (*(slice(None),) * self.dim, slice(*axis.share(self.shape[self.dim])))

    def take(self, whole: Tensor, axis: Axis) -> Tensor:
        """This rank's part of the whole tensor (a view)."""
        return whole[self.ranges(axis)]


def mark_sharded(parameter: Tensor, dim: int, shape: torch.Size | tuple[int, ...], axis: Axis) -> None:
    """Declare that `parameter` is this rank's share of a tensor of `shape`; nothing to declare on an axis of one."""
    if axis.size > 1:
        parameter.shard = ShardSpec(dim, torch.Size(shape))  # type: ignore[attr-defined]
        # DeepSpeed's gradient norm counts a parameter on every tensor rank only when it carries this name.
        parameter.tensor_model_parallel = True  # type: ignore[attr-defined]


def shard_spec(parameter: Tensor) -> ShardSpec | None:
    """The parameter's ShardSpec; None when it is whole."""
    return getattr(parameter, "shard", None)


def whole_shape(parameter: Tensor) -> torch.Size:
    """Shape of the canonical tensor that this parameter is, or is a part of."""
    spec = shard_spec(parameter)
    # ZeRO 3 leaves an empty parameter between uses, but keeps its shape.
    return spec.shape if spec is not None else getattr(parameter, "ds_shape", parameter.shape)


def take_share(whole: Tensor, parameter: Tensor, axis: Axis) -> Tensor:
    """What this rank's `parameter` holds of its whole tensor."""
    spec = shard_spec(parameter)
    return whole if spec is None else spec.take(whole, axis)


def allocate(module: nn.Module, device: torch.device | str) -> None:
    """Give a module built on the meta device uninitialised storage on `device`, in place.

    `Module.to_empty` would lose the marks of `mark_sharded`, and import sympy for the strides of its tensors.
    """
    for part in module.modules():
        for name, parameter in list(part.named_parameters(recurse=False)):
            made = nn.Parameter(_empty(parameter, device), parameter.requires_grad)
            made.__dict__.update(parameter.__dict__)
            setattr(part, name, made)
        for name, buffer in list(part.named_buffers(recurse=False)):
            setattr(part, name, _empty(buffer, device))


def _empty(tensor: Tensor, device: torch.device | str) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
