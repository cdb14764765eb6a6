"""Do the data ranks still hold the same bits? What memory or a processor got wrong in silence shows here.

With ZeRO 0 every data rank has the same weights, their average, moments and buffers, with ZeRO 1 and 2 the same weights
and buffers; the rest is there once. Each rank makes a number of every tensor's bits, and the ranks compare these.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from megatron.engine.base import Engine
from megatron.errors import MachineError
from megatron.failures import Failure, node_name, record_failure
from megatron.log import get_logger
from megatron.mpu import Layout
from megatron.mpu.collectives import gather, gather_objects
from megatron.mpu.layout import Axis

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_CHUNK = 1 << 22
_NAMED = 3
"""Tensors and ranks that a message names; of more it says how many."""


def fingerprint(tensor: Tensor) -> Tensor:
    """A number of a tensor's bits, int64 on its device: the sum of its elements' bits, each times an odd number.

    Modulo 2^64 an odd number takes no bit away, so that no single element can change unseen; that several do so is as
    likely as a random number being 0. Positions count: two elements that change places are seen too.
    """
    flat = tensor.detach().contiguous().view(-1)
    bits = flat.view(_INTEGERS[flat.element_size()])
    odd = 1 + 2 * torch.arange(min(_CHUNK, flat.numel()), device=flat.device)
    total = torch.zeros((), dtype=torch.int64, device=flat.device)
    for start in range(0, bits.numel(), _CHUNK):
        part = bits[start : start + _CHUNK].to(torch.int64)
        total += 2 * start * part.sum()
        total += (part * odd[: part.numel()]).sum()  # not in place: of int64 it is the tensor itself
    return total


class ReplicaCheck:
    """Compares what the data ranks of a run hold alike.

    Args:
        engine: of the run.
        interval: iterations between checks; None: no checks.
        folder: of the run's checkpoints, where failures are recorded; None: nowhere.
    """

    def __init__(self, engine: Engine, interval: int | None, folder: str | None = None) -> None:
        self._engine, self._interval, self._folder, self._checked = engine, interval, folder, -1
        if interval and engine.layout.data.size == 1:
            get_logger().info("check_replicas_interval: there is one data rank, and nothing to compare")
            self._interval = None

    def check_if_due(self, iteration: int, saves: bool) -> None:
        """Compare after every `interval` iterations, and before what the ranks hold is saved. Collective.

        Raises: MachineError, on all ranks, which names ranks, nodes and tensors that differ.
        """
        if not self._interval or self._checked == iteration or not (saves or iteration % self._interval == 0):
            return
        self._checked = iteration
        held = dict(self._held())
        with torch.no_grad():
            mine = torch.stack([fingerprint(tensor) for tensor in held.values()])
            everyone = gather(mine, 0, self._engine.layout.data).view(-1, len(held))
        differing = (everyone != everyone[0]).any(dim=0).tolist()
        if self._engine.any_rank(any(differing)):
            found = {name: everyone[:, place].tolist() for place, name in enumerate(held) if differing[place]}
            self._fail(found, iteration)

    def _fail(self, found: Mapping[str, Sequence[int]], iteration: int) -> NoReturn:
        layout, odd = self._engine.layout, _odd_ranks(found)
        message, is_here = _told_to_all(found, odd, iteration, layout), layout.data.rank in odd
        if is_here and len(odd) < layout.data.size and self._folder is not None:
            record_failure(self._folder, Failure(node_name(), layout.rank, message, iteration))
        raise MachineError(message, is_here)

    def _held(self) -> Iterator[tuple[str, Tensor]]:
        """What every data rank has, by name, in the same order."""
        state = self._engine.state
        yield from state.model.named_parameters()
        yield from state.model.named_buffers()
        if state.zero_stage == 0:
            for name, parameter in state.parameters.items():
                entries: Mapping[str, Any] = state.inner.state.get(parameter, {})
                for moment, value in sorted(entries.items()):
                    if isinstance(value, Tensor) and value.shape == parameter.shape and value.dim():
                        yield f"{moment}/{name}", value
                if state.average is not None:
                    yield f"ema/{name}", state.average.of(parameter)


def _odd_ranks(found: Mapping[str, Sequence[int]]) -> list[int]:
    """The data ranks whose number of a tensor is not that of the majority; all of them where there is none.

    Args:
        found: of each tensor that differs, the number of each rank.
    """
    odd = set[int]()
    for numbers in found.values():
        value, count = Counter(numbers).most_common(1)[0]
        has_majority = 2 * count > len(numbers)
        odd |= {rank for rank, number in enumerate(numbers) if number != value or not has_majority}
    return sorted(odd)


def _told_to_all(found: Mapping[str, Sequence[int]], odd: Sequence[int], iteration: int, layout: Layout) -> str:
    """What differs where, the same words on every rank. Collective over the world."""
    places = gather_objects(f"rank {layout.rank} ({node_name()})", layout.data)
    world = Axis(layout.world_size, layout.rank, dist.group.WORLD)
    told = [line for line in gather_objects(_difference(list(found), odd, places) if found else "", world) if line]
    return (
        f"check_replicas_interval: iteration {iteration}: {'; '.join(dict.fromkeys(told))}; memory or a processor went "
        "wrong in silence, and nothing was saved since: resume from the last checkpoint without that node"
    )


def _difference(tensors: Sequence[str], odd: Sequence[int], places: Sequence[str]) -> str:
    """Which of the data ranks at `places` differ in which tensors."""
    named = _listed([places[rank] for rank in odd])
    if len(odd) < len(places):
        return f"{named} differs from the other data ranks in {_listed(tensors)}"
    return f"{named} differ in {_listed(tensors)}, and which of them is right cannot be told"


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more
