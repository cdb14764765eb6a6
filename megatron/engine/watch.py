"""What all ranks have to know of a step, looked at one step later, so that no host waits for its device.

The loss, the gradient norm, and a request to stop that one rank has heard go to all of them in one small tensor: one
all-reduce a step, none on one process. What is not finite on one rank is not finite in the mean of all. By the time the
next step has been asked for, it has long arrived. Whoever is about to save or log looks at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron.errors import UserError
from megatron.mpu import Layout

Judge = Callable[[int, float, float | None], None]
"""Told, on all ranks alike, of an iteration, its mean loss and its gradient norm, None where it has none."""


def refuse_nonfinite(loss_name: str, loss: float, norm: float | None) -> None:
    """Raise a UserError where a loss or a gradient norm is not finite."""
    for name, number in ((loss_name, loss), ("grad_norm", norm)):
        if number is not None and not math.isfinite(number):
            raise UserError(
                f"{name}: {number} is not finite, stopped before anything was saved; resume from the last checkpoint "
                "with a smaller lr or another seed, or set spikes: {action: rewind} or allow_nonfinite_loss: true"
            )


class StepWatch:
    """Tells every rank what they met in a step. `post` and `look` are to be called on all ranks alike.

    Args:
        layout: the grid.
        device: where losses are.
        loss_name: what the loss is called in the message of an error.
        allow_nonfinite: requests to stop only.
    """

    stops: bool = False
    """Has a rank been asked to stop, as far as was looked at? The same on all ranks."""
    judge: Judge | None
    """Told of the numbers of every step; at first the one that refuses what is not finite, or None."""

    def __init__(self, layout: Layout, device: torch.device, loss_name: str, allow_nonfinite: bool = False) -> None:
        self._world, self._device = layout.world_size, device
        self.judge = None if allow_nonfinite else lambda _, loss, norm: refuse_nonfinite(loss_name, loss, norm)
        on_gpu = device.type == "cuda"
        # The three numbers of a step, where the host reads them: as an array, since reading a tensor is an operation.
        self._arrived = torch.zeros(3, pin_memory=on_gpu)
        self._seen = self._arrived.numpy()
        self._event = torch.cuda.Event() if on_gpu else None
        self._sent: Tensor | None = None
        self._work: Any = None
        self._iteration: int | None = None
        self._has_norm = False

    def post(self, loss: Tensor | float, norm: Tensor | float | None, stop: bool, iteration: int | None) -> None:
        """Tell all ranks of the step that has just been asked for, having looked at the one before.

        Args:
            loss, norm: scalars; a norm of None is not looked at. What all ranks are told is their mean.
            stop: this rank has been asked to stop.
            iteration: which one it is; None where there is nothing to judge.

        Raises: whatever `judge` raises of the one before.
        """
        self.look()
        if self._world == 1:
            self.stops |= stop  # there is nobody to tell
            if self.judge is None:
                return
        self._iteration, self._has_norm = iteration, norm is not None
        with torch.no_grad():
            self._sent = self._message(loss, norm, stop)
        if self._world > 1:
            self._work = dist.all_reduce(self._sent, async_op=True)
        if self._event is not None:
            self._fetch()
            self._event.record()

    def ask(self, stop: bool) -> bool:
        """Has a rank been asked to stop, as far as the ranks told each other when they were asked last?"""
        self.post(0.0, None, stop, None)
        return self.stops

    def look(self) -> None:
        """Take in what the ranks were told last, if that has not been looked at.

        Raises: whatever `judge` raises, on all ranks: UserError where a loss or a gradient norm is not finite.
        """
        if self._sent is None:
            return
        if self._event is not None:
            self._event.synchronize()
        else:
            self._fetch()
        self._sent = None
        loss, norm, stop = map(float, self._seen)
        self.stops |= stop > 0
        if self.judge is not None and self._iteration is not None:
            self.judge(self._iteration, loss, norm if self._has_norm else None)

    @torch.no_grad()
    def mean_now(self, loss: Tensor | float, norm: Tensor | float | None) -> tuple[float, float | None]:
        """Loss and norm as `judge` would be told of them. Waits for the device and for all ranks."""
        message = self._message(loss, norm, False)
        if self._world > 1:
            dist.all_reduce(message)
        mean_loss, mean_norm, _ = message.tolist()
        return mean_loss, None if norm is None else mean_norm

    def _fetch(self) -> None:
        """Copy what arrives to the host. On a GPU both the message and the copy are only asked for here."""
        assert self._sent is not None
        if self._work is not None:
            self._work.wait()
        self._arrived.copy_(self._sent, non_blocking=True)
        self._work = None

    def _message(self, loss: Tensor | float, norm: Tensor | float | None, stop: bool) -> Tensor:
        """This rank's part of the sum over ranks that is [mean loss, mean norm, a number above 0 to stop]."""
        numbers = loss, 0.0 if norm is None else norm, float(stop)
        message = torch.stack([self._scalar(number) for number in numbers])
        return message if self._world == 1 else message.div_(self._world)

    def _scalar(self, value: Tensor | float) -> Tensor:
        if isinstance(value, Tensor):
            # DeepSpeed's ZeRO 3 has the norm on the CPU where gradients are offloaded.
            return value.detach().to(self._device, torch.float32, non_blocking=True)
        return torch.full((), value, device=self._device)  # a kernel's argument: torch.tensor would wait for a copy
