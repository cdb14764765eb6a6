"""Where a launch finds its nodes, in a hostfile or a Slurm allocation, and ports for their processes to meet at."""

from __future__ import annotations

import ipaddress
import random
import re
import socket
import subprocess
import tempfile
import zlib
from collections.abc import Mapping
from contextlib import suppress

from megatron.config.sections.launch import LaunchConfig
from megatron.errors import UserError
from megatron.files import read_text

DEFAULT_PORT = 29500
_UNUSED_PORTS = range(20000, 32768)  # below those that Linux gives to outgoing connections
_HOST_NAME = re.compile(r"(?:[\w.-]+@)?[A-Za-z0-9_](?:[\w.-]*\w)?")


def read_hostfile(path: str) -> dict[str, int]:
    """{node: slots} of a DeepSpeed hostfile; raises UserError with the line of a mistake."""
    lines = read_text(path, "hostfile", "give an existing file").splitlines()
    hosts: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        text = line.partition("#")[0].strip()
        match = re.fullmatch(r"(\S+)\s+slots=(\d+)", text)
        if text and match is None:
            raise UserError(f"{path}:{number}: expected `name slots=8`, got '{text}'")
        if match is not None:
            _check_host(match[1], f"{path}:{number}")
            if match[1] in hosts:
                raise UserError(f"{path}:{number}: host '{match[1]}' is given twice; keep one line")
            hosts[match[1]] = int(match[2])
    if not hosts:
        raise UserError(f"{path}: no hosts in it; add lines `name slots=8`")
    return hosts


def _check_host(name: str, where: str) -> None:
    """Raise UserError unless `name` can only be a host's: pdsh reads `^file`, `-name` and `[1-3]`, shells read more."""
    try:
        ipaddress.ip_address(name)
    except ValueError:
        if not _HOST_NAME.fullmatch(name):
            raise UserError(f"{where}: '{name}' is no host name; give letters, digits, '.', '-' and '_'") from None


def slurm_hosts(config: LaunchConfig, env: Mapping[str, str]) -> dict[str, int]:
    """{node: processes} of the Slurm allocation this process is in; raises UserError outside of one."""
    nodes = env.get("SLURM_JOB_NODELIST")
    if not nodes:
        raise UserError(
            "deepspeed_slurm: true, but this is not inside a Slurm allocation (SLURM_JOB_NODELIST is not set); "
            "start deepy.py with sbatch or salloc, or set deepspeed_slurm: false"
        )
    tasks = re.match(r"\d+", env.get("SLURM_NTASKS_PER_NODE") or env.get("SLURM_GPUS_ON_NODE") or "1")
    slots = config.num_gpus or int(tasks[0] if tasks else 1)
    try:
        names = subprocess.run(
            ["scontrol", "show", "hostnames", nodes], check=True, capture_output=True, text=True
        ).stdout.split()
    except (OSError, subprocess.CalledProcessError) as error:
        raise UserError(f"deepspeed_slurm: `scontrol show hostnames {nodes}` failed: {error}") from None
    return dict.fromkeys(names, slots)


def write_hostfile(hosts: Mapping[str, int]) -> str:
    """The name of a new file with these nodes and slots."""
    with tempfile.NamedTemporaryFile("w", prefix="hostfile_", delete=False) as file:
        file.writelines(f"{name} slots={slots}\n" for name, slots in hosts.items())
    return file.name


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
