"""Runs that come back after a failure, and those that do not."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron.checkpoint.store import CheckpointReader, RunFolder
from megatron.config import RunConfig, resolve_config
from megatron.config.checks import find_training_mistakes
from megatron.config.sections.launch import LaunchConfig
from megatron.errors import ConfigError, UserError
from megatron.failures import Failure, read_failures, record_failure
from megatron.launch import restarts
from megatron.launch.culprit import Culprit, Listener
from megatron.launch.restarts import Restarts
from megatron.launch.supervise import Outcome
from megatron.training.loop import train
from tests.growth.grown_runs import assert_equal, tensors
from tests.launch.calls import DEMO
from tests.launched import ROOT, environment, training_lines, write_config, write_struck_script
from tests.ranks import run_ranks

KILLED = Outcome(137, is_local=True)
KINDS = ("model", "optimizer", "rng")


class Attempts:
    """Attempts that end as told and leave the checkpoints that they are told to leave."""

    def __init__(self, folder: Path, *ends: tuple[int | None, Outcome]) -> None:
        self.folder, self.ends, self.count = folder, ends, 0

    def __call__(self) -> Outcome:
        saved, outcome = self.ends[self.count]
        self.count += 1
        if saved is not None:
            self.folder.mkdir(exist_ok=True)
            RunFolder(self.folder).set_latest(saved)
        return outcome

    def run(self, limit: int = 9, delay: float = 0, env: dict[str, str] | None = None, **keys: Any) -> int:
        config = LaunchConfig(max_restarts=limit, restart_delay_seconds=delay, **keys)
        return Restarts(config, str(self.folder), env or {}).run(self)


def test_a_run_is_started_again_until_it_ends_well(tmp_path: Path, package_log: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "out"
    lost = Outcome(143, culprit=Culprit("node2", 5, 139))
    attempts = Attempts(folder, (None, KILLED), (4, KILLED), (8, lost), (20, Outcome(0)))
    assert attempts.run() == 0 and attempts.count == 4
    first, *_, last = read_failures(folder)
    assert (first.iteration, first.progress, first.exit_code, first.rank) == (None, False, 137, None)
    assert (last.node, last.rank, last.iteration, last.progress) == ("node2", 5, 8, True)
    assert last.reason == "a process was killed by signal 11"
    assert f"killed by signal 9 on {first.node}; restart 1 of 9 from the beginning in 0 s" in package_log.text
    assert "on node2 (rank 5); restart 3 of 9 from global_step8 in 0 s" in package_log.text


@pytest.mark.parametrize("code", [1, 75, 134, 137, 139])
@pytest.mark.parametrize("saved", [None, 4])
def test_two_attempts_without_progress_end_it(
    tmp_path: Path, package_log: pytest.LogCaptureFixture, saved: int | None, code: int
) -> None:
    failed = Outcome(code, is_local=True)
    attempts = Attempts(tmp_path, (saved, failed), (None, failed), (None, failed), (None, Outcome(0)))
    assert attempts.run() == code and attempts.count == (3 if saved else 2)
    (line,) = [line for line in package_log.messages if "not started again" in line]
    newest = "global_step4" if saved else "the beginning"
    assert line.endswith(f"not started again: two attempts in a row have left no checkpoint newer than {newest}")


def test_max_restarts_is_kept(tmp_path: Path, package_log: pytest.LogCaptureFixture) -> None:
    attempts = Attempts(tmp_path, *((n, KILLED) for n in range(1, 9)))
    assert attempts.run(limit=2) == 137 and attempts.count == 3
    assert "not started again: max_restarts 2 is reached" in package_log.text


@pytest.mark.parametrize(
    "outcome",
    [
        Outcome(2), Outcome(141), Outcome(130), Outcome(143), Outcome(138), Outcome(137, was_stopped=True),
        Outcome(143, culprit=Culprit("a", 0, 2)), Outcome(143, culprit=Culprit("a", 0, 143)),
    ],
    ids=str,
)  # fmt: skip
def test_mistakes_and_requests_to_stop_are_not_retried(tmp_path: Path, outcome: Outcome) -> None:
    attempts = Attempts(tmp_path, (4, outcome))
    assert attempts.run() == outcome.code and attempts.count == 1
    assert read_failures(tmp_path) == []


def test_the_wait_doubles_up_to_ten_minutes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[float] = []
    monkeypatch.setattr(restarts, "_wait", waited.append)
    Attempts(tmp_path, *((n, KILLED) for n in range(10)), (None, Outcome(0))).run(20, 5)
    assert waited == [5, 10, 20, 40, 80, 160, 320, 600, 600, 600]
    waited.clear()
    Attempts(tmp_path, (1, KILLED), (2, KILLED), (None, Outcome(0))).run(20, 1000)
    assert waited == [1000, 1000]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_during_the_wait_ends_it_at_once(
    tmp_path: Path, package_log: pytest.LogCaptureFixture, number: signal.Signals
) -> None:
    attempts = Attempts(tmp_path, (4, KILLED), (8, Outcome(0)))
    timer = threading.Timer(0.3, lambda: os.kill(os.getpid(), number))
    timer.start()
    assert attempts.run(delay=3600) == 128 + number and attempts.count == 1
    timer.join()
    assert f"{number.name}: stopped before the restart" in package_log.text


def test_what_a_process_has_told_of_a_failure_wins_over_the_launchers_words(
    tmp_path: Path, package_log: pytest.LogCaptureFixture
) -> None:
    told = "rank 3 on node2 is stopped"
    assert Outcome(75, culprit=Culprit("node1", 0, 75)).blame() == (None, None, "a process was lost")
    record_failure(tmp_path, Failure("node9", 9, "an earlier attempt's", 1))
    attempts = Attempts(tmp_path, (4, Outcome(75, culprit=Culprit("node1", 0, 75))), (8, Outcome(0)))

    def attempt() -> Outcome:
        outcome = attempts()
        if outcome.code:
            record_failure(tmp_path, Failure("node2", 3, told, 7))
        return outcome

    assert Restarts(LaunchConfig(max_restarts=1, restart_delay_seconds=0), str(tmp_path), {}).run(attempt) == 0
    line = read_failures(tmp_path)[-1]
    assert (line.node, line.rank, line.reason) == ("node2", 3, told)
    assert (line.iteration, line.exit_code) == (4, 75)
    assert f"{told}; restart 1 of 1" in package_log.text


# ---- what launchers say ----


def heard(tmp_path: Path, text: str) -> Culprit | None:
    """The culprit by what a launcher of two nodes with two processes each has said."""
    (tmp_path / "stderr").write_text(text)
    with subprocess.Popen(["cat", str(tmp_path / "stderr")], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        return Listener(process.stdout, {"node1": 2, "node2": 2}).culprit()


@pytest.mark.parametrize(
    ("text", "culprit"),
    [
        ("", None),
        ("srun: error: node2: task 1: Killed\nsrun: error: node1: task 0: Exited with exit code 1\n",
         ("node2", 1, 137)),
        ("srun: error: node1: tasks 0-1: Exited with exit code 75\nsrun: error: n-2.a: task 3: Aborted (core dumped)\n",
         ("n-2.a", 3, 134)),
        ("srun: error: node1: task 0: Exited with exit code 75\nsrun: error: b: tasks 1-2: Exited with exit code 143\n",
         ("b", 1, 143)),
        ("srun: error: node[1-2]: tasks 0-1: Exited with exit code 2\nsrun: Terminating StepId=1.0\n", None),
        ("pdsh@head: node1: ssh exited with exit code 75\npdsh@head: node2: ssh exited with exit code 247\n",
         ("node2", None, 137)),
        ("mpirun noticed that process rank 3 with PID 0 on node b exited on signal 9 (Killed).\n", ("b", 3, 137)),
        ("The first process to do so was:\n\n  Process name: [[40121,1],2]\n  Exit code:    1\n---\n", ("node2", 2, 1)),
        ("Exit code:    1\nProcess name: [[40121,1],9]\nExit code: 3\n", (None, 9, 3)),
    ],
)  # fmt: skip
def test_launchers_say_who_ended_first(
    tmp_path: Path, text: str, culprit: tuple[Any, Any, int] | None, capfd: pytest.CaptureFixture[str]
) -> None:
    assert heard(tmp_path, text) == (None if culprit is None else Culprit(*culprit))
    assert capfd.readouterr().err == text, "it is passed on"


# ---- a job of Slurm ----

SCONTROL = """\
#!/bin/bash
cd "$(dirname "$0")"
echo "$*" >> calls
[ "$1" = show ] && echo "JobId=7 JobState=$(cat state) ReqNodeList=(null) ExcNodeList=$(cat excluded)"
[ "$1" != "$(cat refused 2> /dev/null)" ] || { echo "Requested operation is disabled" >&2; exit 1; }
"""
JOB = {"SLURM_JOB_ID": "7", "SLURMD_NODENAME": "node1"}


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[str]]:
    """The calls of a scontrol that stands in for Slurm's."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "scontrol").write_text(SCONTROL)
    (folder / "scontrol").chmod(0o755)
    (folder / "excluded").write_text("(null)")
    (folder / "state").write_text("RUNNING")
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    return lambda: (folder / "calls").read_text().splitlines()[1:] if (folder / "calls").exists() else []


def requeued(folder: Path, *ends: tuple[int | None, Outcome], limit: int = 9) -> list[int]:
    """The exit codes of a job's starts, each a new process that knows of the others by the file only."""
    return [Attempts(folder, end).run(limit, 3600, JOB, restart_by_requeue=True) for end in ends]


def test_a_job_is_requeued_without_the_nodes_that_failed_twice(tmp_path: Path, calls: Callable[[], list[str]]) -> None:
    on = {name: Outcome(137, culprit=Culprit(name, 1, 137)) for name in ("node2", "node3")}
    assert requeued(tmp_path / "out", (4, on["node2"]), (8, on["node3"]), (12, Outcome(0))) == [137, 137, 0]
    assert calls() == ["requeue 7", "show job 7", "requeue 7"]
    (tmp_path / "bin/excluded").write_text("node[7,8-9],node2")
    requeued(tmp_path / "out", (16, on["node2"]))
    assert calls()[-2:] == ["requeue 7", "update JobId=7 ExcNodeList=node[7,8-9],node2"]


def test_a_job_is_not_requeued_for_ever(
    tmp_path: Path, calls: Callable[[], list[str]], package_log: pytest.LogCaptureFixture
) -> None:
    record_failure(tmp_path / "out", Failure("node1", None, "another job's", 0, exit_code=1, progress=False, job="6"))
    assert requeued(tmp_path / "out", (4, KILLED), (8, KILLED), (12, KILLED), limit=2) == [137] * 3
    assert calls().count("requeue 7") == 2 and "max_restarts 2 is reached" in package_log.text


def test_a_job_without_progress_is_not_requeued_unless_it_had_some_between_its_failures(
    tmp_path: Path, calls: Callable[[], list[str]]
) -> None:
    folder, killed = tmp_path / "out", Outcome(137)  # nobody knows where
    requeued(folder, (4, killed), (None, killed))
    RunFolder(folder).set_latest(8)  # by a start that was stopped at its time limit
    requeued(folder, (None, killed))
    assert calls().count("requeue 7") == 3
    requeued(folder, (None, killed))
    assert calls().count("requeue 7") == 3


def test_a_node_that_never_works_is_left_out_before_the_job_is_given_up(
    tmp_path: Path, calls: Callable[[], list[str]]
) -> None:
    bad = [Outcome(137, culprit=Culprit(f"node{n}", 1, 137)) for n in (1, 1, 2)]
    assert requeued(tmp_path, *((None, outcome) for outcome in bad)) == [137] * 3
    assert [call for call in calls() if "show" not in call] == [
        "requeue 7", "requeue 7", "update JobId=7 ExcNodeList=node1",
    ]  # fmt: skip


def test_a_job_that_is_being_cancelled_stays_cancelled(
    tmp_path: Path, calls: Callable[[], list[str]], package_log: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "bin/state").write_text("COMPLETING")
    assert requeued(tmp_path / "out", (4, KILLED)) == [137]
    assert calls() == [] and "the job is being ended" in package_log.text


def test_a_job_that_cannot_be_requeued_is_told(
    tmp_path: Path, calls: Callable[[], list[str]], package_log: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "bin/refused").write_text("requeue")
    assert requeued(tmp_path / "out", (4, KILLED)) == [137]
    assert "scontrol requeue 7 failed: Requested operation is disabled" in package_log.text


# ---- a real run ----


def trained(config: RunConfig) -> None:
    train(config)


@pytest.mark.launches
@pytest.mark.processes
def test_a_killed_worker_costs_a_restart_and_nothing_else(
    tmp_path: Path, tiny_config: Callable[..., RunConfig], tokenizer_file: Path, corpus_prefix: str
) -> None:
    keys = {"train_iters": 12, "checkpoint_factor": 5, "async_save": False, "hidden_dropout": 0.1}
    run_ranks(1, trained, tiny_config(**keys, save=str(tmp_path / "undisturbed")))
    script, save = write_struck_script(tmp_path / "train.py", [7]), tmp_path / "struck"
    folders = {"save": str(save), "load": str(save)}
    config = write_config(
        tmp_path / "run.yml", tokenizer_file, corpus_prefix, **keys, **folders, restart_delay_seconds=0.5
    )
    command = [sys.executable, "deepy.py", str(script), str(config), "--max_restarts", "3"]
    result = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=120)
    output = result.stdout + result.stderr
    assert result.returncode == 0, output
    assert "a process was killed by signal 9 on " in output and "; restart 1 of 3 from global_step5 in 0.5 s" in output
    assert f"resumed from {save / 'global_step5'} at iteration 5, restart 1 of this run" in output
    assert [line["iteration"] for line in training_lines(save)] == [*range(1, 13)]
    assert_equal(tensors(save, kinds=KINDS), tensors(tmp_path / "undisturbed", kinds=KINDS))
    (failure,) = read_failures(save)
    assert (failure.node, failure.iteration, failure.progress) == (socket.gethostname(), 5, True)
    assert CheckpointReader(save / "global_step12").train_state["restarts"] == 1


# ---- what is refused ----


@pytest.mark.parametrize(
    "keys", [["save=a"], ["load=a", "save=null"], ["load=b", "save=a"], ["load=null", "save=null"]], ids=str
)
def test_a_run_that_could_not_resume_is_refused(keys: list[str]) -> None:
    keys = ["load=null", *keys]

    def mistakes(*more: str) -> list[str]:
        return [str(error) for error in find_training_mistakes(resolve_config(DEMO, [*keys, *more]).config)]

    (line,) = mistakes("max_restarts=1")
    assert line.startswith("max_restarts: ") and "load and save do not name one folder; set load" in line
    assert mistakes() == []


def test_a_job_is_needed_to_requeue_one() -> None:
    with pytest.raises(ConfigError, match="restart_by_requeue: true, but this is not inside a job of Slurm"):
        Restarts(LaunchConfig(max_restarts=1, restart_by_requeue=True), "out", {})


def test_the_flag_is_for_whole_numbers() -> None:
    with pytest.raises(UserError, match="--max_restarts: max_restarts: "):
        from megatron.launch import launch

        launch(["train.py", str(DEMO), "--max_restarts", "often"])
