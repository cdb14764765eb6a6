"""What all ranks have to know of a step, looked at one step later, so that no host waits for its device.

A loss or a gradient norm that is not finite on one rank, and a request to stop that one rank has heard, go to all of
them in one small tensor: one all-reduce a step, none on one process. By the time the next step has been asked for, it
has long arrived. Whoever is about to save or log looks at once.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron.errors import UserError
from megatron.mpu import Layout

# How a number that is not finite travels: the largest of all ranks arrives, and NCCL's maximum knows no nan.
_KINDS = {1: "-inf", 2: "inf", 3: "nan"}


class StepWatch:
    """Tells every rank what one of them met in a step. `post` and `look` are to be called on all ranks alike.

    Args:
        layout: the grid.
        device: where losses are.
        loss_name: what the loss is called in the message of an error.
        allow_nonfinite: requests to stop only.
    """

    stops: bool = False
    """Has a rank been asked to stop, as far as was looked at? The same on all ranks."""

    def __init__(self, layout: Layout, device: torch.device, loss_name: str, allow_nonfinite: bool = False) -> None:
        self._is_alone, self._device, self._allow_nonfinite = layout.world_size == 1, device, allow_nonfinite
        self._names = loss_name, "grad_norm"
        on_gpu = device.type == "cuda"
        # The three numbers of a step, where the host reads them: as an array, since reading a tensor is an operation.
        self._arrived = torch.zeros(3, pin_memory=on_gpu)
        self._seen = self._arrived.numpy()
        self._event = torch.cuda.Event() if on_gpu else None
        self._sent: Tensor | None = None
        self._work: Any = None

    def post(self, loss: Tensor | float, norm: Tensor | float | None, stop: bool) -> None:
        """Tell all ranks of the step that has just been asked for, having looked at the one before.

        Args:
            loss, norm: scalars; a norm of None is not looked at.
            stop: this rank has been asked to stop.

        Raises: UserError as `look` does.
        """
        self.look()
        if self._is_alone:
            self.stops |= stop  # there is nobody to tell
            if self._allow_nonfinite:
                return
        with torch.no_grad():
            self._sent = self._message(loss, norm, stop)
        if not self._is_alone:
            self._work = dist.all_reduce(self._sent, op=dist.ReduceOp.MAX, async_op=True)
        if self._event is not None:
            self._fetch()
            self._event.record()

    def ask(self, stop: bool) -> bool:
        """Has a rank been asked to stop, as far as the ranks told each other when they were asked last?"""
        self.post(0.0, None, stop)
        return self.stops

    def look(self) -> None:
        """Take in what the ranks were told last, if that has not been looked at.

        Raises: UserError where a loss or a gradient norm is not finite, on all ranks.
        """
        if self._sent is None:
            return
        if self._event is not None:
            self._event.synchronize()
        else:
            self._fetch()
        self._sent = None
        *kinds, stop = map(int, self._seen)
        self.stops |= bool(stop)
        for name, kind in zip(self._names, kinds, strict=True):
            if kind:
                raise UserError(
                    f"{name}: {_KINDS[kind]} is not finite, stopped before anything was saved; resume from the last "
                    "checkpoint with a smaller lr or another seed, or set allow_nonfinite_loss: true"
                )

    def _fetch(self) -> None:
        """Copy what arrives to the host. On a GPU both the message and the copy are only asked for here."""
        assert self._sent is not None
        if self._work is not None:
            self._work.wait()
        self._arrived.copy_(self._sent, non_blocking=True)
        self._work = None

    def _message(self, loss: Tensor | float, norm: Tensor | float | None, stop: bool) -> Tensor:
        """[kind of the loss, kind of the norm, stop], a kind 0 for a finite number."""
        numbers = (0.0, 0.0) if self._allow_nonfinite else (loss, 0.0 if norm is None else norm)
        values = torch.stack([self._scalar(number) for number in numbers])
        kinds = torch.where(values.isfinite(), 0.0, values.nan_to_num(nan=3.0, posinf=2.0, neginf=1.0))
        return torch.cat([kinds, torch.full((1,), float(stop), device=self._device)])

    def _scalar(self, value: Tensor | float) -> Tensor:
        if isinstance(value, Tensor):
            # DeepSpeed's ZeRO 3 has the norm on the CPU where gradients are offloaded.
            return value.detach().to(self._device, torch.float32, non_blocking=True)
        return torch.full((), value, device=self._device)  # a kernel's argument: torch.tensor would wait for a copy
