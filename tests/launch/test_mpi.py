"""OpenMPI starts the processes, itself or through deepy.py."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from megatron.mpu.environment import free_port
from tests.launched import ROOT, deepy, environment, training_lines, wait_until, write_config

pytestmark = pytest.mark.skipif(
    not (shutil.which("mpirun") and shutil.which("ompi_info")), reason="OpenMPI (mpirun, ompi_info) is not installed"
)
AS_ROOT = ["--allow-run-as-root"] if os.getuid() == 0 else []


@pytest.mark.launches
def test_plain_mpirun_trains_on_two_processes(tmp_path: Path, tokenizer_file: Path, corpus_prefix: str) -> None:
    config = write_config(tmp_path / "run.yml", tokenizer_file, corpus_prefix, train_iters=2, log_dir=str(tmp_path))
    command = ["mpirun", *AS_ROOT, "--oversubscribe", "-np", "2", sys.executable, "train.py", str(config)]
    result = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stdout + result.stderr
    assert [line["consumed_samples"] for line in training_lines(tmp_path)] == [8, 16], "4 samples a process"


@pytest.mark.launches
def test_a_run_of_launcher_openmpi_saves_when_deepy_is_stopped(
    tmp_path: Path, tokenizer_file: Path, corpus_prefix: str
) -> None:
    (tmp_path / "hosts").write_text("localhost slots=2\n")
    options = {
        "launcher": "openmpi",
        "force_multi": True,
        "hostfile": str(tmp_path / "hosts"),
        "no_ssh_check": True,
        "launcher_args": " ".join([*AS_ROOT, "--oversubscribe", "--mca btl_tcp_if_include lo"]),
        "master_port": free_port(),
        "train_iters": 1000000,
        "save": str(tmp_path / "out"),
    }
    config = write_config(tmp_path / "run.yml", tokenizer_file, corpus_prefix, **options)
    with subprocess.Popen(
        deepy(config), cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        started = wait_until(lambda: training_lines(tmp_path / "out") or process.poll() is not None, 90)
        process.send_signal(signal.SIGTERM)
        output = process.communicate(timeout=60)[0]
    assert started and process.returncode == 0, output
    last = training_lines(tmp_path / "out")[-1]
    assert (tmp_path / "out" / "latest").read_text().strip() == f"global_step{last['iteration']}"
    assert last["consumed_samples"] == 8 * last["iteration"]
