"""A process and what started it: its rank, the first node, ports, and whether the launcher still lives.

Reads the environment and /dev only, no library, so that it takes no time.
"""

from __future__ import annotations

import glob
import os
import random
import re
import signal
import socket
import threading
import time
import zlib
from collections.abc import Mapping, MutableMapping
from contextlib import suppress
from pathlib import Path

from megatron.errors import UserError
from megatron.signals import has_launcher

DEFAULT_PORT = 29500
LAUNCHER_PID, LAUNCHER_HOST = "DEEPY_LAUNCHER_PID", "DEEPY_LAUNCHER_HOST"
"""Variables by which deepy.py tells its workers who it is."""

_UNUSED_PORTS = range(20000, 32768)  # below those that Linux gives to outgoing connections
_DEVICE_FILES = ("/dev/nvidia[0-9]*", "/dev/kfd", "/dev/dxg", "/dev/davinci[0-9]*", "/dev/accel/*")
_RANK_SOURCES = (
    ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NTASKS"),
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_SIZE"),
    ("MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_SIZE"),
)


def ensure_process_environment(env: MutableMapping[str, str] = os.environ) -> None:
    """Set RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT where the launcher did not.

    They come from srun's or mpirun's variables; a plain `python train.py` becomes a single process. Without all
    five, DeepSpeed asks for mpi4py. The batch script of a Slurm job counts as a plain shell.
    """
    if "RANK" not in env:
        for rank, local_rank, world_size in _RANK_SOURCES:
            in_batch_script = rank == "SLURM_PROCID" and "SLURM_JOB_ID" in env and "SLURM_STEP_ID" not in env
            if rank in env and not in_batch_script:
                size = env.get("SLURM_STEP_NUM_TASKS") if rank == "SLURM_PROCID" else None
                env["RANK"], env["LOCAL_RANK"] = env[rank], env.get(local_rank, "0")
                env["WORLD_SIZE"] = size or env.get(world_size, "1")
                break
    if not has_accelerator(env):
        # Threads that spin while they wait cost a run on a shared machine most of its speed. Read when torch is loaded.
        env.setdefault("OMP_WAIT_POLICY", "passive")
    env.setdefault("RANK", "0")
    env.setdefault("LOCAL_RANK", "0")
    env.setdefault("WORLD_SIZE", "1")
    single = env["WORLD_SIZE"] == "1"
    if "MASTER_ADDR" not in env:
        env["MASTER_ADDR"] = "127.0.0.1" if single else _first_host(env)
    env.setdefault("MASTER_PORT", str(free_port() if single else job_port(env)))


def _first_host(env: Mapping[str, str]) -> str:
    """The first node of the Slurm job step, `node[1-2]` -> node1; this machine without Slurm."""
    nodes = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST") or ""
    match = re.match(r"([^\[,]+)(?:\[(\d+))?", nodes)
    if match:
        return match[1] + (match[2] or "")
    if env.get("OMPI_COMM_WORLD_LOCAL_SIZE", env["WORLD_SIZE"]) != env["WORLD_SIZE"]:
        raise UserError("MASTER_ADDR: mpirun does not tell the first node; give it with `mpirun -x MASTER_ADDR=NODE`")
    return "127.0.0.1"


def has_accelerator(env: Mapping[str, str]) -> bool:
    """Whether this machine shows a device file of an accelerator."""
    if env.get("CUDA_VISIBLE_DEVICES") == "" or env.get("DS_ACCELERATOR") == "cpu":
        return False
    return any(glob.glob(pattern) for pattern in _DEVICE_FILES)


def job_port(env: Mapping[str, str]) -> int:
    """A port that all processes of a Slurm job step or of one mpirun agree on, other for another job."""
    job = env.get("SLURM_JOB_ID") or env.get("PMIX_NAMESPACE")
    return 10000 + zlib.crc32(job.encode()) % 20000 if job else DEFAULT_PORT


def free_port() -> int:
    """A TCP port that is free on this machine now, and that no outgoing connection will be given meanwhile."""
    for port in random.SystemRandom().sample(_UNUSED_PORTS, 100):
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise UserError("master_port: 100 ports were tried and none is free; give one")


def stop_with_launcher(env: Mapping[str, str] = os.environ, interval: float = 2.0) -> None:
    """Send this worker SIGTERM, so that it saves and stops, once what started it is gone.

    That is the launcher that is its parent, as torchrun or mpirun, and a deepy.py on this machine. A killed one cannot
    forward anything; without this its workers would train on, unseen.
    """
    parent = os.getppid()
    launcher = env.get(LAUNCHER_PID, "") if env.get(LAUNCHER_HOST) == socket.gethostname() else ""
    deepy = Path(f"/proc/{launcher}") if launcher.isdecimal() and Path("/proc/self").exists() else None

    def watch() -> None:
        while os.getppid() == parent and (deepy is None or deepy.exists()):
            time.sleep(interval)
        os.kill(os.getpid(), signal.SIGTERM)

    if has_launcher(env):
        threading.Thread(target=watch, daemon=True, name="launcher-watch").start()
