"""Reads and writes the whole tensors behind a DeepSpeed engine: fp32 masters, optimizer state and buffers.

DeepSpeed keeps the fp32 values of a parameter in one of three places: in the parameter itself (fp32 without ZeRO), in a
slice of a flat partition (ZeRO 1 and 2), or in a slice of a flat sub-group (ZeRO 3). `_locate` finds this rank's slice;
everything else is the same for all three.

A whole tensor is put together axis by axis: ZeRO slices over the data axis, shares over the tensor axis; then its
pipeline stage shows it to the others. All processes of the grid walk the same tensors in the same order.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron.checkpoint.state import ParameterSource
from megatron.errors import UserError
from megatron.mpu import SINGLE, Layout
from megatron.mpu.collectives import gather_objects
from megatron.mpu.shard import shard_spec, take_share, whole_shape

Entry = TypeVar("Entry")


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
        model: the module the engine trains; its parameters may be one tensor rank's or one pipeline stage's.
        optimizer: `engine.optimizer`, DeepSpeed's wrapper or a torch optimizer.
        zero_stage: ZeRO stage of the engine.
        layout: the grid. With a pipeline, making an EngineState is collective.
        frozen: fp32 values of the parameters that are not trained, by name, this tensor rank's share.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Any,
        zero_stage: int,
        layout: Layout = SINGLE,
        frozen: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.model, self.optimizer, self.zero_stage, self.layout = model, optimizer, zero_stage, layout
        self.inner: torch.optim.Optimizer = optimizer if zero_stage == 0 else optimizer.optimizer
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._slices = {name: self._locate(p) for name, p in self.parameters.items()}
        self._frozen = dict(frozen or {})
        self._of_model = dict(model.named_parameters())
        self._check_slices()
        self._shapes = self._of_all_stages({name: whole_shape(p) for name, p in self._of_model.items()})

    def _locate(self, parameter: Any) -> _Slice:
        if self.zero_stage == 0:
            return _Slice(parameter, 0, 0, parameter.numel())
        if self.zero_stage == 3:
            group, offset, padded = self.optimizer.grad_position[self.optimizer.get_param_id(parameter)]
            start = min(padded * self.layout.data.rank, parameter.ds_numel)
            size = min(padded, parameter.ds_numel - start)
            return _Slice(self.optimizer.fp32_partitioned_groups_flat[group], offset, start, size)
        group = next(i for i, g in enumerate(self.optimizer.bit16_groups) if any(p is parameter for p in g))
        flat, mapping = self.optimizer.single_partition_of_fp32_groups[group], parameter._hp_mapping
        if mapping is None:  # wholly in other ranks' partitions
            return _Slice(flat, 0, 0, 0)
        here, there = mapping.hp_fragment_address, mapping.lp_fragment_address
        return _Slice(flat, here.start, there.start, here.numel)

    def _check_slices(self) -> None:
        """Raise a UserError when a slice does not hold what the parameter holds: a checkpoint would be scrambled."""
        for name, place in self._slices.items():
            parameter = self.parameters[name]
            if parameter.numel() and place.size:  # ZeRO 3 has left an empty one
                count = min(place.size, 64)
                found = place.of(place.flat)[:count].to(parameter.device, parameter.dtype)
                if not torch.equal(found, parameter.detach().view(-1)[place.start :][:count]):
                    raise UserError(
                        f"zero_optimization: with these settings DeepSpeed keeps the fp32 values of {name} in an order "
                        "that cannot be checkpointed here; remove the settings beyond stage"
                    )

    def _of_all_stages(self, mine: Mapping[str, Entry]) -> dict[str, tuple[int, Entry]]:
        """name -> (first pipeline stage that has it, its entry there), in the same order on every stage. Collective."""
        merged: dict[str, tuple[int, Entry]] = {}
        for stage, entries in enumerate(gather_objects(mine, self.layout.pipeline)):
            for name, entry in entries.items():
                merged.setdefault(name, (stage, entry))
        return merged

    def _gather(self, name: str, moment: str | None) -> Tensor:
        """The whole fp32 master (moment None) or moment of a parameter, on every process. Collective."""
        stage, shape = self._shapes[name]
        layout = self.layout
        if stage == layout.pipeline.rank:
            whole = self._join_shares(name, self._join_slices(name, moment))
        else:
            whole = torch.empty(shape, dtype=torch.float32, device=next(iter(self._of_model.values())).device)
        if layout.pipeline.group is not None:
            dist.broadcast(whole, group=layout.pipeline.group, group_src=stage)
        return whole

    def _join_slices(self, name: str, moment: str | None) -> Tensor:
        """This tensor rank's share of a master or moment, from the slices of the data ranks."""
        if moment is None and name in self._frozen:
            return self._frozen[name].to(self._of_model[name].device)
        place, parameter = self._slices[name], self.parameters[name]
        shape = getattr(parameter, "ds_shape", parameter.shape)
        share = torch.zeros(shape.numel(), dtype=torch.float32, device=parameter.device)
        source = place.flat if moment is None else self.inner.state[place.flat][moment]
        share.narrow(0, place.start, place.size).copy_(place.of(source))
        if self.zero_stage > 0 and self.layout.data.group is not None:
            dist.all_reduce(share, group=self.layout.data.group)
        return share.view(shape)

    def _join_shares(self, name: str, share: Tensor) -> Tensor:
        """The whole tensor from the shares of the tensor ranks, which may be of different sizes."""
        spec = shard_spec(self._of_model[name])
        if spec is None or self.layout.tensor.group is None:
            return share
        whole = torch.zeros(spec.shape, dtype=share.dtype, device=share.device)
        spec.take(whole, self.layout.tensor).copy_(share)
        dist.all_reduce(whole, group=self.layout.tensor.group)
        return whole

    def masters(self) -> Iterator[tuple[str, Tensor]]:
        """(name, whole fp32 value) of every parameter of the model. Collective."""
        for name in self._shapes:
            yield name, self._gather(name, None)

    def buffers(self) -> Iterator[tuple[str, Tensor]]:
        """(name, value) of every buffer of the model; buffers are whole and small. Collective."""
        mine = {name: buffer.cpu() for name, buffer in self.model.named_buffers()}
        for name, (_, buffer) in self._of_all_stages(mine).items():
            yield name, buffer

    def optimizer_state(self) -> Iterator[tuple[str, Tensor]]:
        """(`{moment}/{name}`, whole tensor) of every trained parameter; step counts are scalars. Empty at first.

        Collective.
        """
        mine = {name: self._moments(place.flat) for name, place in self._slices.items()}
        for name, (_, moments) in self._of_all_stages(mine).items():
            for moment, scalar in moments.items():
                yield f"{moment}/{name}", self._gather(name, moment) if scalar is None else scalar

    def _moments(self, flat: Tensor) -> dict[str, Tensor | None]:
        """What the optimizer keeps for `flat`: None for a tensor of its shape, the value itself for a count."""
        kept: dict[str, Tensor | None] = {}
        for moment, value in sorted({**self._group_step(flat), **self.inner.state.get(flat, {})}.items()):
            if isinstance(value, Tensor) and value.shape == flat.shape:
                kept[moment] = None
            elif isinstance(value, (int, Tensor)):
                # Every rank counts the steps of its partition of a group alike.
                kept[moment] = torch.as_tensor(value).cpu().clone()
        return kept

    @torch.no_grad()
    def write_masters(self, source: ParameterSource) -> None:
        """Set the fp32 values; the 16-bit weights are assumed to be their rounded copies already."""
        for name, place in self._slices.items():
            self._write(name, place.flat, source(name))

    def _write(self, name: str, flat: Tensor, whole: Tensor) -> None:
        """Copy this process's part of a whole tensor into a tensor shaped like the parameter's `flat`."""
        place = self._slices[name]
        share = take_share(whole, self.parameters[name], self.layout.tensor)
        place.of(flat).copy_(share.reshape(-1).narrow(0, place.start, place.size))

    @torch.no_grad()
    def write_optimizer_state(self, names: list[str], source: ParameterSource) -> None:
        """Set moments and step counts from whole tensors named as `optimizer_state` names them.

        Those of parameters that other pipeline stages hold are left to them.
        """
        for full_name in names:
            moment, _, name = full_name.partition("/")
            if name not in self._slices:
                continue
            place = self._slices[name]
            value, entries = source(full_name), self.inner.state[place.flat]
            if value.dim() == 0:
                self._write_scalar(moment, value, place.flat)
                continue
            if moment not in entries:
                entries[moment] = torch.zeros_like(place.flat, dtype=torch.float32)
            self._write(name, entries[moment], value)

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
