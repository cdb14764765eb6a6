"""The command of DeepSpeed's launcher for a configuration.

One node: DeepSpeed starts a worker per device here. Several nodes (a hostfile with more than one, force_multi, or
deepspeed_slurm inside a Slurm allocation): DeepSpeed's pdsh, openmpi, mvapich or slurm launcher does.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron.config.cli import is_training
from megatron.config.hostfile import CLUSTER_HOSTFILE, found_hostfile, given_hostfile
from megatron.config.load import Resolved
from megatron.config.schema import RunConfig
from megatron.config.sections.launch import LaunchConfig
from megatron.errors import ConfigError, UserError
from megatron.launch.hosts import SlotFilter, count_processes, find_hosts, write_hostfile
from megatron.launch.supervise import WORKER, LauncherCall
from megatron.mpu.environment import free_port, has_accelerator, job_port
from megatron.mpu.layout import Layout

_RUNNER = (sys.executable, "-m", "deepspeed.launcher.runner", "--no_local_rank", "--log_level", "critical")
_EXPORTED = ("MLFLOW", "PYTHON", "MV2", "UCX", "NCCL")  # what DeepSpeed sends to other nodes
_LAUNCHER_PROGRAMS = {"pdsh": "pdsh", "openmpi": "ompi_info", "mvapich": "mpiname", "slurm": "sinfo"}


def make_call(
    resolved: Resolved, script: str, arguments: list[str], environment: Mapping[str, str], to_run: bool = True
) -> LauncherCall:
    """The launcher command that runs `script arguments` as the launch keys of the config say.

    Raises: UserError when it cannot, or when a program that it needs is not installed and it is `to_run`.
    """
    config, env = resolved.config.launch, dict(environment)
    hosts = find_hosts(config, env)
    check_world(resolved.config, script, count_processes(config, hosts, env))
    work = [script, *arguments]
    # Two runs started together would both find the default port free: only a port that was asked for is kept.
    port = config.master_port if "master_port" in resolved.settings else None
    if len(hosts) > 1 or config.force_multi or config.deepspeed_slurm:
        return _multi_node_call(config, hosts, work, env, port, to_run)
    options = _local_options(config, hosts, env, port or free_port())
    return LauncherCall([*_RUNNER, *options, WORKER, *work], env, signal_depth=2)


def _multi_node_call(
    config: LaunchConfig, hosts: Mapping[str, int], work: list[str], env: dict[str, str], port: int | None, to_run: bool
) -> LauncherCall:
    launcher = "slurm" if config.deepspeed_slurm else config.launcher
    _check_multi_node(config, launcher, hosts, env)
    program = _LAUNCHER_PROGRAMS[launcher]
    if to_run and shutil.which(program) is None:
        reason = f"{launcher} needs the program `{program}`, which is not on PATH"
        raise ConfigError("launcher", reason, "install it")
    env["MASTER_ADDR"] = config.master_addr or env.get("MASTER_ADDR") or next(iter(hosts))
    env["MASTER_PORT"] = str(port or job_port(env))
    given = found_hostfile(config, env)
    file = given or write_hostfile(hosts)
    written = None if given else file
    command = [*_RUNNER, "--hostfile", file, "--launcher", launcher, *_multi_node_options(config, launcher, hosts, env)]
    if launcher == "pdsh":
        targets = list(hosts)[:1] if is_training(work[0]) else list(hosts)
        stop, kill = _pdsh_signal(config, targets, work, "TERM"), _pdsh_signal(config, list(hosts), work, "KILL")
        remote = [*command, *_remote_words(work)]
        return LauncherCall(remote, env, stop_command=stop, kill_command=kill, written=written, hosts=hosts)
    return LauncherCall([*command, *work], env, 1, stop_signal=signal.SIGUSR1, written=written, hosts=hosts)


def check_world(config: RunConfig, script: str, processes: int | None) -> None:
    """Raise UserError when the layout or the batch does not fit the number of processes, where that is known.

    Evaluation and generation load a model at one pipeline stage and read no batch keys.
    """
    if processes is None:
        return
    training, tensor_size = is_training(script), config.parallel.model_parallel_size
    stages = config.parallel.pipeline_stages if training else 1
    if Path(script).name == "generate.py":
        processes -= processes % tensor_size if processes > tensor_size else 0  # one copy of the model is enough
    try:
        layout = Layout.for_world(0, processes, stages, tensor_size)
    except ValueError as error:
        raise UserError(str(error)) from None
    if training:
        config.update_size(layout.data.size)


def _local_options(config: LaunchConfig, hosts: Mapping[str, int], env: dict[str, str], port: int) -> list[str]:
    """Options of a launch here; `env` learns that there is no accelerator, which DeepSpeed takes long to find out."""
    if config.num_nodes > 1:
        raise ConfigError("num_nodes", f"{config.num_nodes} nodes need a hostfile", "give --hostfile FILE")
    options = ["--hostfile", given_hostfile(config, env) or CLUSTER_HOSTFILE]
    if not has_accelerator(env):
        env.setdefault("DS_ACCELERATOR", "cpu")
    if hosts or config.include or config.exclude:
        options += _filter_options(config)
    elif config.num_gpus or env.get("DS_ACCELERATOR") == "cpu":
        options += ["--num_gpus", str(config.num_gpus or 1)]
    options += ["--master_port", str(port)]
    return options + (["--no_ssh_check", "--master_addr", config.master_addr or "127.0.0.1"] if hosts else [])


def _multi_node_options(
    config: LaunchConfig, launcher: str, hosts: Mapping[str, int], env: Mapping[str, str]
) -> list[str]:
    options = ["--force_multi", "--master_addr", env["MASTER_ADDR"], "--master_port", env["MASTER_PORT"]]
    options += ["--no_ssh_check"] if config.no_ssh_check or launcher == "slurm" else []
    extra = _launcher_arguments(config, launcher, hosts)
    return options + _filter_options(config) + ([f"--launcher_args={extra}"] if extra else [])


def _check_multi_node(config: LaunchConfig, launcher: str, hosts: Mapping[str, int], env: Mapping[str, str]) -> None:
    """Raise UserError for what DeepSpeed's multi-node launchers would refuse with a traceback."""
    if not hosts:
        advice = "give --hostfile FILE (`name slots=8` a line) or set it to false"
        raise ConfigError("force_multi", "needs a hostfile", advice)
    if launcher == "local":
        advice = "use pdsh, openmpi, mvapich or slurm"
        raise ConfigError("launcher", f"local cannot start {len(hosts)} nodes", advice)
    if launcher in ("openmpi", "mvapich"):
        for key in ("include", "exclude", "num_gpus", "num_nodes"):
            if getattr(config, key) not in (None, "", -1):
                advice = "write a hostfile with just these slots"
                raise ConfigError(key, f"launcher {launcher} cannot do this", advice)
    if launcher == "slurm":
        chosen = SlotFilter.of(config)
        if any(chosen.hosts.values()):
            raise ConfigError(chosen.key, "launcher slurm cannot pick slots", "name whole nodes, or use pdsh")
        if len(set(hosts.values())) > 1 and not config.num_gpus:
            reason = f"launcher slurm needs as many slots on every node, not {dict(hosts)}"
            raise ConfigError("hostfile", reason)
    if launcher == "pdsh":
        _check_remote_shell(config, hosts, env)


def _check_remote_shell(config: LaunchConfig, hosts: Mapping[str, int], env: Mapping[str, str]) -> None:
    """Raise UserError for words that DeepSpeed puts into a remote shell's line as they are, where one would be read."""
    words = {"hostfile: host": ",".join(hosts), "working folder": os.getcwd(), "interpreter": sys.executable}
    words["MASTER_ADDR"] = config.master_addr or env.get("MASTER_ADDR", "")
    words |= {name: value for name, value in env.items() if name.startswith(_EXPORTED)}
    for what, word in words.items():
        if found := re.search(r"[^\w@%+=:,./^-]", word):
            raise UserError(
                f"{what} '{word}': launcher pdsh would have a remote shell read its {found[0]!r}; choose another name, "
                "or another launcher"
            )


def _filter_options(config: LaunchConfig) -> list[str]:
    options = ["--include", config.include] if config.include else []
    options += ["--exclude", config.exclude] if config.exclude else []
    if config.num_nodes > 0:
        options += ["--num_nodes", str(config.num_nodes)]
    if config.num_gpus:
        options += ["--num_gpus", str(config.num_gpus)]
    return options


def _launcher_arguments(config: LaunchConfig, launcher: str, hosts: Mapping[str, int]) -> str:
    words: list[str] = []
    if launcher == "slurm":
        # Without --ntasks-per-node srun may place ranks unevenly.
        words += [f"--nodes={len(hosts)}", f"--ntasks-per-node={config.num_gpus or max(hosts.values())}"]
        words += ["--kill-on-bad-exit=1"]  # else the other ranks wait for one that has failed
        words += [f"--comment={config.comment}"] if config.comment else []
        words += [f"--account={config.account}"] if config.account else []
    elif launcher == "openmpi":
        words += ["-x", "MASTER_ADDR", "-x", "MASTER_PORT"]
    return " ".join(part for part in (shlex.join(words), config.launcher_args) if part)


def _pdsh_signal(config: LaunchConfig, targets: Sequence[str], work: Sequence[str], name: str) -> list[str]:
    """The command that sends a signal to the workers of `work`: sshd, not the launcher, is their ancestor.

    DeepSpeed's own way of stopping gives them no time to save. The pattern goes from the interpreter to the last
    argument, so that it meets neither DeepSpeed's launcher nor the remote shell. Training stops everywhere when one
    rank is asked to.
    """
    pattern = "^" + re.escape(" ".join([sys.executable, "-u", *work])) + "$"
    remote = shlex.join(["pkill", f"-{name}", "-f", "--", pattern])
    return ["pdsh", "-R", "ssh", "-w", ",".join(targets), *shlex.split(config.launcher_args), remote]


def _remote_words(work: Sequence[str]) -> list[str]:
    """Arguments as DeepSpeed's pdsh launcher has to be given them: a shell reads them on the other side.

    DeepSpeed puts those with a space between double quotes, and escapes no more than double quotes in them.
    """
    return [re.sub(r"([\\$`])", r"\\\1", word) if " " in word else shlex.quote(word) for word in work]
