"""What the processes of a run tell each other of where they are, through the store of the first one.

Requests wait for ever where that process is stopped: they belong into a thread that nothing waits for.
"""

from __future__ import annotations

import json
import os
import time
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed import distributed_c10d

from megatron.failures import node_name
from megatron.mpu.blame import Report, Verdict
from megatron.mpu.neighbours import GONE, THERE, Neighbour, machine_key
from megatron.mpu.progress import IDLE, Progress

_QUIET = "-"
"""The state of a run in which nobody is missed; else JSON, {"call": why, "answers": key} or a verdict."""
_PREFIX = "watchdog"
_CONNECTING = timedelta(seconds=60)
_RANKS_A_SECOND = 1000


class Peers:
    """This process among those that watch each other. One round tells the others where it is, and hears of them.

    Args:
        rank, world_size: among those that are watched.
        interval: seconds between two rounds; longer where many processes ask the first one.
    """

    def __init__(self, rank: int, world_size: int, interval: float = 1.0) -> None:
        self.rank, self.world_size, self.interval = rank, world_size, max(interval, world_size / _RANKS_A_SECOND)
        self.host = node_name()
        self.neighbours: list[Neighbour] = []
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        # A connection of its own: the process group's waits inside while it holds the lock of its own.
        client = dist.TCPStore(address, port, is_master=False, wait_for_workers=False, timeout=_CONNECTING)
        self._store = _with_prefix(client)
        self._watched = [peer for peer in (range(world_size) if rank == 0 else (0,)) if peer != rank]
        machine = f"machine/{machine_key()}"
        self._keys = ["state", machine, *(f"beat/{peer}" for peer in self._watched)]
        self._number = 0
        self._beats = dict.fromkeys(self._watched, b"")
        self._unheard = dict.fromkeys(self._watched, 0.0)
        self._store.compare_set("state", "", _QUIET)
        for peer in (rank, *self._watched):  # reading a key that is not there would wait for it
            self._store.compare_set(f"beat/{peer}", "", "0 startup 0")
        self._store.set(f"host/{rank}", self.host)
        self._store.append(machine, f"{Neighbour.this(rank)}\n")

    def round(self, progress: Progress, pause: float) -> dict[str, Any]:
        """Tell where this process is, `pause` seconds after the last round.

        Returns: the state of the run: {}, a call, or a verdict.
        """
        self.tell(progress)
        state, machine, *beats = self._store.multi_get(self._keys)
        self.neighbours = Neighbour.parse(machine.decode())
        for peer, beat in zip(self._watched, beats, strict=True):
            self._unheard[peer] = self._unheard[peer] + pause if beat == self._beats[peer] else 0
            self._beats[peer] = beat
        found: dict[str, Any] = {} if state.decode() == _QUIET else json.loads(state)
        return found

    def tell(self, progress: Progress, of_main_thread: bool = False) -> None:
        """Where this process is, without waiting for an answer.

        Args:
            of_main_thread: through the connection of the process group, for this one's may be waiting.
        """
        self._number += 1
        store = _main_store() if of_main_thread else self._store
        store.set(f"beat/{self.rank}", f"{self._number} {progress.phase} {progress.iteration}")

    def unheard(self, seconds: float) -> list[int]:
        """Those of the watched ranks that have shown no sign of life for so long."""
        return [peer for peer in self._watched if self._unheard[peer] > seconds and not _is_idle(self._beats[peer])]

    def gone(self) -> list[int]:
        """Ranks on this machine whose process has ended without having come to its end."""
        ended = [peer.rank for peer in self.neighbours if peer.rank != self.rank and peer.state == GONE]
        return [rank for rank in ended if not _is_idle(self._store.get(f"beat/{rank}"))]

    def states(self) -> dict[str, str]:
        """Ranks on this machine that are gone or stopped, and which of it."""
        return {str(peer.rank): state for peer in self.neighbours if (state := peer.state) != THERE}

    def call(self, why: str) -> None:
        """Ask all ranks where they are, unless somebody has asked already."""
        answers = f"answers/{self.rank}/{self._number}"
        self._store.compare_set("state", _QUIET, json.dumps({"call": why, "answers": answers}))

    def answer(self, key: str, report: Report) -> None:
        """Say where this process is, after a call whose answers are under `key`."""
        self._store.append(key, f"{report}\n")

    def answers(self, key: str) -> list[Report]:
        """What was answered so far, by rank; this process has."""
        lines = self._store.get(key).decode().splitlines()
        return sorted(map(Report.parse, lines), key=lambda report: report.rank)

    def awaited(self) -> list[int]:
        """For the first rank: those that are to answer, for they have not come to their end."""
        return [peer for peer in self._watched if not _is_idle(self._beats[peer])]

    def state_of(self, rank: int) -> str:
        """GONE, STOPPED or THERE; THERE for a rank on another machine."""
        return next((peer.state for peer in self.neighbours if peer.rank == rank), THERE)

    def settle(self, verdict: Verdict | None) -> None:
        """For the first rank: all are told who is missing, or that nobody is."""
        self._store.set("state", str(verdict) if verdict else _QUIET)

    def confirm(self) -> None:
        """Tell the first rank, with which the store ends, that this one has read the verdict."""
        self._store.add("confirmed", 1)

    def wait_for_confirmations(self, count: int, seconds: float) -> None:
        """For the first rank: wait until so many have read the verdict, or for so long."""
        end = time.monotonic() + seconds
        while self._store.add("confirmed", 0) < count and time.monotonic() < end:
            time.sleep(0.05)

    def give_up(self, verdict: Verdict) -> None:
        """Tell the others that this process ends, unless somebody is named already. For the main thread."""
        _main_store().compare_set("state", _QUIET, str(verdict))

    def host_of(self, rank: int) -> str | None:
        """The name of a rank's machine; None where it has not come so far as to tell it."""
        known = self._store.check([f"host/{rank}"])
        return self._store.get(f"host/{rank}").decode() if known else None

    def place_of(self, rank: int) -> str:
        """Phase and iteration that a watched rank was in last."""
        _, _, place = self._beats[rank].decode().partition(" ")
        phase, _, iteration = place.rpartition(" ")
        return f"in {phase} of iteration {iteration}"

    def speaks_here(self, silent: tuple[int, ...]) -> bool:
        """Is this the first rank of its machine that can speak? It does for all of them."""
        alive = [peer.rank for peer in self.neighbours if peer.rank not in silent and peer.state == THERE]
        return self.rank == min([*alive, self.rank])

    def kill(self, ranks: tuple[int, ...]) -> None:
        """End these ranks where they are on this machine: a stopped process cannot end itself."""
        for peer in self.neighbours:
            if peer.rank in ranks and peer.rank != self.rank:
                peer.kill()


def _with_prefix(store: dist.Store) -> Any:
    return dist.PrefixStore(_PREFIX, store)


def _main_store() -> Any:
    store = distributed_c10d._get_default_store()
    while isinstance(store, dist.PrefixStore):
        store = store.underlying_store
    return _with_prefix(store)


def _is_idle(beat: bytes) -> bool:
    return beat.split(b" ")[1:2] == [IDLE.encode()]
