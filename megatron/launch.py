"""What deepy.py does: a config becomes the command of DeepSpeed's launcher, run until its workers end.

One node: DeepSpeed starts a worker per device here. Several nodes (a hostfile with more than one, force_multi, or
deepspeed_slurm inside a Slurm allocation): DeepSpeed's pdsh, openmpi, mvapich or slurm launcher does.
"""

from __future__ import annotations

import glob
import os
import re
import shlex
import shutil
import signal
import sys
from argparse import Namespace
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import replace
from pathlib import Path

from megatron.config.cli import check_outputs, checks_of, parse_arguments, resolve_arguments, without_plan_flags
from megatron.config.explain import explain
from megatron.config.hostfile import given_hostfile, missing_hostfile, not_a_host, refuse_missing_hostfile
from megatron.config.hosts import free_port, job_port, read_hostfile, slurm_hosts, write_hostfile
from megatron.config.load import Resolved
from megatron.config.places import places_named
from megatron.config.schema import RunConfig
from megatron.config.sections.launch import LaunchConfig
from megatron.errors import UserError
from megatron.log import get_logger
from megatron.mpu.layout import Layout
from megatron.supervise import WORKER, LaunchPlan, run_plan

_DEVICE_FILES = ("/dev/nvidia[0-9]*", "/dev/kfd", "/dev/dxg", "/dev/davinci[0-9]*", "/dev/accel/*")
_CLUSTER_HOSTFILE = "/job/hostfile"
_EXPORTED = ("MLFLOW", "PYTHON", "MV2", "UCX", "NCCL")  # what DeepSpeed sends to other nodes
_LAUNCHER_PROGRAMS = {"pdsh": "pdsh", "openmpi": "ompi_info", "mvapich": "mpiname", "slurm": "sinfo"}
_RANK_SOURCES = (
    ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NTASKS"),
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_SIZE"),
    ("MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_SIZE"),
)


def launch(argv: Sequence[str], prog: str = "deepy.py") -> int:
    """Run `script yaml... flags` under DeepSpeed's launcher; the workers' exit code comes back.

    Every mistake in files, keys and flags raises UserError before a process is started.
    """
    args = parse_arguments(argv, prog, with_script=True)
    script = _check_script(args.script, prog)
    checks = () if args.explain else checks_of(script, to_run=not args.dry_run)
    resolved = resolve_arguments(args, f"{prog} {script}", checks)
    if args.explain:
        print(explain(resolved))
        return 0
    check_outputs(resolved, script)
    with places_named(resolved.settings):
        return _launch(resolved, args, script, list(argv))


def _launch(resolved: Resolved, args: Namespace, script: str, arguments: list[str]) -> int:
    arguments.remove(args.script)
    note = missing_hostfile(resolved.config.launch, os.environ)
    if args.dry_run:
        print(note or "", end="\n" if note else "")
        return _dry_run(resolved, script, without_plan_flags(arguments), args.gpus, args.machine)
    if note:
        get_logger().warning(note)
    return run_plan(make_plan(resolved, script, arguments, os.environ))


def _check_script(script: str | None, prog: str) -> str:
    if not script or not script.endswith(".py"):
        got = f", got '{script}'" if script else ""
        raise UserError(f"{prog}: the first argument is the script to run (train.py, eval.py or generate.py){got}")
    if not Path(script).is_file():
        raise UserError(f"{prog}: script '{script}' not found in {Path.cwd()}")
    return script


def _dry_run(resolved: Resolved, script: str, arguments: list[str], gpus: int | None, machine: str | None) -> int:
    """Print the launcher command, the processes it would start and a plan of layouts; start nothing."""
    from megatron.planner import DEFAULT_MACHINE, assumed_batch, find_machine, report  # needs torch

    cluster = find_machine(machine or DEFAULT_MACHINE)
    planned, assumption = assumed_batch(resolved.config)
    resolved = replace(resolved, config=planned)
    launch = planned.launch
    try:
        hosts = find_hosts(launch, os.environ)
    except UserError as error:
        gpus = gpus or (launch.num_gpus or cluster.gpus_per_node) * max(1, launch.num_nodes)
        print(f"command: none here: {error}\nnumber of GPUs: {gpus} (choose another with --gpus N)")
    else:
        gpus = _print_command(resolved, script, arguments, gpus, hosts)
    print(f"{assumption}{report(planned, cluster, gpus)}")
    return 0


def _print_command(
    resolved: Resolved, script: str, arguments: list[str], gpus: int | None, hosts: Mapping[str, int]
) -> int:
    """Print the launcher command and the processes it starts here; returns the number of GPUs to plan for."""
    from megatron.planner import Workload, world

    processes = count_processes(resolved.config.launch, hosts, os.environ) or 1
    try:
        grid = world(Workload.of(resolved.config).configured(processes), max(1, len(hosts)))
        plan = make_plan(resolved, script, arguments, os.environ, to_run=False)
    except UserError as error:
        if gpus is None:  # else this machine is not the one that is planned for
            raise
        print(f"command: none here: {error}")
    else:
        print(f"command: {shlex.join(plan.command)}\nworld: {grid}")
        if plan.written:
            Path(plan.written).unlink(missing_ok=True)
    return gpus or processes


# ---- the command ----


def make_plan(
    resolved: Resolved, script: str, arguments: list[str], environment: Mapping[str, str], to_run: bool = True
) -> LaunchPlan:
    """The launcher command that runs `script arguments` as the launch keys of the config say.

    Raises: UserError when it cannot, or when a program that it needs is not installed and it is `to_run`.
    """
    config = resolved.config.launch
    env = dict(environment)
    hosts = find_hosts(config, env)
    check_world(resolved.config, script, count_processes(config, hosts, env))
    runner = [sys.executable, "-m", "deepspeed.launcher.runner", "--no_local_rank", "--log_level", "critical"]
    work = [script, *arguments]
    if not (len(hosts) > 1 or config.force_multi or config.deepspeed_slurm):
        return LaunchPlan([*runner, *_local_options(resolved, hosts, env), WORKER, *work], env, signal_depth=2)
    launcher = "slurm" if config.deepspeed_slurm else config.launcher
    _check_multi_node(config, launcher, hosts, env)
    program = _LAUNCHER_PROGRAMS[launcher]
    if to_run and shutil.which(program) is None:
        raise UserError(f"launcher: {launcher} needs the program `{program}`, which is not on PATH; install it")
    given = _hostfile(config, env)
    file = given or write_hostfile(hosts)
    options = ["--hostfile", file, "--launcher", launcher, *_multi_node_options(resolved, launcher, hosts, env)]
    written = None if given else file
    if launcher == "pdsh":
        command = [*runner, *options, *_remote_words(work)]
        return LaunchPlan(command, env, stop_command=_pdsh_stop(config, hosts, work), written=written)
    return LaunchPlan([*runner, *options, *work], env, 1, stop_signal=signal.SIGUSR1, written=written)


def _is_training(script: str) -> bool:
    return script.rpartition("/")[2].startswith("train")


def check_world(config: RunConfig, script: str, processes: int | None) -> None:
    """Raise UserError when the layout or the batch does not fit the number of processes, where that is known.

    Evaluation and generation load a model at one pipeline stage and read no batch keys.
    """
    if processes is None:
        return
    training, tensor_size = _is_training(script), config.parallel.model_parallel_size
    stages = config.parallel.pipeline_stages if training else 1
    if Path(script).name == "generate.py":
        processes -= processes % tensor_size if processes > tensor_size else 0  # one copy of the model is enough
    try:
        layout = Layout.for_world(0, processes, stages, tensor_size)
    except ValueError as error:
        raise UserError(str(error)) from None
    if training:
        config.update_size(layout.data.size)


def _local_options(resolved: Resolved, hosts: Mapping[str, int], env: dict[str, str]) -> list[str]:
    config = resolved.config.launch
    if config.num_nodes > 1:
        raise UserError(f"num_nodes: {config.num_nodes} nodes need a hostfile; give --hostfile FILE")
    options = ["--hostfile", given_hostfile(config, env) or _CLUSTER_HOSTFILE]
    if not has_accelerator(env):
        env.setdefault("DS_ACCELERATOR", "cpu")
    if hosts or config.include or config.exclude:
        options += _filter_options(config)
    elif config.num_gpus or env.get("DS_ACCELERATOR") == "cpu":
        options += ["--num_gpus", str(config.num_gpus or 1)]
    # Two runs started together would both find the default port free: only a port that was asked for is kept.
    port = config.master_port if "master_port" in resolved.settings else free_port()
    options += ["--master_port", str(port)]
    return options + (["--no_ssh_check", "--master_addr", config.master_addr or "127.0.0.1"] if hosts else [])


def _multi_node_options(resolved: Resolved, launcher: str, hosts: Mapping[str, int], env: dict[str, str]) -> list[str]:
    config = resolved.config.launch
    address = config.master_addr or env.get("MASTER_ADDR") or next(iter(hosts))
    port = config.master_port if "master_port" in resolved.settings else job_port(env)
    env.update(MASTER_ADDR=address, MASTER_PORT=str(port))
    options = ["--force_multi", "--master_addr", address, "--master_port", str(port)]
    options += ["--no_ssh_check"] if config.no_ssh_check or launcher == "slurm" else []
    extra = _launcher_arguments(config, launcher, hosts)
    return options + _filter_options(config) + ([f"--launcher_args={extra}"] if extra else [])


def _check_multi_node(config: LaunchConfig, launcher: str, hosts: Mapping[str, int], env: Mapping[str, str]) -> None:
    """Raise UserError for what DeepSpeed's multi-node launchers would refuse with a traceback."""
    if not hosts:
        raise UserError(
            "force_multi: needs a hostfile; give --hostfile FILE (`name slots=8` a line) or set it to false"
        )
    if launcher == "local":
        raise UserError(f"launcher: local cannot start {len(hosts)} nodes; use pdsh, openmpi, mvapich or slurm")
    if launcher in ("openmpi", "mvapich"):
        for key in ("include", "exclude", "num_gpus", "num_nodes"):
            if getattr(config, key) not in (None, "", -1):
                raise UserError(f"{key}: launcher {launcher} cannot do this; write a hostfile with just these slots")
    if launcher == "slurm":
        key, filters = _filters(config)
        if any(filters.values()):
            raise UserError(f"{key}: launcher slurm cannot pick slots; name whole nodes, or use pdsh")
        if len(set(hosts.values())) > 1 and not config.num_gpus:
            raise UserError(f"hostfile: launcher slurm needs as many slots on every node, not {dict(hosts)}")
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


# ---- hosts, devices, ports ----


def find_hosts(config: LaunchConfig, env: Mapping[str, str]) -> dict[str, int]:
    """{node: slots} of the hostfile or the Slurm allocation, less those left out; empty means this machine."""
    refuse_missing_hostfile(config, env)
    path = _hostfile(config, env)
    if path is None and not config.deepspeed_slurm:
        _check_local_filters(config)
        return {}
    hosts = read_hostfile(path) if path else slurm_hosts(config, env)
    key, filters = _filters(config)
    for name, slots in filters.items():
        if name not in hosts:
            raise UserError(f"{key}: host '{name}' is not in {path or 'the allocation'} ({', '.join(hosts)})")
        if slots and max(slots) >= hosts[name]:
            raise UserError(f"{key}: host '{name}' has the slots 0 to {hosts[name] - 1}, not {max(slots)}")
    chosen = {name: size for name, size in hosts.items() if _slots(key, filters, name, size)}
    if not chosen:
        raise UserError(f"{key}: it leaves no host to run on; change it")
    return dict(list(chosen.items())[: config.num_nodes]) if config.num_nodes > 0 else chosen


def _check_local_filters(config: LaunchConfig) -> None:
    key, filters = _filters(config)
    for name in filters:
        if name != "localhost":
            raise not_a_host(key, name)


def _filters(config: LaunchConfig) -> tuple[str, dict[str, set[int]]]:
    """The key, include or exclude, that is set, and its {host: slots}; no slots mean the whole host."""
    if config.include and config.exclude:
        raise UserError("include, exclude: give one of them")
    key, text = ("exclude", config.exclude) if config.exclude else ("include", config.include or "")
    if text and (config.num_gpus or config.num_nodes > 0):
        raise UserError(f"{key}: cannot be combined with {'num_gpus' if config.num_gpus else 'num_nodes'}; give one")
    filters: dict[str, set[int]] = {}
    for item in filter(None, text.split("@")):
        match = re.fullmatch(r"([^:]+)(?::(\d+(?:,\d+)*))?", item)
        if match is None:
            raise UserError(f"{key}: expected `name` or `name:0,1`, joined by @, got '{item}'")
        filters.setdefault(match[1], set()).update(int(slot) for slot in (match[2] or "").split(",") if slot)
    return key, filters


def _slots(key: str, filters: Mapping[str, set[int]], name: str, size: int) -> int:
    """How many of a host's slots the filters leave."""
    if not filters:
        return size
    named = len(filters.get(name, ())) or size
    if key == "include":
        return named if name in filters else 0
    return size - named if name in filters else size


def count_processes(config: LaunchConfig, hosts: Mapping[str, int], env: Mapping[str, str]) -> int | None:
    """Number of workers on `hosts`, those of find_hosts (none: this machine). None: only DeepSpeed can know."""
    if config.num_gpus:
        return config.num_gpus * max(1, len(hosts))
    key, filters = _filters(config)
    if hosts:
        return sum(_slots(key, filters, name, size) for name, size in hosts.items())
    if not has_accelerator(env):
        return None if filters else 1
    devices = count_devices(env)
    return _slots(key, filters, "localhost", devices) if devices else None


def _hostfile(config: LaunchConfig, env: Mapping[str, str]) -> str | None:
    given = given_hostfile(config, env)
    if given:
        return given if missing_hostfile(config, env) is None else None
    return _CLUSTER_HOSTFILE if Path(_CLUSTER_HOSTFILE).is_file() else None


def has_accelerator(env: Mapping[str, str]) -> bool:
    """Whether this machine shows a device file of an accelerator; asks no library, so it takes no time."""
    if env.get("CUDA_VISIBLE_DEVICES") == "" or env.get("DS_ACCELERATOR") == "cpu":
        return False
    return any(glob.glob(pattern) for pattern in _DEVICE_FILES)


def count_devices(env: Mapping[str, str]) -> int | None:
    """Number of NVIDIA GPUs this process may use; None where another maker's devices cannot be told apart."""
    files = glob.glob("/dev/nvidia[0-9]*")
    visible = env.get("CUDA_VISIBLE_DEVICES")
    if not files or visible is None:
        return len(files) or None
    return len([device for device in visible.split(",") if device.strip()]) or None


def _pdsh_stop(config: LaunchConfig, hosts: Mapping[str, int], work: Sequence[str]) -> list[str]:
    """The command that sends SIGTERM to the workers of `work`: sshd, not the launcher, is their ancestor.

    DeepSpeed's own way of stopping gives them no time to save. The pattern goes from the interpreter to the last
    argument, so that it meets neither DeepSpeed's launcher nor the remote shell. Training stops everywhere when one
    rank is asked to.
    """
    targets = list(hosts)[:1] if _is_training(work[0]) else list(hosts)
    pattern = "^" + re.escape(" ".join([sys.executable, "-u", *work])) + "$"
    remote = shlex.join(["pkill", "-TERM", "-f", "--", pattern])
    return ["pdsh", "-R", "ssh", "-w", ",".join(targets), *shlex.split(config.launcher_args), remote]


def _remote_words(work: Sequence[str]) -> list[str]:
    """Arguments as DeepSpeed's pdsh launcher has to be given them: a shell reads them on the other side.

    DeepSpeed puts those with a space between double quotes, and escapes no more than double quotes in them.
    """
    return [re.sub(r"([\\$`])", r"\\\1", word) if " " in word else shlex.quote(word) for word in work]


# ---- inside a worker ----


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
