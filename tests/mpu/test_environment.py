"""What a process learns of itself from what started it: ranks, the first node, ports, the launcher's life."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

import pytest

from megatron.errors import UserError
from megatron.mpu.environment import ensure_process_environment, job_port
from tests.launched import ROOT


@pytest.fixture(autouse=True)
def _machine_without_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron.mpu.environment._DEVICE_FILES", ())


def test_jobs_on_the_same_nodes_get_ports_of_their_own() -> None:
    ports = {job_port({"SLURM_JOB_ID": str(job)}) for job in range(20)}
    assert len(ports) == 20 and all(10000 <= port < 30000 for port in ports)
    assert job_port({}) == 29500


@pytest.mark.launches
def test_a_worker_stops_when_its_launcher_is_gone() -> None:
    code = (
        "import os, sys, time, socket; from megatron.mpu.environment import stop_with_launcher; "
        "stop_with_launcher({'DEEPY_LAUNCHER_PID': sys.argv[1], 'DEEPY_LAUNCHER_HOST': socket.gethostname()}, 0.05); "
        "print('ready', flush=True); time.sleep(60)"
    )
    launcher = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    worker = subprocess.Popen([sys.executable, "-c", code, str(launcher.pid)], stdout=subprocess.PIPE, cwd=ROOT)
    assert worker.stdout is not None and worker.stdout.readline() == b"ready\n"
    time.sleep(0.3)
    assert worker.poll() is None
    launcher.kill()
    launcher.wait()
    assert worker.wait(10) == -signal.SIGTERM


def test_a_plain_process_becomes_a_world_of_one() -> None:
    env: dict[str, str] = {}
    ensure_process_environment(env)
    assert 0 < int(env.pop("MASTER_PORT")) < 65536
    env.pop("OMP_WAIT_POLICY", None)  # set where there is no accelerator
    assert env == {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}


def test_a_launchers_variables_stay() -> None:
    env = {
        "RANK": "3",
        "LOCAL_RANK": "1",
        "WORLD_SIZE": "4",
        "MASTER_ADDR": "a",
        "MASTER_PORT": "1",
        "SLURM_PROCID": "0",
        "OMP_WAIT_POLICY": "active",
    }
    before = dict(env)
    ensure_process_environment(env)
    assert env == before


def test_srun_and_mpirun_variables_are_mapped() -> None:
    env = {"SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_NTASKS": "4", "SLURM_STEP_NODELIST": "node[1-2]"}
    ensure_process_environment(env)
    found = [env[name] for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")]
    assert found == ["3", "1", "4", "node1", "29500"]
    env = {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_LOCAL_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2"}
    ensure_process_environment(env)
    assert [env[name] for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE")] == ["1", "1", "2"]


def test_mpirun_over_several_nodes_has_to_be_told_the_first_one() -> None:
    env = {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}
    with pytest.raises(UserError, match="mpirun -x MASTER_ADDR=NODE"):
        ensure_process_environment(dict(env))
    env["MASTER_ADDR"] = "node1"
    ensure_process_environment(env)
    assert env["MASTER_ADDR"] == "node1"


def test_a_slurm_batch_script_is_a_plain_process() -> None:
    env = {"SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "8"}
    ensure_process_environment(env)
    assert env["WORLD_SIZE"] == "1"
