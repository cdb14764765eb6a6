"""What all ranks of an engine save, put together."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron.checkpoint.pieces import coverage_fault
from megatron.checkpoint.tensors import Tensors
from megatron.engine.state import EngineState
from megatron.mpu.collectives import gather_objects


class Whole(Tensors):
    """Tensors of kinds model, optimizer and ema, by kind and name."""

    def __init__(self, state: EngineState) -> None:
        self.tensors: dict[str, dict[str, Tensor]] = {"model": {}, "optimizer": {}, "ema": {}}
        mine = [(p.kind, p.name, p.shape, p.offset, p.tensor.detach().cpu().clone()) for p in state.pieces()]
        places: dict[tuple[str, str], list[tuple[tuple[int, ...], tuple[int, ...]]]] = {}
        for of_rank in gather_objects(mine, state.layout.world):
            for kind, name, shape, offset, part in of_rank:
                whole = self.tensors[kind].setdefault(name, torch.empty(shape, dtype=part.dtype))
                box = tuple(slice(start, start + size) for start, size in zip(offset, part.shape, strict=True))
                whole[box] = part
                places.setdefault((kind, name), []).append((offset, tuple(part.shape)))
        for (kind, name), boxes in places.items():
            assert coverage_fault(self.shape(kind, name), boxes) is None, f"{kind} {name}"

    def names(self, kind: str) -> list[str]:
        return list(self.tensors[kind])

    def shape(self, kind: str, name: str) -> tuple[int, ...]:
        return tuple(self.tensors[kind][name].shape)

    def tensor(self, kind: str, name: str) -> Tensor:
        return self.tensors[kind][name]
