"""The nodes and processes of a launch: hostfile, Slurm allocation, or this machine; include and exclude."""

from __future__ import annotations

import glob
import ipaddress
import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass

from megatron.config.hostfile import found_hostfile, not_a_host, refuse_missing_hostfile
from megatron.config.sections.launch import LaunchConfig
from megatron.errors import ConfigError, UserError
from megatron.files import read_text
from megatron.mpu.environment import has_accelerator

_HOST_NAME = re.compile(r"(?:[\w.-]+@)?[A-Za-z0-9_](?:[\w.-]*\w)?")


@dataclass(frozen=True)
class SlotFilter:
    """What include or exclude leaves of the hosts; one that neither is given for leaves everything."""

    key: str
    """include or exclude."""
    hosts: dict[str, set[int]]
    """The slots that it names of each host; none mean the whole host."""

    @classmethod
    def of(cls, config: LaunchConfig) -> SlotFilter:
        """The filter of a configuration; raises ConfigError for one that cannot be read or goes with no other key."""
        if config.include and config.exclude:
            raise ConfigError("include", "give one of them", spelling="include, exclude", beside=["exclude"])
        key, text = ("exclude", config.exclude) if config.exclude else ("include", config.include or "")
        if text and (config.num_gpus or config.num_nodes > 0):
            other = "num_gpus" if config.num_gpus else "num_nodes"
            raise ConfigError(key, f"cannot be combined with {other}", "give one", beside=[other])
        hosts: dict[str, set[int]] = {}
        for item in filter(None, text.split("@")):
            match = re.fullmatch(r"([^:]+)(?::(\d+(?:,\d+)*))?", item)
            if match is None:
                raise ConfigError(key, "expected `name` or `name:0,1`, joined by @", value=item)
            hosts.setdefault(match[1], set()).update(int(slot) for slot in (match[2] or "").split(",") if slot)
        return cls(key, hosts)

    def left(self, host: str, slots: int) -> int:
        """How many of a host's slots are left."""
        if not self.hosts:
            return slots
        named = len(self.hosts.get(host, ())) or slots
        if self.key == "include":
            return named if host in self.hosts else 0
        return slots - named if host in self.hosts else slots


def find_hosts(config: LaunchConfig, env: Mapping[str, str]) -> dict[str, int]:
    """{node: slots} of the hostfile or the Slurm allocation, less those left out; empty means this machine."""
    refuse_missing_hostfile(config, env)
    path, chosen = found_hostfile(config, env), SlotFilter.of(config)
    if path is None and not config.deepspeed_slurm:
        for name in (name for name in chosen.hosts if name != "localhost"):
            raise not_a_host(chosen.key, name)
        return {}
    hosts = read_hostfile(path) if path else slurm_hosts(config, env)
    for name, slots in chosen.hosts.items():
        if name not in hosts:
            known = f"{path or 'the allocation'} ({', '.join(hosts)})"
            raise ConfigError(chosen.key, f"host '{name}' is not in {known}")
        if slots and max(slots) >= hosts[name]:
            raise ConfigError(chosen.key, f"host '{name}' has the slots 0 to {hosts[name] - 1}, not {max(slots)}")
    left = {name: size for name, size in hosts.items() if chosen.left(name, size)}
    if not left:
        raise ConfigError(chosen.key, "it leaves no host to run on", "change it")
    return dict(list(left.items())[: config.num_nodes]) if config.num_nodes > 0 else left


def count_processes(config: LaunchConfig, hosts: Mapping[str, int], env: Mapping[str, str]) -> int | None:
    """Number of workers on `hosts`, those of find_hosts (none: this machine). None: only DeepSpeed can know."""
    if config.num_gpus:
        return config.num_gpus * max(1, len(hosts))
    chosen = SlotFilter.of(config)
    if hosts:
        return sum(chosen.left(name, slots) for name, slots in hosts.items())
    if not has_accelerator(env):
        return None if chosen.hosts else 1
    devices = count_devices(env)
    return chosen.left("localhost", devices) if devices else None


def count_devices(env: Mapping[str, str]) -> int | None:
    """Number of NVIDIA GPUs this process may use; None where another maker's devices cannot be told apart."""
    files = glob.glob("/dev/nvidia[0-9]*")
    visible = env.get("CUDA_VISIBLE_DEVICES")
    if not files or visible is None:
        return len(files) or None
    return len([device for device in visible.split(",") if device.strip()]) or None


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
    """{node: processes} of the Slurm allocation this process is in; raises ConfigError outside of one."""
    nodes = env.get("SLURM_JOB_NODELIST")
    if not nodes:
        reason = "true, but this is not inside a Slurm allocation (SLURM_JOB_NODELIST is not set)"
        advice = "start deepy.py with sbatch or salloc, or set deepspeed_slurm: false"
        raise ConfigError("deepspeed_slurm", reason, advice)
    tasks = re.match(r"\d+", env.get("SLURM_NTASKS_PER_NODE") or env.get("SLURM_GPUS_ON_NODE") or "1")
    slots = config.num_gpus or int(tasks[0] if tasks else 1)
    try:
        names = subprocess.run(
            ["scontrol", "show", "hostnames", nodes], check=True, capture_output=True, text=True
        ).stdout.split()
    except (OSError, subprocess.CalledProcessError) as error:
        raise ConfigError("deepspeed_slurm", f"`scontrol show hostnames {nodes}` failed: {error}") from None
    return dict.fromkeys(names, slots)


def write_hostfile(hosts: Mapping[str, int]) -> str:
    """The name of a new file with these nodes and slots."""
    with tempfile.NamedTemporaryFile("w", prefix="hostfile_", delete=False) as file:
        file.writelines(f"{name} slots={slots}\n" for name, slots in hosts.items())
    return file.name
