"""Notices processes of a run that are lost, where collectives may wait for days.

Every process counts up a key of its own in the store that all of them share; the first one looks at all of these keys
and names a process that has stopped counting. A thread in every process reads that name, prints it and ends the
process: a collective that waits in NCCL cannot be ended in another way.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import NoReturn

import torch.distributed as dist

from megatron.errors import EXIT_LOST_RANK

_INTERVAL, _LIMIT = 5.0, 120.0


def _end(line: str) -> NoReturn:
    sys.stderr.write(f"error: {line}\n")
    sys.stderr.flush()
    os._exit(EXIT_LOST_RANK)


class PeerWatch:
    """Ends this process when one of the others is gone, stopped or ended with an error.

    Args:
        rank, world_size: this process among those that are watched.
        interval: seconds between two looks.
        limit: seconds without a sign of life after which a process counts as lost.
        end: called with a line that says which process it was.
    """

    def __init__(
        self,
        rank: int,
        world_size: int,
        interval: float = _INTERVAL,
        limit: float = _LIMIT,
        end: Callable[[str], None] = _end,
    ) -> None:
        self._rank, self._world_size, self._interval, self._limit, self._end = rank, world_size, interval, limit, end
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        # A connection of its own: the process group's waits inside while it holds the lock of its own.
        client = dist.TCPStore(address, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=limit))
        self._store = dist.PrefixStore("peers", client)
        self._stopped = threading.Event()
        self._seen = {peer: (-1, time.monotonic()) for peer in range(world_size)}
        self._store.set(f"host/{rank}", socket.gethostname())
        self._thread = threading.Thread(target=self._run, daemon=True, name="peer-watch")
        self._thread.start()

    def stop(self) -> None:
        """No longer watch, and no longer be missed: this process is done, and so are the others."""
        self._stopped.set()
        self._thread.join()

    def give_up(self) -> None:
        """Tell the others that this process ends with an error."""
        self._stopped.set()
        self._store.set("lost", f"rank {self._rank} on {socket.gethostname()} ended with an error")

    def _run(self) -> None:
        try:
            while not self._stopped.wait(self._interval):
                self._store.add(f"beat/{self._rank}", 1)
                if self._rank == 0:
                    self._look()
                if self._store.check(["lost"]):
                    self._end(self._store.get("lost").decode())
                    return
        except (dist.DistError, RuntimeError) as error:
            # The first rank leaves when all have come to the end: this process is about to stop watching then.
            if not self._stopped.wait(2 * self._interval):
                reason = str(error).splitlines()[0][:120]
                self._end(f"the first rank is gone ({reason}); its own lines, or its node's, say why")

    def _look(self) -> None:
        """Name the first process that has shown no sign of life for `limit` seconds."""
        now = time.monotonic()
        for peer, (count, since) in self._seen.items():
            beat = self._store.add(f"beat/{peer}", 0)
            if beat != count:
                self._seen[peer] = beat, now
            elif now - since > self._limit:
                known = self._store.check([f"host/{peer}"])
                host = self._store.get(f"host/{peer}").decode() if known else "a node that never answered"
                self._store.set("lost", f"rank {peer} on {host} has shown no sign of life for {self._limit:.0f} s")
                return
