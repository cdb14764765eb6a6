"""A device beside the CPU, on a machine that has none: made up, but it computes, and is as strict as a GPU.

Its tensors hold their numbers on the CPU and say that they are on the device `made_up`. As with CUDA, an operation on
tensors of both devices raises, unless it copies or the one on the CPU is a single number; so does a random draw from a
generator of the other device. Reading a tensor back (`item`, `tolist`, `cpu`) works, so that whole algorithms run.

Registering a device holds for the rest of the process: `install` is for a process of its own.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing

NAME = "made_up"
aten = torch.ops.aten

_COPIES = (aten.copy_.default, aten._to_copy.default)


def install() -> torch.device:
    """Make the device known to torch, and watch all operations of this process from now on."""
    module = backend_registration._DummyBackendModule()
    module.get_amp_supported_dtype = lambda: [torch.bfloat16, torch.float16]
    module.get_rng_state = lambda device=0: torch.get_rng_state()
    module.set_rng_state = lambda state, device=0: torch.set_rng_state(state)
    module.device = lambda device: contextlib.nullcontext()
    backend_registration._setup_privateuseone_for_python_backend(NAME, backend_module=module)
    # Module.to replaces parameters, in whose place it would else put other numbers that Python does not see.
    torch.__future__.set_swap_module_params_on_conversion(True)
    torch.utils.swap_tensors = partial(_swap_but_for_marks, torch.utils.swap_tensors)
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor([..], device=..) makes its tensor on the CPU and copies it
    _Watch().__enter__()
    return torch.device(NAME, 0)


def _swap_but_for_marks(swap: Callable[[Tensor, Tensor], None], parameter: Tensor, other: Tensor) -> None:
    """As on a device that torch knows, a parameter keeps its attributes when it is moved."""
    marks = dict(parameter.__dict__)
    swap(parameter, other)
    parameter.__dict__.update({name: mark for name, mark in marks.items() if name not in parameter.__dict__})


class OnDevice(Tensor):
    """A tensor of the made-up device; `held` are its numbers, on the CPU."""

    held: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held: Tensor) -> OnDevice:
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=torch.device(NAME, 0),
        )
        made.held = held
        return made

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _compute(function, args, kwargs or {})

    def tolist(self) -> Any:
        """As any tensor's, which torch refuses to read in a subclass."""
        return self.cpu().tolist()

    def __repr__(self, **_: Any) -> str:
        return f"OnDevice({self.held!r})"


class _Watch(TorchDispatchMode):
    """Sees every operation, those that make tensors and those on the CPU included."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _compute(function, args, kwargs or {})


def _compute(function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """What `function` gives, computed on the CPU, on the device that it belongs to."""
    flat = _leaves((args, kwargs))
    ours = any(isinstance(x, OnDevice) for x in flat)
    asked = kwargs.get("device")
    there = ours if asked is None else torch.device(asked).type == NAME
    if not ours and not there:
        return function(*args, **kwargs)
    _refuse(function, flat)
    if asked is not None or function is aten._to_copy.default:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    held_args, held_kwargs = _mapped(OnDevice, lambda x: x.held, (args, kwargs))
    result = function(*held_args, **held_kwargs)
    if function is aten.copy_.default:
        return args[0]
    if not there:
        return result
    result = _mapped(Tensor, OnDevice, result)
    return return_and_correct_aliasing(function, args, kwargs, result) if ours else result


def _leaves(value: Any) -> list[Any]:
    """What nested lists, tuples and dicts hold (torch's pytree does it, but takes longer than the operations)."""
    if isinstance(value, dict):
        value = list(value.values())
    return [leaf for part in value for leaf in _leaves(part)] if isinstance(value, list | tuple) else [value]


def _mapped(kind: type, change: Callable[[Any], Any], value: Any) -> Any:
    """The same lists, tuples and dicts with everything of a kind changed."""
    if isinstance(value, kind):
        return change(value)
    if isinstance(value, dict):
        return {key: _mapped(kind, change, part) for key, part in value.items()}
    return type(value)([_mapped(kind, change, part) for part in value]) if type(value) in (list, tuple) else value


def _refuse(function: Any, flat: Sequence[Any]) -> None:
    """Raise for what CUDA cannot do."""
    tensors = [x for x in flat if isinstance(x, Tensor)]
    others = [x for x in tensors if not isinstance(x, OnDevice)]
    places = ", ".join(f"{list(x.shape)} on {x.device.type}" for x in tensors)
    # Where each element is computed by itself, a single number may come from the CPU.
    takes_numbers = torch.Tag.pointwise in function.tags and isinstance(tensors[0], OnDevice)
    allowed = function in _COPIES or (takes_numbers and all(x.dim() == 0 for x in others))
    if 0 < len(others) < len(tensors) and not allowed:
        raise RuntimeError(f"{function}: tensors on different devices: {places}")
    if any(isinstance(x, torch.Generator) for x in flat):
        raise RuntimeError(f"{function}: a generator of the CPU cannot draw numbers on {NAME}")
