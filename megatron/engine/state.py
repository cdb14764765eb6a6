"""What a process holds of the tensors behind a DeepSpeed engine: fp32 masters, their average, optimizer state, buffers.

DeepSpeed keeps the fp32 values of a parameter in one of three places: in the parameter itself (fp32 without ZeRO), in a
slice of a flat partition (ZeRO 1 and 2), or in a slice of a flat sub-group (ZeRO 3). `_locate` finds this rank's slice;
everything else is the same for all three.

A parameter is a share of a whole tensor (over the tensor axis), and what a process trains of it a range of that share's
memory. Nothing is gathered: `pieces` are where they are, and of what is read a process asks for its part.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from operator import add
from typing import Any

import torch
from torch import Tensor, nn

from megatron.checkpoint.pieces import Piece, flat_boxes
from megatron.checkpoint.state import EMA
from megatron.checkpoint.tensors import Tensors
from megatron.engine.ema import WeightAverage
from megatron.engine.ownership import Ownership
from megatron.errors import UserError
from megatron.mpu import SINGLE, Layout
from megatron.mpu.shard import shard_spec, whole_shape


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

    average: WeightAverage | None = None
    """Of the weights, where one is kept."""

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
        self._ownership = Ownership({name: tuple(whole_shape(p)) for name, p in self._of_model.items()}, layout)

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

    def pieces(self, with_optimizer: bool = True) -> Iterator[Piece]:
        """What this process writes into a checkpoint, where it is: masters, buffers, averages, moments and step counts.

        Those of all processes are every tensor once. Moments are named `{moment}/{parameter}`, step counts, which are
        scalars, alike; there are none before the first update.
        """
        owned = {name: self._owned(name) for name in self._of_model}
        for name, (start, stop) in owned.items():
            yield from self._cut("model", name, name, self._master(name), start, stop)
        for name, buffer in self.model.named_buffers():
            if self._ownership.writes_buffer(name):
                yield Piece("model", name, tuple(buffer.shape), (0,) * buffer.dim(), buffer)
        for name, (start, stop) in owned.items() if self.average is not None else ():
            yield from self._cut(EMA, name, name, self._averaged(name), start, stop)
        for name in self._slices if with_optimizer else ():
            yield from self._pieces_of_state(name, *owned[name])

    def _owned(self, name: str) -> tuple[int, int]:
        """[start, stop) of the memory of this process's share of a parameter: what it writes."""
        parameter, place = self._of_model[name], self._slices.get(name)
        rows, row_size = _rows(_share_shape(parameter))
        is_sharded, is_replicated = shard_spec(parameter) is not None, place is None or self.zero_stage == 0
        first, last = self._ownership.rows(name, rows, row_size, is_sharded, is_replicated)
        start, stop = first * row_size, last * row_size
        return (start, stop) if place is None else (max(start, place.start), min(stop, place.start + place.size))

    def _master(self, name: str) -> _Slice:
        place = self._slices.get(name)
        return place or _Slice(self._frozen[name], 0, 0, self._frozen[name].numel())

    def _averaged(self, name: str) -> _Slice:
        assert self.average is not None, "an average is kept"
        place = self._master(name)
        return replace(place, flat=self.average.of(place.flat))

    def _cut(self, kind: str, full_name: str, name: str, place: _Slice, start: int, stop: int) -> Iterator[Piece]:
        """The pieces that [start, stop) of the memory of a share are, which `place` has."""
        parameter = self._of_model[name]
        shape, origin = tuple(whole_shape(parameter)), self._origin(parameter)
        values = place.of(place.flat)
        for offset, size in flat_boxes(_share_shape(parameter), start, stop):
            part = values.narrow(0, start - place.start, math.prod(size)).view(size)
            start += part.numel()
            yield Piece(kind, full_name, shape, tuple(map(add, offset, origin)), part)

    def _origin(self, parameter: Tensor) -> list[int]:
        """Where in its whole tensor a share begins."""
        spec = shard_spec(parameter)
        origin = [0] * len(whole_shape(parameter))
        if spec is not None:
            origin[spec.dim], _ = self.layout.tensor.share(spec.shape[spec.dim])
        return origin

    def _pieces_of_state(self, name: str, start: int, stop: int) -> Iterator[Piece]:
        if start >= stop:
            return
        place = self._slices[name]
        for moment, scalar in self._moments(place.flat).items():
            if scalar is None:
                there = replace(place, flat=self.inner.state[place.flat][moment])
                yield from self._cut("optimizer", f"{moment}/{name}", name, there, start, stop)
            elif start == 0 and self.layout.tensor.rank == 0:
                yield Piece("optimizer", f"{moment}/{name}", (), (), scalar)

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
    def write_masters(self, tensors: Tensors) -> None:
        """Set the fp32 values; the 16-bit weights are assumed to be their rounded copies already."""
        for name, place in self._slices.items():
            place.of(place.flat).copy_(self._mine(tensors, "model", name, name))

    def keep_average(self, decay: float) -> None:
        """Keep an average of the weights from now on, which starts as these."""
        flats = [place.flat for place in self._slices.values()]
        frozen = {self._of_model[name]: values for name, values in self._frozen.items()}
        rank = self.layout.data.rank
        self.average = WeightAverage(decay, flats, frozen, self.optimizer, self.zero_stage, rank)

    @torch.no_grad()
    def write_average(self, tensors: Tensors) -> None:
        """Set the average that is kept."""
        for name in self._of_model:
            place = self._averaged(name)
            place.of(place.flat).copy_(self._mine(tensors, EMA, name, name))

    def _mine(self, tensors: Tensors, kind: str, full_name: str, name: str) -> Tensor:
        """What this process holds of a tensor shaped like a parameter, [size of its slice]; no more rows are read."""
        place, parameter, spec = self._master(name), self._of_model[name], shard_spec(self._of_model[name])
        rows, row_size = _rows(_share_shape(parameter))
        first = min(place.start // max(row_size, 1), rows)
        last = -(-(place.start + place.size) // max(row_size, 1))
        origin = self._origin(parameter)
        ranges = [slice(origin[0] + first, origin[0] + last)]
        if spec is not None and spec.dim:
            ranges += spec.ranges(self.layout.tensor)[1:]
        return tensors.part(kind, full_name, *ranges).reshape(-1)[place.start - first * row_size :][: place.size]

    @torch.no_grad()
    def write_optimizer_state(self, tensors: Tensors) -> None:
        """Set moments and step counts, named as `pieces` names them.

        Those of parameters that other pipeline stages hold are left to them.
        """
        for full_name in tensors.names("optimizer"):
            moment, _, name = full_name.partition("/")
            if name not in self._slices:
                continue
            place = self._slices[name]
            entries = self.inner.state[place.flat]
            if not tensors.shape("optimizer", full_name):
                self._write_scalar(moment, tensors.tensor("optimizer", full_name), place.flat)
                continue
            if moment not in entries:
                entries[moment] = torch.zeros_like(place.flat, dtype=torch.float32)
            place.of(entries[moment]).copy_(self._mine(tensors, "optimizer", full_name, name))

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


def _share_shape(parameter: Any) -> tuple[int, ...]:
    """Shape of a tensor rank's share; ZeRO 3 leaves an empty parameter between uses, but keeps its shape."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def _rows(shape: tuple[int, ...]) -> tuple[int, int]:
    """How many rows a tensor of at least one dimension has, and how many values each of them."""
    return shape[0], math.prod(shape[1:])
