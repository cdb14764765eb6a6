"""Decoding on a GPU without the host's work for every kernel: a step is recorded once as a CUDA graph, and replayed.

A recorded step reads and writes the same memory each time, so all that changes from step to step is in tensors: the
tokens that go in, and the slot of the cache that they fill. Attention looks at as many slots as the next multiple of
SPAN; a step is recorded anew when the texts grow beyond it.

Legend: b rows of the batch, h heads, s_kv slots looked at, V rows of the embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from megatron.inference.cache import FixedStep
from megatron.inference.next_logits import Cached
from megatron.log import get_logger
from megatron.model import LanguageModel

SPAN = 256
"""Slots by which a recorded step looks further than the one before it."""


class Recorder(Protocol):
    """Records what a function does on the device."""

    def record(self, function: Callable[[], Tensor]) -> tuple[Callable[[], Any], Tensor]:
        """What does it again, and the tensor that the result is then in. RuntimeError where it cannot be recorded."""


class CudaRecorder:
    """torch.cuda.CUDAGraph; the graphs of one recorder share their memory, as only one of them runs at a time."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def record(self, function: Callable[[], Tensor]) -> tuple[Callable[[], Any], Tensor]:
        """See Recorder. The function runs twice before, so that what libraries set up at first is not recorded."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                function()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            result = function()
        return graph.replay, result


def recorder_for(device: torch.device) -> Recorder | None:
    """What records on a device; None where there is nothing to gain."""
    return CudaRecorder() if device.type == "cuda" else None


class Recorded(Cached):
    """Cached, with recorded steps behind the first. Rows of ended texts stay until half of the rows can go.

    Args:
        model: for prompts and steps.
        slots: of the cache; all are allocated at once.
        recorder: makes the recordings.
        images: see Cached.
    """

    ahead = 1

    def __init__(self, model: LanguageModel, slots: int, recorder: Recorder, images: Tensor | None = None) -> None:
        super().__init__(model, slots + self.ahead, images)
        self._recorder: Recorder | None = recorder
        self._ids: Tensor | None = None
        self._steps: dict[int, tuple[FixedStep, Callable[[], Any], Tensor]] = {}

    @torch.no_grad()
    def next(self, tokens: Tensor, sequences: Sequence[list[int]]) -> Tensor:
        """Logits [b, V] behind one more token of each, int64 [b]; the next call writes into the same tensor."""
        assert self.cache is not None, "called after the first step"
        slot = self.cache.length
        if self._ids is None:
            self._ids = tokens.new_zeros(len(tokens), 1)
        span = min(-(-(slot + 1) // SPAN) * SPAN, self.cache.capacity)
        self._ids.copy_(tokens[:, None])
        if span not in self._steps and not self._record(span, slot):
            self._recorder = None
            return super().next(tokens, sequences)
        fixed, replay, logits = self._steps[span]
        fixed.go_to(slot)
        self.cache.length += 1
        replay()
        return logits

    def _record(self, span: int, slot: int) -> bool:
        """Record a step that looks at `span` slots; False where that is not possible."""
        if self._recorder is None:
            return False
        assert self.cache is not None and self._ids is not None
        ids, fixed = self._ids, FixedStep(self.cache, span)
        fixed.go_to(slot)

        def step() -> Tensor:
            return self.model.logits(self.model.hidden(ids, fixed.begin())[:, -1])

        try:
            self._steps[span] = fixed, *self._recorder.record(step)
        except RuntimeError as error:
            get_logger().warning("decoding without CUDA graphs: %s", str(error).splitlines()[0])
            return False
        return True

    def can_select(self, count: int, total: int) -> bool:
        """Other rows are other memory, and recorded anew: not for a few."""
        return 2 * count <= total

    def select(self, rows: list[int]) -> None:
        """Go on with these rows only."""
        super().select(rows)
        self._ids, self._steps = None, {}
