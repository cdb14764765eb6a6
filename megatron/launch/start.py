"""What deepy.py does: a configuration becomes a launcher command, run until its workers end, or shown by --dry-run."""

from __future__ import annotations

import os
import shlex
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from megatron.config.cli import (
    check_outputs,
    checks_of,
    is_training,
    parse_arguments,
    resolve_arguments,
    without_plan_flags,
)
from megatron.config.explain import explain
from megatron.config.hostfile import missing_hostfile
from megatron.config.load import Resolved
from megatron.config.places import places_named
from megatron.errors import UserError
from megatron.launch.command import make_call
from megatron.launch.hosts import count_processes, find_hosts
from megatron.launch.restarts import Restarts
from megatron.launch.supervise import Outcome, run_call
from megatron.log import get_logger


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
    config = resolved.config

    def attempt() -> Outcome:
        return run_call(make_call(resolved, script, arguments, os.environ))

    if is_training(script) and config.launch.max_restarts and config.checkpoint.save:
        return Restarts(config.launch, config.checkpoint.save, os.environ).run(attempt)
    return attempt().code


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
        call = make_call(resolved, script, arguments, os.environ, to_run=False)
    except UserError as error:
        if gpus is None:  # else this machine is not the one that is planned for
            raise
        print(f"command: none here: {error}")
    else:
        print(f"command: {shlex.join(call.command)}\nworld: {grid}")
        if call.written:
            Path(call.written).unlink(missing_ok=True)
    return gpus or processes
