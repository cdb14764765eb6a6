"""Counts what makes the host wait for the device, and what ranks send, step by step; whose line of code it was.

On a GPU a number that the host looks at has to be there: everything asked for before it has to be computed first. On a
CPU the same calls cost nothing, so they are counted rather than timed. So are copies from and to the host that are not
told to go on by themselves, and operations whose result has a size that only the numbers tell.
"""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from tests.strict_collectives import COLLECTIVES

ROOT = str(Path(__file__).parents[1] / "megatron")
aten = torch.ops.aten
# What a number or a truth value is taken with (item, float, bool), and results as large as the numbers say.
_OPERATIONS = {
    aten._local_scalar_dense, aten.is_nonzero, aten.equal, aten.nonzero, aten.masked_select, aten._unique2,
    aten.unique_dim, aten.unique_consecutive, aten.repeat_interleave,
}  # fmt: skip
# On the CPU these are no operations.
_TO_HOST = {Tensor.cpu, Tensor.tolist, Tensor.numpy, Tensor.__array__}
_FROM_HOST = {torch.tensor, torch.as_tensor}


@dataclass
class Step:
    """What happened in a step, by the innermost line of the project or of DeepSpeed: `file:line call`."""

    looks: Counter[str] = field(default_factory=Counter)
    messages: Counter[str] = field(default_factory=Counter)

    def ours(self, counted: Counter[str]) -> Counter[str]:
        """Those of the project's own lines."""
        return Counter({place: number for place, number in counted.items() if not place.startswith("deepspeed")})


@dataclass
class Report:
    """The steps that were counted; `next_step` begins one."""

    steps: list[Step] = field(default_factory=lambda: [Step()])

    def next_step(self) -> None:
        """What follows belongs to a new step."""
        self.steps.append(Step())

    def look(self, call: str) -> None:
        """Count a wait for the device."""
        if place := _place():
            self.steps[-1].looks[f"{place} {call}"] += 1

    def message(self, call: str) -> None:
        """Count a message between ranks."""
        self.steps[-1].messages[f"{_place()} {call}"] += 1


def _place() -> str | None:
    """The line that asked for it; None for what a batch is checked for before it leaves the host."""
    for frame, line in traceback.walk_stack(None):
        file = frame.f_code.co_filename
        if file.startswith(ROOT):
            name = file.removeprefix(f"{ROOT}/")
            on_host = name.startswith("data/") or (name.startswith("tasks/") and "check" in frame.f_code.co_name)
            return None if on_host else f"{name}:{line}"
        if "/deepspeed/" in file:
            return f"deepspeed/{file.rpartition('/deepspeed/')[2]}:{line}"
    return "test"


class _Operations(TorchDispatchMode):
    def __init__(self, report: Report) -> None:
        super().__init__()
        self._report = report

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.overloadpacket in _OPERATIONS or _indexes_by_truth(function, args):
            self._report.look(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


def _indexes_by_truth(function: Any, args: Any) -> bool:
    if function.overloadpacket not in (aten.index, aten.index_put, aten.index_put_):
        return False
    return any(isinstance(x, Tensor) and x.dtype in (torch.bool, torch.uint8) for x in args[1])


class _Functions(TorchFunctionMode):
    def __init__(self, report: Report) -> None:
        super().__init__()
        self._report = report

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function in _TO_HOST or (function is Tensor.to and _waits(args, kwargs)):
            self._report.look(function.__name__)
        if function in _FROM_HOST and kwargs.get("device") is not None:
            self._report.look(function.__name__)
        return function(*args, **kwargs)


def _waits(args: Any, kwargs: dict[str, Any]) -> bool:
    """Is it a copy to a device that this is not told to go on after? torch's own are from a device to itself."""
    moved = any(isinstance(x, torch.device | str) for x in (*args[1:], kwargs.get("device")))
    caller = next(file for file in _files() if file != __file__ and not file.endswith("/overrides.py"))
    return moved and not kwargs.get("non_blocking") and "/torch/" not in caller


def _files() -> Iterator[str]:
    """Where what is being done is written, innermost first."""
    return (frame.f_code.co_filename for frame, _ in traceback.walk_stack(None))


@contextmanager
def counted() -> Iterator[Report]:
    """Inside, this process's waits and messages are counted."""
    report = Report()
    names = [name for name in COLLECTIVES if hasattr(ProcessGroup, name)]
    originals = {name: vars(ProcessGroup)[name] for name in names}
    calls = {name: getattr(ProcessGroup, name) for name in names}
    try:
        for name, call in calls.items():
            setattr(ProcessGroup, name, _noted(name, call, report))
        with _Functions(report), _Operations(report):
            yield report
    finally:
        for name, original in originals.items():
            setattr(ProcessGroup, name, original)


def _noted(name: str, call: Any, report: Report) -> Any:
    @wraps(call)
    def noted(*args: Any, **kwargs: Any) -> Any:
        report.message(name)
        return call(*args, **kwargs)

    return noted
