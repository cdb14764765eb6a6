"""Ends a run in which a process is missing, and says which one: killed, stopped, or hanging.

Two threads, for the main one may wait in a collective that nothing interrupts. One counts how long the main thread has
been in its phase. The other tells the peers, and may itself wait for ever where the first rank is stopped, which the
first thread notices. Time is counted in rounds of a thread: a job that is suspended as a whole and goes on later has
not been late.

When a limit has passed or a process is gone, all ranks are called. Each writes its stacks and says where it is; the
first rank names those that the others wait for, and all end.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch.distributed as dist

from megatron.errors import EXIT_LOST_RANK
from megatron.failures import node_name
from megatron.log import get_logger, last_words
from megatron.mpu.blame import HOW, Report, Verdict, judge
from megatron.mpu.neighbours import GONE, THERE
from megatron.mpu.peers import Peers
from megatron.mpu.progress import IDLE, Limits, Progress
from megatron.mpu.stacks import collectives_entered, main_place, waits_for_others, write_stacks
from megatron.signals import is_timeout

_TICK = 0.5
_ANSWER_SECONDS, _VERDICT_SECONDS, _OWN_END_SECONDS = 4.0, 12.0, 5.0

OnMissing = Callable[[Verdict, int], None]
"""Called on one rank with who is missing and the iteration, before the processes end."""


class Watchdog:
    """Watches this process, and the others of the run with those that watch them.

    Args:
        peers: None for a process alone.
    """

    def __init__(self, peers: Peers | None) -> None:
        self.progress = Progress()
        self._peers, self._limits, self._shortest = peers, Limits(), 0.0
        self._folder: Path | None = None
        self._on_missing: OnMissing | None = None
        self._stopped, self._settled, self._ending = threading.Event(), threading.Event(), threading.Lock()
        self._count, self._ticks, self._silence, self._is_writing = -1, 0, 0, False
        self._late, self._timed_out, self._suspicion, self._lost_store = "", "", "", ""
        self._called, self._since_call, self._answered = False, 0.0, peers.world_size if peers else 1
        self._host_of_first: str | None = None
        threads = [self._count_time, *([self._talk] if peers else [])]
        self._threads = [threading.Thread(target=run, daemon=True, name="watchdog") for run in threads]

    def begin(
        self, phase: str, limits: Limits, folder: Path | None = None, on_missing: OnMissing | None = None
    ) -> Progress:
        """From now on this process is missed when it is gone, or longer in a phase than its limit.

        Args:
            folder: for stacks; without it they go to stderr.
        """
        self._limits, self._folder, self._on_missing = limits, folder, on_missing
        self._shortest = limits.shortest
        self.progress.forget()
        self.progress.enter(phase, 0)
        for thread in self._threads:
            if thread.ident is None:
                thread.start()
        self._tell()
        return self.progress

    def rest(self) -> None:
        """From now on this process is no longer missed, and misses nobody."""
        self.progress.enter(IDLE)
        self._tell()

    def _tell(self) -> None:
        """Where this process is, at once: it may end before the next round."""
        if self._peers is not None and dist.is_initialized():
            with suppress(dist.DistError, RuntimeError):
                self._peers.tell(self.progress, of_main_thread=True)

    def stop(self) -> None:
        """No longer watch: this process is done, and so are the others."""
        self.rest()
        self._stopped.set()
        for thread in self._threads:
            if thread.ident is not None:
                thread.join(2.0)

    def give_up(self) -> None:
        """Tell the others that this process ends with an error."""
        self.progress.enter(IDLE)
        self._stopped.set()
        if (peers := self._peers) is not None and dist.is_initialized():
            line = f"rank {peers.rank} on {peers.host} ended with an error; its own lines say why"
            with suppress(dist.DistError, RuntimeError):
                peers.give_up(Verdict(line, (peers.rank,), peers.host, ended=True))

    def explain(self, error: BaseException) -> None:
        """A collective failed: find out whether a rank is missing, and end this process then. Else it comes back."""
        if self._peers is not None and not self._stopped.is_set():
            self._settled.clear()
            self._timed_out = "a collective has run out of time" if is_timeout(error) else ""
            self._suspicion = (str(error).splitlines() or [""])[0][:120]
            end = time.monotonic() + _ANSWER_SECONDS + _VERDICT_SECONDS
            while not self._settled.wait(0.1) and time.monotonic() < end:
                if self._lost_store:
                    self._first_rank_is_missing(self._lost_store)
            self._suspicion = self._timed_out = ""

    # The thread that counts.

    def _count_time(self) -> None:
        while not self._stopped.wait(_TICK):
            progress = self.progress
            if progress.count != self._count:
                self._count, self._ticks, self._late = progress.count, 0, ""
            self._ticks, self._silence = self._ticks + 1, 0 if self._is_writing else self._silence + 1
            if self._is_at_work():
                self._look()

    def _look(self) -> None:
        phase, seconds = self.progress.phase, self._ticks * _TICK
        if seconds > self._shortest and not self._late:
            limit = self._limits.of(phase, self.progress.durations(phase))
            if limit is not None and seconds > limit:
                self._late = f"the limit of {phase} is {limit:.0f} s"
        if self._peers is None:
            if self._late:
                self._write_stacks(self._late)
                self._finish(judge(self._late, [self._report()], {}))
        elif self._peers.rank:
            silence, patience = self._silence * _TICK, self._limits.heartbeat
            if self._late or self._suspicion or self._called:
                runs = self._peers.state_of(0) == THERE
                patience = min(patience, _ANSWER_SECONDS if runs else 1.5 * self._peers.interval)
            if silence > patience:
                self._first_rank_is_missing(f"has shown no sign of life for {silence:.0f} s")

    # The thread that talks.

    def _talk(self) -> None:
        peers = self._peers
        assert peers is not None
        pause = 0.0
        try:
            while not self._stopped.wait(pause):
                state = peers.round(self.progress, pause)
                pause = peers.interval / 4 if state else peers.interval
                if peers.rank and not self._host_of_first:
                    self._host_of_first = peers.host_of(0)
                self._silence = 0
                if "line" in state:
                    peers.confirm()
                    self._finish(Verdict.parse(state))
                elif state:
                    self._since_call += pause
                    self._answer(state["call"], state["answers"])
                else:
                    self._listen()
        except (dist.DistError, RuntimeError) as error:
            self._lost_store = f"is gone ({(str(error).splitlines() or [''])[0][:120]})"
            # The first rank leaves when all have come to the end: this process is about to stop watching then.
            if not self._comes_to_its_end(2 * peers.interval):
                self._first_rank_is_missing(self._lost_store)
        except Exception as error:  # a fault of this thread is to end no run
            self._stopped.set()
            text = f"watchdog: {type(error).__name__}: {error}; rank {peers.rank} is not watched any more"
            get_logger().warning(text, extra={"all_ranks": True})
            peers.tell(Progress())

    def _listen(self) -> None:
        """Nobody has called: is there a reason to?"""
        peers = self._peers
        assert peers is not None
        if self._called:
            self._called = False
            self._suspicion = ""
            self._settled.set()
        if not self._is_at_work():
            return
        if late := self._late or self._timed_out:
            peers.call(late)
        elif self._suspicion or peers.unheard(self._limits.heartbeat) or peers.gone():
            peers.call("")

    def _answer(self, why: str, key: str) -> None:
        peers = self._peers
        assert peers is not None
        if not self._called:
            self._called, self._since_call = True, 0.0
            report = self._report()
            peers.answer(key, report)
            if self._folder or not report.waits:
                self._write_stacks(f"{report.where}; {why or self._suspicion}")
            if peers.rank == 0:
                self._settle(why, key)
        if peers.rank and (peers.unheard(_ANSWER_SECONDS) or peers.state_of(0) == GONE):
            self._first_rank_is_missing(f"has shown no sign of life for {_ANSWER_SECONDS:.0f} s")
        elif peers.rank and self._since_call > _VERDICT_SECONDS:
            self._first_rank_is_missing("does not say who is missing")

    def _settle(self, why: str, key: str) -> None:
        """The first rank's part of a call: wait for the answers, and tell all what follows from them."""
        peers = self._peers
        assert peers is not None
        deadline = time.monotonic() + max(_ANSWER_SECONDS, 2.5 * peers.interval)
        reports = peers.answers(key)
        while True:
            missing = set(peers.awaited()) - {report.rank for report in reports}
            cannot = {int(rank) for report in reports for rank in report.neighbours}
            if missing <= cannot or time.monotonic() > deadline:
                break
            time.sleep(peers.interval / 4)
            peers.round(self.progress, peers.interval / 4)
            reports = peers.answers(key)
        silent = {rank: (peers.host_of(rank) or "a node that never answered", peers.place_of(rank)) for rank in missing}
        verdict = judge(why, reports, silent)
        peers.settle(verdict)
        self._answered = len(reports)
        if verdict is not None:
            self._finish(verdict)

    # Both.

    def _report(self) -> Report:
        peers, progress = self._peers, self.progress
        waits = bool(self._suspicion) or waits_for_others()  # or did, until its collective failed
        return Report(
            peers.rank if peers else 0, peers.host if peers else node_name(), progress.phase, progress.iteration,
            progress.count, self._ticks * _TICK, waits, main_place(), collectives_entered(),
            peers.states() if peers else {},
        )  # fmt: skip

    def _write_stacks(self, title: str) -> None:
        self._is_writing = True
        write_stacks(self._folder, self._peers.rank if self._peers else 0, title)
        self._is_writing = False

    def _is_at_work(self) -> bool:
        """Would this process be missed? So is one that rests because a collective failed, and has to learn why."""
        return self.progress.phase != IDLE or bool(self._suspicion)

    def _comes_to_its_end(self, seconds: float) -> bool:
        """Does this process rest or stop watching within this time?"""
        end = time.monotonic() + seconds
        while not self._stopped.wait(0.1) and self._is_at_work():
            self._silence = 0  # the thread that talks may be the one that waits here
            if self._suspicion or time.monotonic() > end:
                return False
        return True

    def _first_rank_is_missing(self, how: str) -> None:
        peers = self._peers
        assert peers is not None
        how = HOW.get(peers.state_of(0), how)
        host = self._host_of_first or os.environ["MASTER_ADDR"]
        if self._folder and not self._called:
            self._write_stacks(f"rank 0 on {host} {how}")
        self._finish(Verdict(f"rank 0 on {host} {how} (last seen {peers.place_of(0)})", (0,), host, silent=(0,)))

    def _finish(self, verdict: Verdict | None) -> None:
        """Say who is missing, and end this process."""
        if verdict is None or (verdict.ended and self._comes_to_its_end(_OWN_END_SECONDS)):
            return
        self._ending.acquire()  # by the first of both threads, and never let go
        if self._stopped.is_set():
            return
        peers, silent = self._peers, verdict.silent
        if peers is None or peers.speaks_here(silent):
            where = f"; stacks of the ranks are in {self._folder}" if self._folder else ""
            last_words(f"watchdog: {verdict.line}{where}")
        rank, world = (peers.rank, peers.world_size) if peers else (0, 1)
        if self._on_missing is not None and rank == next((r for r in range(world) if r not in silent), 0):
            self._record(verdict)
        if peers is not None:
            if rank == 0:
                peers.wait_for_confirmations(self._answered - 1, 2.5 * peers.interval)
            if peers.speaks_here(silent):
                peers.kill(silent)
        os._exit(EXIT_LOST_RANK)

    def _record(self, verdict: Verdict) -> None:
        """Call on_missing, in a thread: the disk may be what hangs."""
        assert self._on_missing is not None
        thread = threading.Thread(target=self._on_missing, args=(verdict, self.progress.iteration), daemon=True)
        thread.start()
        thread.join(2.0)
