"""tools/slurm/pretrain.sbatch: its decisions with stand-ins, and a whole story on a real Slurm."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from megatron.checkpoint.store import CheckpointReader
from megatron.config import RunConfig
from megatron.failures import Failure, read_failures, record_failure
from megatron.training.loop import train
from tests.growth.grown_runs import assert_equal, tensors
from tests.launched import ROOT, environment, training_lines, wait_until, write_config, write_struck_script
from tests.ranks import run_ranks
from tests.tools.slurm.cluster import Cluster, missing_programs

pytestmark = pytest.mark.launches

SCRIPT = ROOT / "tools/slurm/pretrain.sbatch"

# ---- what the script decides, without Slurm ----

RUN = """\
#!/bin/bash
case " $* " in *" --explain "*) cat "$SETTINGS"; exit ;; esac
trap 'sleep 0.3; exit "$CODE_AFTER_SIGNAL"' USR1 TERM
mkdir -p "$SAVE"; echo "global_step$REACHED" > "$SAVE/latest"
echo "args: $*" > "$STARTED.new"; mv "$STARTED.new" "$STARTED"
[ "$WAIT" = 1 ] || exit "$CODE"
while :; do sleep 0.05; done
"""
SCONTROL = """\
#!/bin/bash
if [ "$1" = show ]; then echo "JobState=$STATE Reason=None PreemptTime=$PREEMPTED"; else echo "scontrol $*"; fi
"""


class StandIn:
    """The script with stand-ins for Python (RUN) and scontrol; the run has 20 iterations."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name, text in {"run": RUN, "scontrol": SCONTROL}.items():
            (folder / name).write_text(text)
            (folder / name).chmod(0o755)
        self.settings(save=f'"{folder / "out"}"', load=f'"{folder / "out"}"')

    def settings(self, **keys: str) -> None:
        lines = [f"  {key:40} {value:40} a.yml:1\n" for key, value in {"train_iters": "20", **keys}.items()]
        (self.folder / "settings").write_text("".join(["checkpoint:\n", *lines]))

    def start(self, **variables: object) -> subprocess.Popen[str]:
        path = f"{self.folder}{os.pathsep}{os.environ['PATH']}"
        files = {"PYTHON": "run", "STARTED": "started", "SETTINGS": "settings", "SAVE": "out"}
        values = {"CODE": 0, "CODE_AFTER_SIGNAL": 0, "WAIT": 0, "REACHED": 20, "STATE": "RUNNING", "PREEMPTED": "None"}
        values |= {"PATH": path, "SLURM_JOB_ID": 7, "SLURM_JOB_NODELIST": "n1", **variables}
        values |= {name: self.folder / file for name, file in files.items()}
        return subprocess.Popen(
            ["bash", str(SCRIPT), "a.yml", "--set", "seed=3"],
            cwd=ROOT, env=environment(**{name: str(value) for name, value in values.items()}),
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip

    def run(self, **variables: object) -> tuple[int, str]:
        with self.start(**variables) as process:
            return process.wait(20), process.communicate(timeout=20)[0]

    def signalled(self, number: int, **variables: object) -> tuple[int, str]:
        with self.start(WAIT=1, **variables) as process:
            assert wait_until((self.folder / "started").exists, 20)
            process.send_signal(number)
            output = process.communicate(timeout=20)[0]
        return process.returncode, output


@pytest.fixture
def script(tmp_path: Path) -> StandIn:
    return StandIn(tmp_path)


def test_a_complete_run_ends_the_job(script: StandIn) -> None:
    code, output = script.run()
    assert code == 0 and "scontrol" not in output
    arguments = (script.folder / "started").read_text().strip()
    requeue = "--set restart_by_requeue=true"
    assert arguments == f"args: deepy.py train.py -d configs a.yml --set seed=3 --set deepspeed_slurm=true {requeue}"


@pytest.mark.parametrize("code", [1, 2, 137])
def test_a_run_that_fails_is_not_requeued(script: StandIn, code: int) -> None:
    returned, output = script.run(CODE=code, REACHED=5)
    assert returned == code and "scontrol" not in output


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
@pytest.mark.parametrize("code", [0, 138, 143])
def test_a_run_stopped_at_the_time_limit_is_requeued(script: StandIn, number: int, code: int) -> None:
    returned, output = script.signalled(number, CODE_AFTER_SIGNAL=code, REACHED=5)
    assert returned == 0 and "scontrol requeue 7" in output


@pytest.mark.parametrize("code", [0, 143])
def test_a_preempted_run_is_requeued_when_only_its_processes_get_the_signal(script: StandIn, code: int) -> None:
    returned, output = script.run(CODE=code, REACHED=5, PREEMPTED="2026-11-21T08:45:05")
    assert returned == 0 and "scontrol requeue 7" in output


@pytest.mark.parametrize("code", [1, 2])
def test_a_run_that_fails_to_save_is_not_requeued(script: StandIn, code: int) -> None:
    returned, output = script.signalled(signal.SIGUSR1, CODE_AFTER_SIGNAL=code, REACHED=5)
    assert returned == code and "scontrol" not in output


def test_a_signal_at_the_end_of_a_complete_run_does_not_start_it_again(script: StandIn) -> None:
    returned, output = script.signalled(signal.SIGUSR1, REACHED=20)
    assert returned == 0 and "scontrol" not in output


def test_a_cancelled_job_stays_cancelled(script: StandIn) -> None:
    returned, output = script.signalled(signal.SIGTERM, REACHED=5, STATE="COMPLETING")
    assert returned == 0 and "scontrol" not in output


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"save": "null", "load": "null"}, "save: not set"),
        ({"save": '"runs/a"', "load": "null"}, "load: has to be"),
        ({"save": '"a"', "load": '"b"'}, "load: has to be"),
        ({"save": '"a"', "load": '"a"', "train_iters": "null"}, "train_iters: not set"),
    ],
)
def test_a_run_that_could_not_resume_is_refused(script: StandIn, keys: dict[str, str], message: str) -> None:
    script.settings(**keys)
    code, output = script.run()
    assert code == 2 and output.count("\n") == 1 and f"error: {message}" in output
    assert not (script.folder / "started").exists()


# ---- a real Slurm ----


@pytest.fixture
def cluster(request: pytest.FixtureRequest) -> Iterator[Cluster]:
    if missing_programs():
        pytest.skip(f"Slurm is not installed: {', '.join(missing_programs())} not found")
    nodes = getattr(request, "param", 2)
    with tempfile.TemporaryDirectory(prefix="slurm") as folder, Cluster(Path(folder) / "c", nodes=nodes) as running:
        yield running


def done(cluster: Cluster, job: str) -> bool:
    return not cluster.run("squeue", "-h", "-j", job, check=False)


def test_a_run_is_stopped_before_its_time_limit_requeued_and_ends_as_without(
    cluster: Cluster, tmp_path: Path, tokenizer_file: Path, corpus_prefix: str
) -> None:
    """The first start evaluates so much that its minute is too short; without that the second one is done soon."""
    saved, log, iterations = tmp_path / "out", tmp_path / "job.out", 100

    def configure(name: str, **keys: object) -> Path:
        keys = {"train_iters": iterations, "master_addr": "127.0.0.1", "eval_interval": 1, **keys}
        return write_config(tmp_path / name, tokenizer_file, corpus_prefix, **keys)

    config = configure("run.yml", eval_iters=400)
    places = ["--nodes=2", "--ntasks-per-node=1"]
    limit = ["--time=1", "--signal=B:USR1@50", f"--output={log}"]
    cluster.environment |= {
        "PYTHON": sys.executable,
        "CHECKPOINTS": str(saved),
        "OMP_NUM_THREADS": "1",
        "MASTER_ADDR": "127.0.0.1",
    }
    job = cluster.run("sbatch", "--parsable", *places, *limit, str(SCRIPT), str(config), cwd=ROOT)

    assert wait_until(lambda: (saved / "latest").exists() or done(cluster, job), 60), cluster.logs()
    configure("run.yml")
    # While the job waits to start again, srun without deepy.py makes the run it is compared with.
    plain = configure("plain.yml", log_dir=str(tmp_path / "plain"))
    cluster.run("srun", *places, sys.executable, "train.py", str(plain), cwd=ROOT)
    assert wait_until(lambda: done(cluster, job), 120), f"{log.read_text()}{cluster.logs()}"
    output = log.read_text()
    stopped = re.search(rf"job {job}: stopped before train_iters {iterations} \(exit code (\d+)\), requeued", output)
    assert stopped and f"job {job}, start 2" in output, output
    # On a busy machine its time is over before the first iteration; then there is nothing to resume.
    assert "resumed from" in output or int(stopped[1]) > 128, output
    found, expected = training_lines(saved), training_lines(tmp_path / "plain")
    assert [line["iteration"] for line in found] == [*range(1, iterations + 1)]
    assert [line["consumed_samples"] for line in expected] == [8 * n for n in range(1, iterations + 1)]
    assert [line["lm_loss"] for line in found] == [line["lm_loss"] for line in expected]
    assert "ExitCode=0:0" in cluster.run("scontrol", "show", "job", job)


def trained(config: RunConfig) -> None:
    train(config)


@pytest.mark.processes
@pytest.mark.parametrize("cluster", [3], indirect=True)
def test_a_run_whose_node_fails_twice_ends_on_others_as_without(
    cluster: Cluster,
    tmp_path: Path,
    tiny_config: Callable[..., RunConfig],
    tokenizer_file: Path,
    corpus_prefix: str,
) -> None:
    """Of two processes the one on node2 is killed, as one there was in an earlier job of the run."""
    site, saved, log = tmp_path / "site", tmp_path / "out", tmp_path / "job.out"
    site.mkdir()
    (site / "deepy.py").symlink_to(ROOT / "deepy.py")
    write_struck_script(site / "train.py", [7], "node2")
    record_failure(saved, Failure("node2", 1, "an earlier job's", 0, exit_code=137, progress=True, job="1"))
    keys = {"train_iters": 12, "checkpoint_factor": 5, "async_save": False, "master_addr": "127.0.0.1", "eval_iters": 0}
    config = write_config(tmp_path / "run.yml", tokenizer_file, corpus_prefix, **keys)
    cluster.environment |= {
        "PYTHON": sys.executable,
        "CHECKPOINTS": str(saved),
        "CONF_DIR": str(tmp_path),
        "OMP_NUM_THREADS": "1",
        "MASTER_ADDR": "127.0.0.1",
    }
    places = ["--nodes=2", "--ntasks-per-node=1", f"--output={log}"]
    command = ["sbatch", "--parsable", *places, str(SCRIPT), str(config), "--max_restarts", "4"]
    job = cluster.run(*command, cwd=site)
    run_ranks(2, trained, tiny_config(**keys, save=str(tmp_path / "plain")))
    ended = wait_until(lambda: done(cluster, job), 200)
    output = f"{log.read_text() if log.exists() else ''}{cluster.logs()}"
    assert ended, output
    for words in (
        "; restart 1 of 4 from global_step5, by requeueing the job",
        "nodes that failed twice are left out: node2", f"job {job}, start 2 on node[1,3]: ",
        f"resumed from {saved / 'global_step5'} at iteration 5, restart 2 of this run",
    ):  # fmt: skip
        assert words in output, output
    assert training_lines(saved) == [
        {**line, **{key: seen[key] for key in ("tokens_per_second", "memory_gib")}}
        for line, seen in zip(training_lines(tmp_path / "plain"), training_lines(saved), strict=True)
    ]
    assert_equal(tensors(saved), tensors(tmp_path / "plain"))
    assert CheckpointReader(saved / "global_step12").train_state["restarts"] == 2
    state = cluster.run("scontrol", "show", "job", job)
    failure = read_failures(saved)[-1]
    assert (failure.node, failure.rank, failure.job) == ("node2", 1, job) and "killed" in failure.reason
    assert "ExitCode=0:0" in state and "ExcNodeList=node2" in state
