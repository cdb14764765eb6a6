"""Starting a run again after a failure, from its newest checkpoint, until it is complete or makes no progress."""

from __future__ import annotations

import re
import signal
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from megatron.config.sections.launch import LaunchConfig
from megatron.errors import ConfigError
from megatron.failures import Failure, failed_attempts, read_failures, record_failure, unreliable_nodes
from megatron.launch.supervise import Outcome, signals_to
from megatron.log import get_logger
from megatron.signals import STOP_SIGNALS

_LONGEST_DELAY = 600.0  # seconds
_EXCLUDED = re.compile(r"\bExcNodeList=([^\s(]+)")
_NODES = re.compile(r"(?:[^,\[]|\[[^\]]*\])+")  # the items of a list: node1,node[3-5,9]


@dataclass(frozen=True)
class _Newest:
    """What `latest` in a folder of checkpoints says. Read without torch, which the parent of a run has no use for."""

    name: str | None
    written: int

    @classmethod
    def of(cls, folder: Path) -> _Newest:
        """None and 0 where there is no checkpoint yet."""
        try:
            with (folder / "latest").open(encoding="utf-8", errors="replace") as file:
                return cls(file.readline(256).strip(), (folder / "latest").stat().st_mtime_ns)
        except OSError:
            return cls(None, 0)

    @property
    def iteration(self) -> int | None:
        """Of the checkpoint that it names."""
        match = re.fullmatch(r"global_step(\d{1,15})", self.name or "")
        return int(match[1]) if match else None


class Restarts:
    """Runs a call of the launcher, and again after failures, as the section `launch` says.

    Args:
        config: the section.
        folder: the run's checkpoints.
        env: the variables of Slurm, inside a job.

    Raises: ConfigError where a job of Slurm is to be requeued and there is none.
    """

    def __init__(self, config: LaunchConfig, folder: str, env: Mapping[str, str]) -> None:
        self._limit, self._delay, self._folder = config.max_restarts, config.restart_delay_seconds, Path(folder)
        self._job = env.get("SLURM_JOB_ID")
        self._requeues = config.restart_by_requeue
        if self._requeues and self._job is None:
            reason = "true, but this is not inside a job of Slurm (SLURM_JOB_ID is not set)"
            raise ConfigError("restart_by_requeue", reason, "start it with sbatch, or set it to false")
        earlier = failed_attempts(read_failures(folder)) if self._requeues else []
        self._failures = [failure for failure in earlier if failure.job == self._job]

    def run(self, attempt: Callable[[], Outcome]) -> int:
        """Call `attempt` until it ends well, or for a reason that another attempt would not change.

        Returns: the exit code of the last attempt; 128 and the number of a signal that came between two of them.
        """
        while (code := self._attempt(attempt)) is None:
            pass
        return code

    def _attempt(self, attempt: Callable[[], Outcome]) -> int | None:
        """One attempt, and the wait after it; the exit code, or None when another attempt is due."""
        before, noted = _Newest.of(self._folder), len(read_failures(self._folder))
        outcome = attempt()
        if not outcome.is_failure:
            return outcome.code
        newest = _Newest.of(self._folder)
        failure = self._described(outcome, newest, before != newest, noted)
        record_failure(self._folder, failure)
        self._failures.append(failure)
        what = f"{failure.reason}{_place(failure)}"
        if reason := self._why_not(newest):
            get_logger().error("%s; not started again: %s", what, reason)
            return outcome.code
        number = len(self._failures)
        told = f"restart {number} of {self._limit} from {newest.name or 'the beginning'}"
        if self._requeues:
            self._requeue(what, told)
            return outcome.code
        delay = min(self._delay * 2.0 ** min(number - 1, 60), max(self._delay, _LONGEST_DELAY))
        get_logger().error("%s; %s in %g s", what, told, delay)
        return _wait(delay)

    def _described(self, outcome: Outcome, newest: _Newest, progress: bool, noted: int) -> Failure:
        """A failed attempt, by what its processes have told since the line `noted`, else by what its launcher said."""
        told = [line for line in read_failures(self._folder)[noted:] if line.node is not None]
        node, rank, reason = (told[0].node, told[0].rank, told[0].reason) if told else outcome.blame()
        return Failure(
            node, rank, reason, newest.iteration, exit_code=outcome.code, progress=progress, job=self._job
        )  # fmt: skip

    def _why_not(self, newest: _Newest) -> str | None:
        """Why there is no other attempt; None when there is."""
        idle = [failure for failure in self._failures[-2:] if not failure.progress]
        if len(idle) == 2 and idle[0].iteration == idle[1].iteration and not self._leaves_a_node_out():
            return f"two attempts in a row have left no checkpoint newer than {newest.name or 'the beginning'}"
        return f"max_restarts {self._limit} is reached" if len(self._failures) > self._limit else None

    def _leaves_a_node_out(self) -> bool:
        """Has the last failure been the second of its node, without which the next attempt is another one?"""
        known = read_failures(self._folder) if self._requeues else []
        return unreliable_nodes(known) != unreliable_nodes(known[:-1])

    def _requeue(self, what: str, told: str) -> None:
        """Requeue the job; until it starts again it can be told which nodes not to use."""
        assert self._job is not None
        nodes = unreliable_nodes(read_failures(self._folder))
        state = _scontrol("show", "job", self._job) or ""
        if "JobState=RUNNING" not in state:  # one that is being cancelled could be requeued all the same
            get_logger().error("%s; not started again: the job is being ended", what)
            return
        get_logger().error("%s; %s, by requeueing the job", what, told)
        known = _EXCLUDED.search(state)
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_IGN)  # Slurm sends one to all processes of a job that it requeues
        if _scontrol("requeue", self._job) is not None and nodes:
            get_logger().info("nodes that failed twice are left out: %s", ", ".join(nodes))
            excluded = dict.fromkeys([*_NODES.findall(known[1] if known else ""), *nodes])
            _scontrol("update", f"JobId={self._job}", f"ExcNodeList={','.join(excluded)}")


def _wait(seconds: float, interval: float = 0.2) -> int | None:
    """Wait; at once 128 and the number of a signal that comes. Before and after, signals end this process as ever."""
    heard: list[int] = []
    end = time.monotonic() + seconds
    with signals_to(lambda number, _frame: heard.append(number)):
        while not heard and (left := end - time.monotonic()) > 0:
            time.sleep(min(left, interval))
    if not heard:
        return None
    get_logger().info("%s: stopped before the restart", signal.Signals(heard[0]).name)
    return 128 + heard[0]


def _place(failure: Failure) -> str:
    """Where it was, unless the reason says so."""
    if failure.node and failure.node in failure.reason:
        return ""
    rank = "" if failure.rank is None else f" (rank {failure.rank})"
    return f" on {failure.node}{rank}" if failure.node else rank


def _scontrol(*words: str) -> str | None:
    """What scontrol says; None where it fails, with its own line in the log."""
    try:
        return subprocess.run(["scontrol", *words], check=True, capture_output=True, text=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        reason = getattr(error, "stderr", None) or str(error)
        get_logger().error("scontrol %s failed: %s", " ".join(words), " ".join(reason.split()))
        return None
