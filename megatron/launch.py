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
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, MutableMapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from megatron.config.cli import check_command, parse_arguments, resolve_arguments, without_plan_flags
from megatron.config.explain import explain
from megatron.config.load import Resolved
from megatron.config.schema import LaunchConfig
from megatron.errors import UserError
from megatron.log import get_logger

DEFAULT_PORT = 29500
_LAUNCHER_PID, _LAUNCHER_HOST = "DEEPY_LAUNCHER_PID", "DEEPY_LAUNCHER_HOST"
_DEVICE_FILES = ("/dev/nvidia[0-9]*", "/dev/kfd", "/dev/dxg", "/dev/davinci[0-9]*", "/dev/accel/*")
_CLUSTER_HOSTFILE = "/job/hostfile"
_FORWARDED_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
_LAUNCHER_PROGRAMS = {"pdsh": "pdsh", "openmpi": "ompi_info", "mvapich": "mpiname", "slurm": "sinfo"}
_RANK_SOURCES = (
    ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NTASKS"),
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_SIZE"),
    ("MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_SIZE"),
)


@dataclass(frozen=True)
class LaunchPlan:
    """One call of DeepSpeed's launcher."""

    command: list[str]
    environment: dict[str, str]
    signal_depth: int
    """Where a signal goes in the process tree below the launcher: 2 is a local worker, 1 is srun or mpirun."""


def launch(argv: Sequence[str], prog: str = "deepy.py") -> int:
    """Run `script yaml... flags` under DeepSpeed's launcher; the workers' exit code comes back.

    Every mistake in files, keys and flags raises UserError before a process is started.
    """
    args = parse_arguments(argv, prog, with_script=True)
    script = _check_script(args.script, prog)
    resolved = resolve_arguments(args, f"{prog} {script}")
    if args.explain:
        print(explain(resolved))
        return 0
    check_command(resolved, script)
    arguments = list(argv)
    arguments.remove(args.script)
    if args.dry_run:
        return _dry_run(resolved, script, without_plan_flags(arguments), args.gpus, args.machine)
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
    from megatron.planner import DEFAULT_MACHINE, find_machine, report, world  # needs torch, a launch does not

    cluster, config = find_machine(machine or DEFAULT_MACHINE), resolved.config
    try:
        hosts = find_hosts(config.launch, os.environ)
        processes = sum(hosts.values()) or config.launch.num_gpus or 1
        grid = world(config, max(1, len(hosts)), processes)
        plan = make_plan(resolved, script, arguments, os.environ)
    except UserError as error:
        if gpus is None:  # else this machine is not the one that is planned for
            raise
        print(f"command: none here: {error}")
    else:
        print(f"command: {shlex.join(plan.command)}\nworld: {grid}")
        gpus = gpus or processes
    print(report(config, cluster, gpus))
    return 0


# ---- the command ----


def make_plan(resolved: Resolved, script: str, arguments: list[str], environment: Mapping[str, str]) -> LaunchPlan:
    """The launcher command that runs `script arguments` as the launch keys of the config say."""
    config = resolved.config.launch
    env = dict(environment)
    hosts = find_hosts(config, env)
    runner = [sys.executable, "-m", "deepspeed.launcher.runner", "--no_local_rank", "--log_level", "critical"]
    if len(hosts) > 1 or config.force_multi or config.deepspeed_slurm:
        launcher = "slurm" if config.deepspeed_slurm else config.launcher
        options, depth = _multi_node_options(config, launcher, hosts, env), 0 if launcher == "pdsh" else 1
    else:
        options, depth = _local_options(resolved, hosts, env), 2
    return LaunchPlan([*runner, *options, script, *arguments], env, depth)


def _local_options(resolved: Resolved, hosts: Mapping[str, int], env: dict[str, str]) -> list[str]:
    config = resolved.config.launch
    if config.num_nodes > 1:
        raise UserError(f"num_nodes: {config.num_nodes} nodes need a hostfile; give --hostfile FILE")
    options = ["--hostfile", _hostfile(config, env) or _CLUSTER_HOSTFILE]
    if not has_accelerator(env):
        env.setdefault("DS_ACCELERATOR", "cpu")
    if config.include or config.exclude:
        options += _filter_options(config)
    elif config.num_gpus or (env.get("DS_ACCELERATOR") == "cpu" and not hosts):
        options += ["--num_gpus", str(config.num_gpus or 1)]
    # Two runs started together would both find the default port free: only a port that was asked for is kept.
    port = config.master_port if "master_port" in resolved.settings else free_port()
    options += ["--master_port", str(port)]
    return options + (["--no_ssh_check", "--master_addr", config.master_addr or "127.0.0.1"] if hosts else [])


def _multi_node_options(
    config: LaunchConfig, launcher: str, hosts: Mapping[str, int], env: dict[str, str]
) -> list[str]:
    _check_multi_node(config, launcher, hosts)
    address = config.master_addr or env.get("MASTER_ADDR") or next(iter(hosts))
    env.update(MASTER_ADDR=address, MASTER_PORT=str(config.master_port))
    options = ["--hostfile", _hostfile(config, env) or _write_hostfile(hosts), "--launcher", launcher, "--force_multi"]
    options += ["--master_addr", address, "--master_port", str(config.master_port)]
    options += ["--no_ssh_check"] if config.no_ssh_check or launcher == "slurm" else []
    extra = _launcher_arguments(config, launcher, hosts)
    return options + _filter_options(config) + ([f"--launcher_args={extra}"] if extra else [])


def _check_multi_node(config: LaunchConfig, launcher: str, hosts: Mapping[str, int]) -> None:
    """Raise UserError for what DeepSpeed's multi-node launchers would refuse with a traceback."""
    if not hosts:
        raise UserError(
            "force_multi: needs a hostfile; give --hostfile FILE (`name slots=8` a line) or set it to false"
        )
    if launcher == "local":
        raise UserError(f"launcher: local cannot start {len(hosts)} nodes; use pdsh, openmpi, mvapich or slurm")
    if launcher in ("openmpi", "mvapich"):
        for key in ("include", "exclude", "num_gpus"):
            if getattr(config, key):
                raise UserError(f"{key}: launcher {launcher} cannot do this; write a hostfile with just these slots")
    program = _LAUNCHER_PROGRAMS[launcher]
    if shutil.which(program) is None:
        raise UserError(f"launcher: {launcher} needs the program `{program}`, which is not on PATH; install it")


def _filter_options(config: LaunchConfig) -> list[str]:
    options = ["--include", config.include] if config.include else []
    options += ["--exclude", config.exclude] if config.exclude else []
    if config.num_nodes > 0:
        options += ["--num_nodes", str(config.num_nodes)]
    if config.num_gpus and not options:
        options += ["--num_gpus", str(config.num_gpus)]
    return options


def _launcher_arguments(config: LaunchConfig, launcher: str, hosts: Mapping[str, int]) -> str:
    words: list[str] = []
    if launcher == "slurm":
        # Without --ntasks-per-node srun may place ranks unevenly.
        words += [f"--nodes={len(hosts)}", f"--ntasks-per-node={config.num_gpus or max(hosts.values())}"]
        words += [f"--comment={config.comment}"] if config.comment else []
        words += [f"--account={config.account}"] if config.account else []
    elif launcher == "openmpi":
        words += ["-x", "MASTER_ADDR", "-x", "MASTER_PORT"]
    return " ".join(part for part in (shlex.join(words), config.launcher_args) if part)


# ---- hosts, devices, ports ----


def find_hosts(config: LaunchConfig, env: Mapping[str, str]) -> dict[str, int]:
    """{node: slots} of the hostfile or the Slurm allocation, less those left out; empty means this machine."""
    path = _hostfile(config, env)
    if path is None and not config.deepspeed_slurm:
        return {}
    hosts = read_hostfile(path) if path else slurm_hosts(config, env)
    names = list(hosts)
    for key, text in (("include", config.include), ("exclude", config.exclude)):
        whole = {item.partition(":")[0]: ":" not in item for item in (text or "").split("@") if item}
        for name in whole:
            if name not in hosts:
                raise UserError(f"{key}: host '{name}' is not in {path or 'the allocation'} ({', '.join(hosts)})")
        if whole:
            names = [name for name in names if (name in whole if key == "include" else not whole.get(name, False))]
    names = names[: config.num_nodes] if config.num_nodes > 0 else names
    if not names:
        raise UserError("include, exclude: they leave no host to run on; change them")
    return {name: hosts[name] for name in names}


def _hostfile(config: LaunchConfig, env: Mapping[str, str]) -> str | None:
    given = config.hostfile or env.get("DLTS_HOSTFILE")
    return given or (_CLUSTER_HOSTFILE if Path(_CLUSTER_HOSTFILE).is_file() else None)


def read_hostfile(path: str) -> dict[str, int]:
    """{node: slots} of a DeepSpeed hostfile; raises UserError with the line of a mistake."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UserError(f"hostfile '{path}' cannot be read: {error.strerror}; give an existing file") from None
    hosts: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        text = line.partition("#")[0].strip()
        match = re.fullmatch(r"(\S+)\s+slots=(\d+)", text)
        if text and match is None:
            raise UserError(f"{path}:{number}: expected `name slots=8`, got '{text}'")
        if match is not None:
            if match[1] in hosts:
                raise UserError(f"{path}:{number}: host '{match[1]}' is given twice; keep one line")
            hosts[match[1]] = int(match[2])
    if not hosts:
        raise UserError(f"{path}: no hosts in it; add lines `name slots=8`")
    return hosts


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


def _write_hostfile(hosts: Mapping[str, int]) -> str:
    with tempfile.NamedTemporaryFile("w", prefix="hostfile_", delete=False) as file:
        file.writelines(f"{name} slots={slots}\n" for name, slots in hosts.items())
    return file.name


def has_accelerator(env: Mapping[str, str]) -> bool:
    """Whether this machine shows a device file of an accelerator; asks no library, so it takes no time."""
    if env.get("CUDA_VISIBLE_DEVICES") == "" or env.get("DS_ACCELERATOR") == "cpu":
        return False
    return any(glob.glob(pattern) for pattern in _DEVICE_FILES)


def free_port() -> int:
    """A TCP port that is free on this machine now."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


# ---- running it ----


def run_plan(plan: LaunchPlan) -> int:
    """Run the launcher until it ends and return its exit code; Ctrl-C and other signals go to the workers.

    The launcher gets a session of its own, so that a Ctrl-C reaches the workers through here only, as one SIGTERM:
    they save and stop. DeepSpeed's own handler would kill them after 30 seconds. A second signal ends everything.
    """
    environment = {**plan.environment, _LAUNCHER_PID: str(os.getpid()), _LAUNCHER_HOST: socket.gethostname()}
    process = subprocess.Popen(plan.command, env=environment, start_new_session=True)
    received: list[int] = []

    def forward(number: int, _frame: FrameType | None) -> None:
        received.append(number)
        if len(received) == 1:
            get_logger().info("%s: asking the workers to save and stop", signal.Signals(number).name)
            _signal_below(process.pid, plan.signal_depth)
        else:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM if len(received) == 2 else signal.SIGKILL)

    numbers = [number for number in _FORWARDED_SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
    previous = {number: signal.signal(number, forward) for number in numbers}
    try:
        code = _shell_code(process.wait())
        if code > 128 and not received:
            get_logger().error("a worker was killed by signal %d (9: often out of memory)", code - 128)
        return code
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _shell_code(code: int) -> int:
    """A worker killed by signal n comes out of DeepSpeed's launcher as 256 - n; shells say 128 + n."""
    if code < 0:
        return 128 - code
    return 128 + 256 - code if code > 192 else code


def _signal_below(pid: int, depth: int) -> None:
    """Send SIGTERM to the processes `depth` levels below `pid`, or to the deepest there are yet."""
    import psutil  # comes with deepspeed

    with suppress(psutil.NoSuchProcess):
        level = [psutil.Process(pid)]
        for _ in range(depth):
            level = [child for parent in level for child in parent.children()] or level
        for process in level:
            with suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGTERM)


# ---- inside a worker ----


def stop_with_launcher(env: Mapping[str, str] = os.environ, interval: float = 2.0) -> None:
    """Send this worker SIGTERM, so that it saves and stops, once the deepy.py on this machine that started it is gone.

    A killed deepy.py cannot forward anything; without this its workers would train on, unseen.
    """
    launcher = env.get(_LAUNCHER_PID, "")
    host = env.get(_LAUNCHER_HOST, "")
    if not launcher.isdecimal() or host != socket.gethostname():
        return

    def watch() -> None:
        while Path(f"/proc/{launcher}").exists():
            time.sleep(interval)
        os.kill(os.getpid(), signal.SIGTERM)

    if Path("/proc/self").exists():
        threading.Thread(target=watch, daemon=True, name="launcher-watch").start()


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
    env.setdefault("MASTER_ADDR", "127.0.0.1" if single else _first_slurm_host(env))
    env.setdefault("MASTER_PORT", str(free_port() if single else DEFAULT_PORT))


def _first_slurm_host(env: Mapping[str, str]) -> str:
    """The first node of the job step, `node[1-2]` -> node1; this machine without Slurm."""
    nodes = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST") or ""
    match = re.match(r"([^\[,]+)(?:\[(\d+))?", nodes)
    return match[1] + (match[2] or "") if match else "127.0.0.1"
