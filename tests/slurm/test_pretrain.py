"""tools/slurm/pretrain.sbatch: its decisions with stand-ins, and a whole story on a real Slurm."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.launched import ROOT, environment, training_lines, wait_until, write_config
from tests.slurm.cluster import Cluster, missing_programs

SCRIPT = ROOT / "tools/slurm/pretrain.sbatch"

# ---- what the script decides, without Slurm ----

RUN = """\
#!/bin/bash
case " $* " in *" --explain "*) cat "$SETTINGS"; exit ;; esac
trap 'sleep 0.3; exit "$CODE_AFTER_SIGNAL"' USR1 TERM
echo "args: $*" > "$STARTED.new"; mv "$STARTED.new" "$STARTED"
[ "$WAIT" = 1 ] || exit "$CODE"
while :; do sleep 0.05; done
"""


class StandIn:
    """The script with a stand-in for Python and for scontrol."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name, text in {"run": RUN, "scontrol": '#!/bin/bash\necho "scontrol $*"\n'}.items():
            (folder / name).write_text(text)
            (folder / name).chmod(0o755)
        self.settings('"runs/a"', '"runs/a"')

    def settings(self, save: str, load: str) -> None:
        text = f"checkpoint:\n  save     {save}   a.yml:1\n  load     {load}   a.yml:2\n"
        (self.folder / "settings").write_text(text)

    def start(self, code: int = 0, code_after_signal: int = 0, wait: bool = False) -> subprocess.Popen[str]:
        path = f"{self.folder}{os.pathsep}{os.environ['PATH']}"
        variables = {"PYTHON": str(self.folder / "run"), "STARTED": str(self.folder / "started"), "PATH": path}
        variables |= {"CODE": str(code), "CODE_AFTER_SIGNAL": str(code_after_signal), "WAIT": str(int(wait))}
        variables |= {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n1", "SETTINGS": str(self.folder / "settings")}
        return subprocess.Popen(
            ["bash", str(SCRIPT), "a.yml", "--set", "seed=3"],
            cwd=ROOT, env=environment(**variables), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip

    def signalled(self, number: int, code_after_signal: int) -> tuple[int, str]:
        with self.start(code_after_signal=code_after_signal, wait=True) as process:
            assert wait_until((self.folder / "started").exists, 20)
            process.send_signal(number)
            output = process.communicate(timeout=20)[0]
        return process.returncode, output


@pytest.fixture
def script(tmp_path: Path) -> StandIn:
    return StandIn(tmp_path)


@pytest.mark.parametrize("code", [0, 1, 2, 137])
def test_a_run_that_ends_by_itself_is_not_requeued(script: StandIn, code: int) -> None:
    with script.start(code) as process:
        output = process.communicate(timeout=20)[0]
    assert process.returncode == code
    assert "scontrol" not in output
    arguments = (script.folder / "started").read_text().strip()
    assert arguments == "args: deepy.py train.py -d configs a.yml --set seed=3 --set deepspeed_slurm=true"


@pytest.mark.parametrize("code", [0, 138, 143])
def test_a_run_stopped_at_the_time_limit_is_requeued(script: StandIn, code: int) -> None:
    returned, output = script.signalled(signal.SIGUSR1, code)
    assert returned == 0 and "scontrol requeue 7" in output


@pytest.mark.parametrize("code", [1, 2])
def test_a_run_that_fails_to_save_is_not_requeued(script: StandIn, code: int) -> None:
    returned, output = script.signalled(signal.SIGUSR1, code)
    assert returned == code and "scontrol" not in output


def test_a_cancelled_job_stops_and_is_not_requeued(script: StandIn) -> None:
    returned, output = script.signalled(signal.SIGTERM, 0)
    assert returned == 0 and "scontrol" not in output


@pytest.mark.parametrize(
    ("save", "load", "message"),
    [("null", "null", "save: not set"), ('"runs/a"', "null", "load: has to be"), ('"a"', '"b"', "load: has to be")],
)
def test_a_run_that_could_not_resume_is_refused(script: StandIn, save: str, load: str, message: str) -> None:
    script.settings(save, load)
    with script.start() as process:
        output = process.communicate(timeout=20)[0]
    assert process.returncode == 2 and output.count("\n") == 1 and f"error: {message}" in output
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
    assert f"job {job}: stopped by a signal (exit code 0), requeued" in output and f"job {job}, start 2" in output
    assert "resumed from" in output, output
    found, expected = training_lines(saved), training_lines(tmp_path / "plain")
    assert [line["iteration"] for line in found] == [*range(1, iterations + 1)]
    assert [line["consumed_samples"] for line in expected] == [8 * n for n in range(1, iterations + 1)]
    assert [line["lm_loss"] for line in found] == [line["lm_loss"] for line in expected]
    assert "ExitCode=0:0" in cluster.run("scontrol", "show", "job", job)
