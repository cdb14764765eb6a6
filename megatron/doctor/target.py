"""From a configuration to what is checked: which nodes, how to reach them, and what to look at there."""

from __future__ import annotations

import os
import socket
import sys
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron.doctor.disks import existing_folder
from megatron.doctor.findings import Expected
from megatron.doctor.machine import ROOT
from megatron.doctor.nodes import on_node
from megatron.doctor.probe import worker_words
from megatron.errors import UserError

if TYPE_CHECKING:
    from megatron.config.load import Resolved
    from megatron.config.schema import RunConfig
    from megatron.config.sections.data import DataConfig
    from megatron.launch.supervise import LauncherCall

AXES_SECONDS = 90.0


@dataclass(frozen=True)
class Target:
    """The machines of a run."""

    nodes: tuple[str, ...]
    launcher: str = "local"
    """What starts a process on a node: slurm, pdsh, openmpi, mvapich, or local on this machine."""
    arguments: str = ""
    """The configuration's launcher_args."""
    folders: Mapping[str, str | None] | None = None
    """{label: folder to look at}, None for each node's temporary folder."""
    files: tuple[str, ...] = ()
    """Data and tokenizer files that every node has to see."""
    expected: Expected = Expected()
    """What is asked of every node."""
    axes: LauncherCall | None = None
    """Starts the processes of the layout; None where there is only one, or no configuration."""

    def commands(self, shared: Mapping[str, str] | None, env: Mapping[str, str]) -> dict[str, list[str]]:
        """The command of the probe on each node. shared: from disks.held_folder()."""
        request = {
            "packages": list(self.expected.packages),
            "files": self.files,
            "folders": self.folders,
            "shared": shared,
        }
        words = [sys.executable, *worker_words("--probe", request)]
        if self.launcher == "local":
            return {node: words for node in self.nodes}
        return {node: on_node(self.launcher, node, self.arguments, words, env) for node in self.nodes}


def this_machine() -> Target:
    """What is checked without a configuration."""
    folders = {"working": str(Path.cwd()), "temporary": None}
    return Target((socket.gethostname(),), folders=folders, expected=Expected(pinned(["requirements.txt"])))


def find_target(args: Namespace, prog: str) -> Target:
    """The machines that a configuration's run would use; raises UserError for a mistake that would stop it, too."""
    try:
        from megatron.config.cli import resolve_arguments
        from megatron.config.hostfile import given_hostfile, missing_hostfile
        from megatron.launch.hosts import count_processes, find_hosts
    except ModuleNotFoundError as error:
        raise UserError(
            f"{prog}: a configuration cannot be read without {error.name}; pip install -r requirements/requirements.txt"
            f", or give none: `python {prog}` checks this machine without it"
        ) from error
    if args.explain:
        raise UserError(f"{prog}: --explain is for train.py, eval.py and generate.py; leave it off")
    resolved = resolve_arguments(args, prog)
    config, launch = resolved.config, resolved.config.launch
    if missing_hostfile(launch, os.environ):
        raise UserError(
            f"hostfile '{given_hostfile(launch, os.environ)}' does not exist, a run would be on this machine alone; "
            "give an existing file, or --set hostfile=null to check this machine"
        )
    hosts = find_hosts(launch, os.environ)
    processes = count_processes(launch, hosts, os.environ)
    nodes = hosts or {socket.gethostname(): processes or 0}
    gpus = {node: (launch.num_gpus or slots) // launch.ranks_per_gpu for node, slots in nodes.items()}
    data_files = _data_files(config.data)
    tokenizer_files = (config.tokenizer.vocab_file, config.tokenizer.merge_file)
    several = len(hosts) > 1 or launch.force_multi or launch.deepspeed_slurm
    return Target(
        tuple(nodes),
        ("slurm" if launch.deepspeed_slurm else launch.launcher) if several else "local",
        launch.launcher_args if several else "",
        _folders(config.checkpoint.save, data_files),
        (*data_files, *(str(Path(file).absolute()) for file in tokenizer_files if file)),
        Expected(pinned(requirement_files(config)), config.gpu_request()[0], gpus),
        _axes_launch(resolved, processes),
    )


def _folders(save: str | None, data_files: Sequence[str]) -> dict[str, str | None]:
    folders: dict[str, str | None] = {"save" if save else "working": str(existing_folder(save or "."))}
    for file in data_files[:1]:
        folder = str(existing_folder(Path(file).parent))
        if folder not in folders.values():
            folders["data"] = folder
    return {**folders, "temporary": None}


def _data_files(data: DataConfig) -> tuple[str, ...]:
    lists = (data.train_data_paths, data.valid_data_paths, data.test_data_paths)
    prefixes = [*([data.data_path] if data.data_path else []), *(path for paths in lists for path in paths or ())]
    return tuple(str(Path(prefix + ending).absolute()) for prefix in prefixes for ending in (".bin", ".idx"))


def _axes_launch(resolved: Resolved, processes: int | None) -> LauncherCall | None:
    from megatron.launch.command import check_world, make_call

    config, is_training = resolved.config, resolved.config.training.train_iters is not None
    check_world(config, "train.py" if is_training else "eval.py", processes)
    if processes == 1:
        return None
    request = {
        "pipeline": config.parallel.pipeline_stages if is_training else 1,
        "tensor": config.parallel.model_parallel_size,
        "backend": config.launch.distributed_backend, "ranks_per_gpu": config.launch.ranks_per_gpu,
        "seconds": AXES_SECONDS,
    }  # fmt: skip
    script, *words = worker_words("--axes", request)
    return make_call(resolved, script, words, os.environ)


# ---- requirements ----


def requirement_files(config: RunConfig) -> list[str]:
    """The files of requirements/ that a run of this configuration uses."""
    wanted = {
        "requirements.txt": True,
        "requirements-tensorboard.txt": config.logging.tensorboard_dir is not None,
        "requirements-vision.txt": bool(type(config.images).model_fields),
        "requirements-wandb.txt": config.logging.use_wandb,
        "requirements-flashattention.txt": config.training.attention_backend == "flash_attn",
        "requirements-liger.txt": config.training.cross_entropy == "liger",
        "requirements-quack.txt": config.training.cross_entropy == "quack",
        "requirements-eval.txt": bool(config.evaluation.eval_tasks),
    }
    return [name for name, is_used in wanted.items() if is_used]


def pinned(files: list[str]) -> dict[str, str]:
    """{package: version} of the lines `name==version` in files of requirements/; nothing where a file is not there."""
    found: dict[str, Any] = {}
    for file in files:
        path = ROOT / "requirements" / file
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        pairs = (line.split("#")[0].strip().partition("==") for line in lines)
        found |= {name: version for name, equals, version in pairs if equals}
    return found
