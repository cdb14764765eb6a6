"""Reads and writes the whole tensors behind a DeepSpeed engine: fp32 masters and optimizer state.

DeepSpeed keeps the fp32 values of a parameter in one of three places: in the parameter itself (fp32 without ZeRO), in a
slice of a flat partition (ZeRO 1 and 2), or in a slice of a flat sub-group (ZeRO 3). `_locate` finds this rank's slice;
everything else is the same for all three.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron.checkpoint.state import ParameterSource


@dataclass(frozen=True)
class _Slice:
    """Elements [flat_start, flat_start + size) of `flat` hold [start, start + size) of a parameter; size may be 0."""

    flat: Tensor
    flat_start: int
    start: int
    size: int

    def of(self, tensor: Tensor) -> Tensor:
        """The slice of a tensor shaped like `flat`."""
        return tensor.detach().view(-1).narrow(0, self.flat_start, self.size)


class EngineState:
    """Access to one engine's optimizer. Names are canonical: those of `model.named_parameters()`.

    Args:
        model: the module the engine trains.
        optimizer: `engine.optimizer`, DeepSpeed's wrapper or a torch optimizer.
        zero_stage: ZeRO stage of the engine.
    """

    def __init__(self, model: nn.Module, optimizer: Any, zero_stage: int) -> None:
        self.optimizer, self.zero_stage = optimizer, zero_stage
        self.inner: torch.optim.Optimizer = optimizer if zero_stage == 0 else optimizer.optimizer
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._slices = {name: self._locate(p) for name, p in self.parameters.items()}

    def _locate(self, parameter: Any) -> _Slice:
        if self.zero_stage == 0:
            return _Slice(parameter, 0, 0, parameter.numel())
        if self.zero_stage == 3:
            group, offset, padded = self.optimizer.grad_position[self.optimizer.get_param_id(parameter)]
            start = min(padded * dist.get_rank(), parameter.ds_numel)
            size = min(padded, parameter.ds_numel - start)
            return _Slice(self.optimizer.fp32_partitioned_groups_flat[group], offset, start, size)
        group = next(i for i, g in enumerate(self.optimizer.bit16_groups) if any(p is parameter for p in g))
        flat, mapping = self.optimizer.single_partition_of_fp32_groups[group], parameter._hp_mapping
        if mapping is None:  # wholly in other ranks' partitions
            return _Slice(flat, 0, 0, 0)
        here, there = mapping.hp_fragment_address, mapping.lp_fragment_address
        return _Slice(flat, here.start, there.start, here.numel)

    def _shape(self, name: str) -> torch.Size:
        parameter = self.parameters[name]
        return getattr(parameter, "ds_shape", parameter.shape)

    def _gather(self, name: str, moment: str | None) -> Tensor:
        """The whole fp32 master (moment None) or moment of a parameter; collective when sharded."""
        place, shape = self._slices[name], self._shape(name)
        device = self.parameters[name].device
        whole = torch.zeros(shape.numel(), dtype=torch.float32, device=device)
        source = place.flat if moment is None else self.inner.state[place.flat][moment]
        whole.narrow(0, place.start, place.size).copy_(place.of(source))
        if self.zero_stage > 0 and dist.get_world_size() > 1:
            dist.all_reduce(whole)
        return whole.view(shape)

    def masters(self) -> Iterator[tuple[str, Tensor]]:
        """(name, whole fp32 value) of every trained parameter."""
        for name in self.parameters:
            yield name, self._gather(name, None)

    def optimizer_state(self) -> Iterator[tuple[str, Tensor]]:
        """(`{moment}/{name}`, whole tensor) of every trained parameter; step counts are scalars. Empty at first."""
        for name, place in self._slices.items():
            for moment, value in sorted(
                {**self._group_step(place.flat), **self.inner.state.get(place.flat, {})}.items()
            ):
                if isinstance(value, Tensor) and value.shape == place.flat.shape:
                    yield f"{moment}/{name}", self._gather(name, moment)
                elif isinstance(value, (int, Tensor)):
                    # Every rank counts the steps of its partition of a group alike.
                    yield f"{moment}/{name}", torch.as_tensor(value).clone()

    @torch.no_grad()
    def write_masters(self, source: ParameterSource) -> None:
        """Set the fp32 values; the 16-bit weights are assumed to be their rounded copies already."""
        for name, place in self._slices.items():
            self._write(place, place.flat, source(name))

    @staticmethod
    def _write(place: _Slice, flat: Tensor, whole: Tensor) -> None:
        place.of(flat).copy_(whole.reshape(-1).narrow(0, place.start, place.size))

    @torch.no_grad()
    def write_optimizer_state(self, names: list[str], source: ParameterSource) -> None:
        """Set moments and step counts from whole tensors named as `optimizer_state` names them."""
        for full_name in names:
            moment, _, name = full_name.partition("/")
            place = self._slices[name]
            value, entries = source(full_name), self.inner.state[place.flat]
            if value.dim() == 0:
                self._write_scalar(moment, value, place.flat)
                continue
            if moment not in entries:
                entries[moment] = torch.zeros_like(place.flat, dtype=torch.float32)
            self._write(place, entries[moment], value)

    def _group_step(self, flat: Tensor) -> dict[str, int]:
        """The step count of optimizers that keep one a group (apex) instead of one a parameter."""
        steps = [group["step"] for group in self._groups_of(flat) if group.get("step") is not None]
        return {"step": steps[0]} if steps else {}

    def _groups_of(self, flat: Tensor) -> list[dict[str, Any]]:
        return [group for group in self.inner.param_groups if any(p is flat for p in group["params"])]

    def _write_scalar(self, moment: str, value: Tensor, flat: Tensor) -> None:
        """Set a step count in the form this optimizer wants: torch's AdamW a float tensor, others a number."""
        if moment == "step" and self._group_step(flat):
            for group in self._groups_of(flat):
                group["step"] = int(value)
        elif isinstance(self.inner, torch.optim.AdamW):
            on_device = any(self.inner.defaults.get(option) for option in ("fused", "capturable"))
            self.inner.state[flat][moment] = value.float().to(flat.device if on_device else "cpu")
        else:
            self.inner.state[flat][moment] = int(value)
