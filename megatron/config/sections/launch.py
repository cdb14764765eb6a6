"""Section `launch`: how deepy.py starts processes."""

from __future__ import annotations

import shlex
from typing import Literal

from pydantic import Field, model_validator

from megatron.config.sections.base import Section
from megatron.errors import ConfigError
from megatron.text import shortened


class LaunchConfig(Section):
    """How deepy.py starts processes."""

    launcher: Literal["local", "pdsh", "openmpi", "mvapich", "slurm"] = "pdsh"
    """Launcher for several nodes; on one node processes are started locally whatever it says."""
    deepspeed_slurm: bool = False
    """true: start through Slurm even without a hostfile."""
    hostfile: str | None = None
    """Hostfile of the nodes (`name slots=8` a line). Default: what DLTS_HOSTFILE in the environment names."""
    include: str | None = None
    """Nodes and slots to use, in DeepSpeed's syntax."""
    exclude: str | None = None
    """Nodes and slots to leave out, in DeepSpeed's syntax."""
    num_nodes: int = Field(default=-1, ge=-1)
    """Number of nodes of the hostfile to use; -1 means all."""
    num_gpus: int | None = Field(default=None, gt=0, le=65_536)
    """Processes per node. Default: one per GPU, or one on a machine without GPUs."""
    master_addr: str | None = None
    """Address of the first node. Default: from the launcher or MASTER_ADDR."""
    master_port: int = Field(default=29500, gt=0, lt=65536)
    """Port of the first node."""
    no_ssh_check: bool = False
    """Do not test the ssh connections to the nodes first."""
    force_multi: bool = False
    """Use the multi-node launcher even for one node."""
    launcher_args: str = ""
    """Additional arguments of the multi-node launcher (srun, mpirun or pdsh), as on a shell command line."""
    comment: str | None = None
    """Comment for the Slurm job."""
    account: str | None = None
    """Account of the Slurm job."""
    distributed_backend: Literal["nccl", "gloo", "mpi"] | None = None
    """Backend of torch.distributed. nccl asks for GPUs: without one, training is refused. gloo also runs on CPUs.
    Default: nccl where there is a GPU, gloo elsewhere."""
    distributed_timeout_minutes: int = Field(default=10, gt=0, le=1_000_000)
    """How long a collective of training waits for a rank before the run ends. Work that one rank does for all, such
    as reading a checkpoint's checksums, does not count."""
    max_restarts: int = Field(default=0, ge=0, le=1_000_000)
    """How often deepy.py starts train.py again after a failure that is nobody's mistake: killed processes, lost
    connections, faults of the program. Each time the run resumes from its newest whole checkpoint; it ends when two
    attempts in a row have left no newer one. load and save have to name one folder."""
    restart_delay_seconds: float = Field(default=10, ge=0, le=86_400)
    """Time before the first restart; each one after it waits twice as long as the one before, up to ten minutes or
    this, if it is more."""
    restart_by_requeue: bool = False
    """true: in a batch job of Slurm, restart by requeueing the job without nodes that failed twice, as
    tools/slurm/pretrain.sbatch does. The delay is then Slurm's own, and the restarts of all its starts count."""
    ranks_per_gpu: int = Field(default=1, gt=0, le=1024)
    """Processes that share a GPU, for tests of layouts on one card; above 1 only with distributed_backend: gloo."""

    @model_validator(mode="after")
    def _check(self) -> LaunchConfig:
        try:
            shlex.split(self.launcher_args)
        except ValueError as error:
            reason = f"{shortened(self.launcher_args)}: {error}"
            raise ConfigError("launcher_args", reason, "close what is quoted") from None
        if self.num_nodes == 0:
            raise ConfigError("num_nodes", "0 nodes run nothing", "give a number of nodes, or -1 for all")
        if self.ranks_per_gpu > 1 and self.distributed_backend != "gloo":
            reason = f"NCCL refuses {self.ranks_per_gpu} processes on one GPU"
            advice = "set distributed_backend: gloo"
            raise ConfigError("ranks_per_gpu", reason, advice, beside=["distributed_backend"])
        return self
