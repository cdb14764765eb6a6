"""Joining the processes of a run, with torch and DeepSpeed set up for the device they train on."""

from __future__ import annotations

import importlib.util
import logging
import os
import warnings
from collections.abc import Sequence
from datetime import timedelta

import torch.distributed as dist

from megatron.config.schema import RunConfig
from megatron.errors import UserError
from megatron.mpu import Layout
from megatron.mpu.device import require_gpu, set_cuda_environment, set_numerics, uses_gpu
from megatron.mpu.processes import connect_world
from megatron.mpu.stacks import record_collectives


def initialize_distributed(config: RunConfig) -> Layout:
    """Join the process group that RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT describe; returns the grid.

    Raises: UserError where a GPU is asked for and there is none, and for a world the model axes do not divide.
    """
    deterministic, parallel, launch = config.training.deterministic, config.parallel, config.launch
    request, overrides = config.gpu_request()
    set_cuda_environment(deterministic, parallel.model_parallel_size)
    require_gpu(request, _ways_without_gpu(overrides))
    set_numerics(deterministic)
    if not uses_gpu():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed looks for one, and says that it found none
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # DeepSpeed's ZeRO 3 calls collectives by their old names.
    warnings.filterwarnings("ignore", message=".*torch.distributed.* is deprecated", category=FutureWarning)
    if not uses_gpu():
        # Without this DeepSpeed compiles a shared-memory collective for a minute before the first step. Set, not
        # changed: it makes its own table of all extensions when that is asked for, by trying the compiler on each.
        deepspeed.ops.__compatible_ops__ = {"deepspeed_shm_comm": False}
    if uses_gpu() and config.training.watchdog.enabled:
        record_collectives()
    timeout = timedelta(minutes=launch.distributed_timeout_minutes)
    connect_world(launch.distributed_backend, timeout, launch.ranks_per_gpu)
    if not deepspeed.comm.is_initialized():
        deepspeed.init_distributed(dist_backend=dist.get_backend(), auto_mpi_discovery=False, verbose=False)
    try:
        layout = Layout.for_world(
            dist.get_rank(),
            dist.get_world_size(),
            parallel.pipeline_stages,
            parallel.model_parallel_size,
            parallel.sequence_parallel,
        )
    except ValueError as error:
        raise UserError(str(error)) from error
    return layout.connect(timeout)


def _ways_without_gpu(overrides: Sequence[str]) -> str:
    text = f"train on the CPU with {' '.join(f'`--set {override}`' for override in overrides)}"
    if "attention_backend=sdpa" in overrides and importlib.util.find_spec("flash_attn") is None:
        text += "; flash_attn is missing too: pip install -r requirements/requirements-flashattention.txt"
    return text
