"""The device and the number formats of this process."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from megatron.errors import RankError, UserError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def uses_gpu() -> bool:
    """Does this run use a GPU? DS_ACCELERATOR=cpu says no on a machine that has one."""
    return torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu"


def process_device() -> torch.device:
    """This process's GPU, or the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if uses_gpu() else torch.device("cpu")


def why_no_gpu() -> str:
    """What torch says of the driver and the devices, on one line; for a process in which `uses_gpu()` is false."""
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return f"torch {torch.__version__}: {' '.join(str(error).split())}"
    return "DS_ACCELERATOR=cpu in the environment"


def require_gpu(request: str | None, without: str) -> None:
    """Refuse a run that asks for a GPU where there is none, rather than let it crawl on the CPU.

    Args:
        request: the setting that asks for one, as `key: value`; None when nothing does.
        without: the flags with which it runs on a CPU, or another way out.

    Raises: UserError with what torch says of the driver.
    """
    if request is not None and not uses_gpu():
        raise UserError(
            f"{request} needs a GPU, and this process has none ({why_no_gpu()}); mend the driver or the allocation, "
            f"or {without}"
        )


def claim_device(ranks_per_gpu: int = 1) -> None:
    """Take this process's GPU, or its share of the cores: each would otherwise start one thread a core.

    Raises: RankError when LOCAL_RANK is beyond the GPUs that this process sees.
    """
    if uses_gpu():
        local_rank = os.environ["LOCAL_RANK"]
        index = device_index(int(local_rank), torch.cuda.device_count(), ranks_per_gpu)
        torch.cuda.set_device(index)
        # DeepSpeed takes LOCAL_RANK for the number of the device; which process of the node this is stays known.
        os.environ.setdefault("LOCAL_PROCESS", local_rank)
        for name in ("LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK"):
            if name in os.environ:
                os.environ[name] = str(index)
        return
    processes = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or "1")
    if "OMP_NUM_THREADS" not in os.environ and processes > 1:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // processes))


def device_index(local_rank: int, visible: int, ranks_per_gpu: int = 1) -> int:
    """Which of the `visible` GPUs a node's process number `local_rank` takes.

    A process that sees one GPU only takes it, whatever its number: srun's --gpus-per-task and --gpu-bind show each task
    its own. `refuse_shared_gpu` finds out when it was the same one.
    """
    index = 0 if visible == 1 else local_rank // ranks_per_gpu
    if index >= visible:
        raise RankError(
            f"LOCAL_RANK: process {local_rank} of {socket.gethostname()} finds {visible} GPUs "
            f"(CUDA_VISIBLE_DEVICES={os.environ.get('CUDA_VISIBLE_DEVICES', 'unset')}); start one process a GPU"
        )
    return index


def refuse_shared_gpu(store: dist.Store, ranks_per_gpu: int = 1) -> None:
    """Raise a RankError in a process whose GPU has its `ranks_per_gpu` processes already.

    NCCL would end such a run with an internal error. `store` is one that all processes of the run share.
    """
    if not uses_gpu():
        return
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    name = f"{socket.gethostname()}/{getattr(properties, 'uuid', torch.cuda.current_device())}"
    if store.add(f"gpu/{name}", 1) > ranks_per_gpu:
        raise RankError(
            f"LOCAL_RANK: more than {ranks_per_gpu} processes on one GPU ({name}); start one process a GPU, or set "
            "ranks_per_gpu and distributed_backend: gloo, which is slow"
        )


def set_numerics(deterministic: bool) -> None:
    """How products are summed and which kernels may run, for this whole process.

    Sums of fp16 and bf16 products stay in fp32 until they are whole: torch would let cuBLAS round partial sums to 16
    bits. `deterministic` leaves only kernels that give the same bits every time, and none of attention's that do not.
    """
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    if torch.are_deterministic_algorithms_enabled() != deterministic:
        torch.use_deterministic_algorithms(deterministic)
    torch.backends.cuda.enable_mem_efficient_sdp(not deterministic)
    torch.backends.cuda.enable_cudnn_sdp(not deterministic)


def set_cuda_environment(deterministic: bool, tensor_size: int) -> None:
    """Variables that CUDA and cuBLAS read when they start; a value that the user has set stays.

    With tensor ranks, kernels of several communicators are on their way at a time (the layers' sums, and the gradients'
    with overlap_comm). One work queue starts them in the order of the program, the same on every rank, so that none
    waits for one that another rank has not started.
    """
    if tensor_size > 1:
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


@contextmanager
def ieee_products() -> Iterator[None]:
    """Inside, torch computes fp32 products in fp32, whatever TF32 settings the process or its environment has."""
    try:
        precision = torch.get_float32_matmul_precision()
    except RuntimeError:  # settings of torch 2.9 and newer are in use: torch wants no other beside them
        cuda: Any = torch.backends.cuda
        mkldnn: Any = torch.backends.mkldnn
        before = [(place, place.fp32_precision) for place in (cuda.matmul, mkldnn.matmul)]
        try:
            for place, _ in before:
                place.fp32_precision = "ieee"
            yield
        finally:
            for place, value in before:
                place.fp32_precision = value
        return
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(precision)


def products_are_exact(device: torch.device) -> bool:
    """Does an fp32 product keep all 24 bits? NVIDIA_TF32_OVERRIDE acts inside cuBLAS, where torch does not see it."""
    matrix = torch.full((128, 128), 1.0 + 2.0**-20, device=device)
    return torch.equal(matrix @ torch.eye(128, device=device), matrix)
