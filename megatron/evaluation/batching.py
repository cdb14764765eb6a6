"""Batches of items of any length that fit in memory: longest first, smaller again when memory runs out."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from typing import Literal, TypeVar

import torch

from megatron.errors import UserError
from megatron.log import get_logger
from megatron.mpu.device import uses_gpu

Item = TypeVar("Item")
Result = TypeVar("Result")
BatchSize = int | Literal["auto"]

# Tokens of a batch that `auto` starts from. A CPU gains nothing from more, and its memory ends without an error.
_AUTO_TOKENS = {"cuda": 2**17, "cpu": 2**12}


class Batches:
    """Computes items in batches; what memory allowed once is kept for later calls.

    Args:
        size: items computed together, or `auto`: as many as a number of tokens allows, padding counted, so that short
            texts come in larger batches. Either halves, and the batch is tried again, when memory runs out.
        device_type: where the model is, `cpu` or `cuda`.
        recover: try smaller batches when memory runs out. Tensor ranks cannot: the others wait for the one that failed.
        what: the items are, for messages.
    """

    def __init__(self, size: BatchSize, device_type: str = "cpu", recover: bool = True, what: str = "texts") -> None:
        if size != "auto" and size < 1:
            raise ValueError(f"batch size {size}: must be at least 1, or 'auto'")
        self.size = None if size == "auto" else size
        self.recover, self._what = recover, what
        self.tokens = _AUTO_TOKENS.get(device_type, _AUTO_TOKENS["cuda"])

    def run(
        self,
        items: Sequence[Item],
        length: Callable[[Item], int],
        compute: Callable[[list[Item]], list[Result]],
        finished: Callable[[int], object] = lambda count: None,
    ) -> list[Result]:
        """`compute` over all items; results in the order of `items`.

        Args:
            length: of an item in tokens.
            compute: the results of a batch, in its order.
            finished: told the number of items after each batch.

        Raises: what `compute` raises; an out-of-memory error only when one item alone does not fit.
        """
        order = sorted(range(len(items)), key=lambda i: -length(items[i]))
        results: dict[int, Result] = {}
        while len(results) < len(items):
            longest = length(items[order[len(results)]])
            count = self.size or max(1, self.tokens // max(1, longest))
            chosen = order[len(results) :][:count]
            computed = self._attempt(compute, [items[i] for i in chosen], longest)
            if computed is not None:
                results.update(zip(chosen, computed, strict=True))
                finished(len(chosen))
        return [results[i] for i in range(len(items))]

    def _attempt(
        self, compute: Callable[[list[Item]], list[Result]], batch: list[Item], longest: int
    ) -> list[Result] | None:
        """None when memory ran out and the batch size was halved."""
        try:
            return compute(batch)
        except RuntimeError as error:
            if len(batch) == 1 or not is_out_of_memory(error):
                raise
            if not self.recover:
                raise UserError(
                    f"eval_batch_size: {len(batch)} {self._what} of {longest} tokens do not fit in memory; choose fewer"
                ) from error
            self._shrink(len(batch), longest)
        # Outside of the handler: the error's traceback keeps the batch's tensors alive.
        gc.collect()
        if uses_gpu():
            torch.cuda.empty_cache()
        return None

    def _shrink(self, count: int, longest: int) -> None:
        half = count // 2
        if self.size is None:
            self.tokens = half * max(1, longest)
            line = "eval_batch_size auto: %d %s of %d tokens do not fit, trying %d"
            get_logger().info(line, count, self._what, longest, half)
        else:
            self.size = half
            line = "eval_batch_size: %d %s do not fit in memory, going on with %d"
            get_logger().warning(line, count, self._what, half)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out: torch's own, or a RuntimeError of an allocator or a library."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and (
        "out of memory" in text or "can't allocate memory" in text or "alloc_failed" in text
    )
