"""A stricter network than gloo: what a rank sends is held against what NCCL takes, and comes no sooner than NCCL's.

Inside `strict_collectives`, every message of torch.distributed, whoever sends it, is noted and checked: contiguous, of
a type that NCCL knows, not empty. Its result is withheld until `wait()`; before that its buffers hold junk, as those of
a GPU may. `order_faults` compares the notes of all ranks.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import combinations, zip_longest
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

NCCL_DTYPES = {
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int8, torch.uint8,
    torch.bool,
}  # fmt: skip
# Methods of ProcessGroup, under the names of torch 2.6 to 2.13: those that read their first argument and write it,
# those that write the first and read the second, and those that only read.
_IN_PLACE = ("allreduce", "allreduce_coalesced", "broadcast", "reduce")
_OUT_OF_PLACE = (
    "_allgather_base", "_reduce_scatter_base", "all_gather_single", "all_gather_single_coalesced", "all_to_all_single",
    "allgather", "allgather_coalesced", "allgather_into_tensor_coalesced", "alltoall", "alltoall_base", "gather",
    "reduce_scatter", "reduce_scatter_single", "reduce_scatter_single_coalesced", "reduce_scatter_tensor_coalesced",
    "scatter", "recv", "recv_anysource",
)  # fmt: skip
_READING = ("send", "barrier")
COLLECTIVES = (*_IN_PLACE, *_OUT_OF_PLACE, *_READING)
# DeepSpeed's ZeRO 3 compares its plan between ranks before there is one. NCCL does nothing then, but we rely on it here
# only: whoever sends nothing has most likely forgotten something.
_MAY_BE_EMPTY = "get_lst_from_rank0"


@dataclass(frozen=True)
class Message:
    """One collective call, as all its ranks have to make it; or a send and its receive, which look alike."""

    group: str
    ranks: tuple[int, ...]
    operation: str
    tensors: tuple[tuple[str, int], ...]
    """(dtype, number of elements) of each."""

    def __str__(self) -> str:
        return f"{self.operation} of {list(self.tensors)} on group {self.group} {list(self.ranks)}"


@dataclass
class Traffic:
    """What one rank sent, and what was wrong with it. `groups`: process groups this rank is in, whenever noted."""

    messages: list[Message] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    groups: list[int] = field(default_factory=list)

    def note_groups(self) -> None:
        """Count the process groups of this rank now; on GPUs each is a communicator."""
        self.groups.append(len(dist.distributed_c10d._world.pg_map))


def order_faults(messages: Sequence[Sequence[Message]]) -> list[str]:
    """Where ranks differ in the messages that they share; `messages` by rank.

    Each two ranks must have made the calls on groups of both in one order, whatever the group: GPUs run communicators
    that share them one after another.
    """
    faults = []
    for first, second in combinations(range(len(messages)), 2):
        shared = [[m for m in messages[rank] if first in m.ranks and second in m.ranks] for rank in (first, second)]
        for number, (left, right) in enumerate(zip_longest(*shared)):
            if left != right:
                faults.append(f"message {number} of ranks {first} and {second}: {left} | {right}")
                break
    return faults


@contextmanager
def strict_collectives() -> Iterator[Traffic]:
    """Inside, this process's messages are checked, noted and delivered late."""
    traffic, waiting = Traffic(), set[str]()
    names = [name for name in COLLECTIVES if hasattr(ProcessGroup, name)]
    checked = {name: _checked(name, getattr(ProcessGroup, name), traffic, waiting) for name in names}
    # What the class itself holds are descriptors, which getattr does not give.
    originals = {name: vars(ProcessGroup)[name] for name in names}
    try:
        _set_methods(checked)
        yield traffic
    finally:
        _set_methods(originals)
        traffic.faults += [f"nothing waited for {call}" for call in sorted(waiting)]


def _set_methods(methods: dict[str, Any]) -> None:
    for name, method in methods.items():
        setattr(ProcessGroup, name, method)


def _checked(name: str, original: Callable[..., Any], traffic: Traffic, waiting: set[str]) -> Callable[..., Any]:
    def call(group: ProcessGroup, *arguments: Any, **options: Any) -> Any:
        message = _message(name, group, (*arguments, *options.values()))
        traffic.messages.append(message)
        place = f"{message}, {len(traffic.messages)}. message, at {_caller()}"
        traffic.faults += [f"{fault}: {place}" for fault in _tensor_faults(_tensors(arguments))]
        copies, buffers, inputs = [_copied(argument) for argument in arguments], *_written_and_read(name, arguments)
        sent = [_copied(tensor) for tensor in inputs]
        work = original(group, *copies, **options)
        if work is None:
            return None
        for buffer in buffers:
            _spoil(buffer)
        waiting.add(place)

        def deliver() -> None:
            waiting.discard(place)
            if any(not torch.equal(now, before) for now, before in zip(inputs, sent, strict=True)):
                traffic.faults.append(f"changed while it was sent: {place}")
            for buffer, result in zip(buffers, _written_and_read(name, copies)[0], strict=True):
                buffer.detach().copy_(result)

        return _Pending(work, deliver)

    return call


def _written_and_read(name: str, arguments: Sequence[Any]) -> tuple[list[Tensor], list[Tensor]]:
    """The tensors that a call writes, and those that it only reads, wherever they are not part of the former."""
    if name in _READING:
        return [], _tensors(arguments)
    written = _tensors(arguments[0])
    storages = {tensor.untyped_storage().data_ptr() for tensor in written}
    read = _tensors(arguments[1:]) if name in _OUT_OF_PLACE else []
    return written, [tensor for tensor in read if tensor.untyped_storage().data_ptr() not in storages]


class _Pending:
    """A torch.distributed.Work whose result is there after `wait` and not before."""

    def __init__(self, work: Any, deliver: Callable[[], None]) -> None:
        self._work, self._deliver = work, deliver

    def wait(self, *arguments: Any) -> Any:
        done = self._work.wait(*arguments)
        self._deliver()
        return done

    def is_completed(self) -> bool:
        return bool(self._work.is_completed())


def _message(name: str, group: ProcessGroup, arguments: Sequence[Any]) -> Message:
    ranks = tuple(dist.get_process_group_ranks(group))
    tensors = _tensors(arguments)
    if name in ("send", "recv"):
        here, there = dist.get_rank(), ranks[arguments[1]]
        ends = (here, there) if name == "send" else (there, here)
        operation, members = f"message {ends[0]} -> {ends[1]}, tag {arguments[2]}", tuple(sorted(ends))
    else:
        if name in ("gather", "scatter"):  # only the root has the tensors of all
            tensors = _tensors(arguments[1 if name == "gather" else 0])
        operation, members = " ".join([name, *_settings(arguments[-1])]), ranks
    sizes = tuple((str(t.dtype).removeprefix("torch."), t.numel()) for t in tensors)
    return Message(group.group_name, members, operation, sizes)


def _settings(options: Any) -> Iterator[str]:
    """What all ranks have to ask for alike, besides tensors."""
    if hasattr(options, "reduceOp"):
        yield next(
            name for name in ("SUM", "AVG", "PRODUCT", "MIN", "MAX") if options.reduceOp == getattr(dist.ReduceOp, name)
        )
    if hasattr(options, "rootRank"):
        yield f"root {options.rootRank}"


def _tensor_faults(tensors: Sequence[Tensor]) -> Iterator[str]:
    for tensor in tensors:
        if not tensor.is_contiguous():
            yield f"not contiguous, {list(tensor.shape)} by {list(tensor.stride())}"
        if tensor.dtype not in NCCL_DTYPES:
            yield f"NCCL has no {tensor.dtype}"
        if not tensor.numel() and all(function != _MAY_BE_EMPTY for _, function, _ in _frames()):
            yield "empty"


def _tensors(arguments: Any) -> list[Tensor]:
    """All tensors of nested lists, in order."""
    if isinstance(arguments, Tensor):
        return [arguments]
    return [t for part in arguments for t in _tensors(part)] if isinstance(arguments, list | tuple) else []


def _copied(argument: Any) -> Any:
    """Nested lists of tensors with tensors of their own."""
    if isinstance(argument, Tensor):
        return argument.detach().clone(memory_format=torch.contiguous_format)
    return [_copied(part) for part in argument] if isinstance(argument, list | tuple) else argument


def _spoil(tensor: Tensor) -> None:
    """Fill with what no computation can use: not a number, or the largest one there is."""
    tensor = tensor.detach()
    if tensor.is_floating_point():
        tensor.fill_(float("nan"))
    else:
        tensor.fill_(True if tensor.dtype == torch.bool else torch.iinfo(tensor.dtype).max)


def _frames() -> Iterator[tuple[str, str, int]]:
    """(file, function, line) of what is being done, innermost first; quicker than traceback, which reads the files."""
    for frame, line in traceback.walk_stack(None):
        yield frame.f_code.co_filename, frame.f_code.co_name, line


def _caller() -> str:
    """The innermost lines of the project and of DeepSpeed that led here."""
    ours = [(file, line) for file, _, line in _frames() if "/megatron/" in file or "/deepspeed/runtime" in file]
    return " <- ".join(f"{file.rpartition('/')[2]}:{line}" for file, line in ours[:3]) or "a test"
