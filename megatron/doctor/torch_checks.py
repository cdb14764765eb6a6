"""What needs torch, in a process of its own: versions, and how fast each GPU multiplies."""

from __future__ import annotations

import time
from typing import Any

from megatron.doctor.frames import Check

_SECONDS = 0.5


def checks() -> list[Check]:
    """The first one pays for importing torch from what may be a cold network disk."""
    return [Check("torch", 60, versions), Check("matmul", 40, rates)]


def versions() -> dict[str, Any]:
    """Of torch, the CUDA it was built for (None: a CPU build) and NCCL; the GPUs it can use, or why there is none."""
    import torch

    from megatron.mpu.device import uses_gpu, why_no_gpu

    found: dict[str, Any] = {"version": torch.__version__, "cuda": torch.version.cuda, "nccl": None, "why": None}
    if torch.version.cuda and torch.distributed.is_nccl_available():
        found["nccl"] = ".".join(str(part) for part in torch.cuda.nccl.version())
    if not uses_gpu():
        return {**found, "gpus": [], "why": why_no_gpu()}
    return {**found, "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]}


def rates() -> list[float]:
    """FLOP/s of a square product on each GPU in bf16, or on the CPU in fp32 without one."""
    import torch

    from megatron.mpu.device import uses_gpu

    if not uses_gpu():
        return [_rate(torch.device("cpu"), torch.float32, 512)]
    devices = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    return [_rate(device, torch.bfloat16, 8192) for device in devices]


def _rate(device: Any, dtype: Any, size: int) -> float:
    """The best of several products, after one that is not counted."""
    import torch

    matrix = torch.randn(size, size, device=device).to(dtype)
    _ = matrix @ matrix
    _finish(device)
    best, end = 0.0, time.monotonic() + _SECONDS
    while time.monotonic() < end:
        start = time.perf_counter()
        _ = matrix @ matrix
        _finish(device)
        best = max(best, 2 * size**3 / (time.perf_counter() - start))
    return best


def _finish(device: Any) -> None:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)
