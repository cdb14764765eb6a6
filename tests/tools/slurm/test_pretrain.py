"""tools/slurm/pretrain.sbatch: its decisions with stand-ins, and a whole story on a real Slurm."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.launched import ROOT, environment, training_lines, wait_until, write_config
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
    assert arguments == "args: deepy.py train.py -d configs a.yml --set seed=3 --set deepspeed_slurm=true"


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
def cluster() -> Iterator[Cluster]:
    if missing_programs():
        pytest.skip(f"Slurm is not installed: {', '.join(missing_programs())} not found")
    with tempfile.TemporaryDirectory(prefix="slurm") as folder, Cluster(Path(folder) / "c") as running:
        yield running


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

    def done() -> bool:
        return not cluster.run("squeue", "-h", "-j", job, check=False)

    assert wait_until(lambda: (saved / "latest").exists() or done(), 60), cluster.logs()
    configure("run.yml")
    # While the job waits to start again, srun without deepy.py makes the run it is compared with.
    plain = configure("plain.yml", log_dir=str(tmp_path / "plain"))
    cluster.run("srun", *places, sys.executable, "train.py", str(plain), cwd=ROOT)
    assert wait_until(done, 120), f"{log.read_text()}{cluster.logs()}"
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
