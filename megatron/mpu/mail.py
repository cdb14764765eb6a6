"""Messages of all ranks to the first one, and its answer to all: from threads beside training, without a collective."""

from __future__ import annotations

import time
from collections.abc import Iterator

import torch.distributed as dist
from torch.distributed import distributed_c10d

from megatron.errors import RankError
from megatron.mpu.layout import Layout

_PAUSE_SECONDS, _PATIENCE_SECONDS = 0.05, 30.0
_LONGEST = 1 << 20
"""Characters of a value, of four bytes at most. The store closes the connection to who sets one of more than 8 MiB."""


class Mail:
    """The letters of one piece of work, which all ranks do at the same time.

    Args:
        subject: the same on all ranks, and of no other work.
        layout: the grid. One process needs no mail.
    """

    def __init__(self, subject: str, layout: Layout) -> None:
        self._subject, self._layout = subject, layout
        self._store = distributed_c10d._get_default_store()

    def send(self, message: str) -> None:
        """Send this rank's message to the first rank."""
        key = f"{self._subject}/{self._layout.rank}"
        sheets = [message[start : start + _LONGEST] for start in range(0, len(message), _LONGEST)]
        for number, sheet in enumerate(sheets):
            self._store.set(f"{key}/{number}", sheet)
        self._store.set(key, str(len(sheets)))

    def collect(self) -> Iterator[str]:
        """The messages of all ranks in order, on the first one. Waits for them as long as it takes."""
        for rank in range(self._layout.world_size):
            key = f"{self._subject}/{rank}"
            keys = [f"{key}/{number}" for number in range(int(self._wait_for(key)))]
            yield "".join(self._store.get(sheet).decode() for sheet in keys)
            for done in (key, *keys):
                self._store.delete_key(done)

    def answer(self, message: str) -> None:
        """Tell all ranks, from the first one. Returns once they know: the store ends with this process."""
        key, end = f"{self._subject}/answer", time.monotonic() + _PATIENCE_SECONDS
        self._store.set(key, message)
        while self._store.add(f"{key}/read", 0) < self._layout.world_size - 1 and time.monotonic() < end:
            time.sleep(_PAUSE_SECONDS)

    def wait_for_answer(self) -> str:
        """What the first rank says, on the others. Raises RankError when it is gone."""
        key = f"{self._subject}/answer"
        message = self._wait_for(key)
        self._store.add(f"{key}/read", 1)
        return message

    def _wait_for(self, key: str) -> str:
        # Asked again and again: whoever waits in the store keeps this process's other threads from it.
        try:
            while not self._store.check([key]):
                time.sleep(_PAUSE_SECONDS)
            return self._store.get(key).decode()
        except dist.DistNetworkError as error:
            raise RankError("the first rank is gone; its own lines, or its node's, say why") from error
