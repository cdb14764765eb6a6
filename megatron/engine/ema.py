"""The exponential moving average (EMA) of the weights that a run keeps beside them.

It starts as the weights. After every update that is made, with the decay d of `ema_decay`,

    average <- d average + (1 - d) weights

in fp32. d has no warm-up: it is the same from the first update on, as in timm's ModelEmaV3 unless it is told otherwise,
and in MMPretrain's EMAHook; both begin one update later, as the weights after it.

A process keeps the average of the fp32 values that its optimizer updates, as a second tensor of the same form beside
each: so it is shared by data ranks with ZeRO, by tensor ranks and by pipeline stages as those are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

Values = Callable[[Tensor], Tensor]
"""What the model is to compute with, by the tensor of fp32 values that is updated."""


class WeightAverage:
    """The average of what one process updates.

    Args:
        decay: between 0 and 1.
        trained: the tensors that the optimizer updates: parameters, or flat partitions of DeepSpeed's.
        frozen: of each parameter that is not trained its fp32 values, on the CPU. The average approaches these too.
        optimizer: DeepSpeed's wrapper, or a torch optimizer.
        zero_stage: ZeRO stage of the engine.
        data_rank: this process's place on the data axis, over which ZeRO 3 divides frozen parameters.
    """

    def __init__(
        self,
        decay: float,
        trained: Iterable[Tensor],
        frozen: Mapping[nn.Parameter, Tensor],
        optimizer: Any,
        zero_stage: int,
        data_rank: int,
    ) -> None:
        self._weight, self._optimizer, self._zero_stage, self._data_rank = 1.0 - decay, optimizer, zero_stage, data_rank
        self._trained, self._frozen = list(dict.fromkeys(trained)), dict(frozen)
        self._averages = {values: values.detach().clone() for values in (*self._trained, *self._frozen.values())}

    def of(self, values: Tensor) -> Tensor:
        """The average of one of the tensors that are updated or frozen."""
        return self._averages[values]

    @torch.no_grad()
    def update(self) -> None:
        """Take an update in, which has just been made."""
        for values in (self._trained, list(self._frozen.values())):  # one device each
            if values:
                torch._foreach_lerp_([self._averages[tensor] for tensor in values], values, self._weight)

    @contextmanager
    def in_model(self) -> Iterator[None]:
        """Inside, the model computes with the average, afterwards with its weights, bit by bit as before. Collective.

        After an error it is left as it is: the run is at its end, and other ranks may not come to put anything back.
        """
        self._write(self.of)
        yield
        self._write(lambda values: values)

    @torch.no_grad()
    def _write(self, values: Values) -> None:
        for parameter, fp32 in self._frozen.items():
            self._write_frozen(parameter, values(fp32))
        if self._zero_stage == 0:  # what is updated is the parameter itself: they change places, there and back
            for weights in self._trained:
                average = self._averages[weights]
                weights.data, average.data = average.data, weights.data
        else:
            _write_partitions(self._optimizer, values, self._zero_stage)

    def _write_frozen(self, parameter: Any, values: Tensor) -> None:
        if self._zero_stage < 3:
            parameter.copy_(values)
            return
        part = parameter.ds_tensor
        mine = values.view(-1)[part.ds_numel * self._data_rank :][: part.ds_numel]
        part.data[: mine.numel()].copy_(mine)


def _write_partitions(optimizer: Any, values: Values, zero_stage: int) -> None:
    """Have DeepSpeed write what is to stand for its partitions into the model, as it does after an update."""
    name = "fp32_partitioned_groups_flat" if zero_stage == 3 else "single_partition_of_fp32_groups"
    partitions = getattr(optimizer, name)
    setattr(optimizer, name, [values(partition) for partition in partitions])
    if zero_stage < 3:
        optimizer.update_lp_params()
    else:
        optimizer.checkpoint_event_prologue()  # parameters that stay gathered are let go of,
        for group in range(len(partitions)):
            optimizer._reassign_or_swap_out_partitioned_parameters(group)
        optimizer.checkpoint_event_epilogue()  # and gathered again
    setattr(optimizer, name, partitions)
