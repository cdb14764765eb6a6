"""What the machine can do at most: the denominator of model FLOPs utilisation (MFU)."""

from __future__ import annotations

import re
import time

import torch

# Dense 16-bit TFLOP/s of the vendors' data sheets, by a part of the device name; the first match counts.
PEAK_TFLOPS = {
    "H200": 989.5, "H100 PCIe": 756.0, "H100 NVL": 835.5, "H100": 989.5, "H800": 989.5, "B200": 2250.0,
    "GH200": 989.5, "A100": 312.0, "A800": 312.0, "A40": 149.7, "A10": 125.0, "L40S": 362.0, "L40": 181.0,
    "V100": 125.0, "RTX 4090": 165.2, "RTX 3090": 71.0,
}  # fmt: skip


def peak_flops(device: torch.device, dtype: torch.dtype, override_tflops: float | None = None) -> tuple[float, str]:
    """(peak FLOP/s of one device, where the number comes from)."""
    if override_tflops is not None:
        return override_tflops * 1e12, "peak_tflops of the configuration"
    if device.type == "cuda" and dtype != torch.float32:
        name = torch.cuda.get_device_name(device)
        for part, tflops in PEAK_TFLOPS.items():
            if re.search(rf"\b{part}\b", name):
                return tflops * 1e12, f"data sheet of {name}"
    return _measured_flops(device, dtype), f"measured {str(dtype).removeprefix('torch.')} matrix multiplication"


def _measured_flops(device: torch.device, dtype: torch.dtype, size: int = 1024, seconds: float = 0.2) -> float:
    """Best rate of a square matrix multiplication within about `seconds`."""
    a = torch.ones(size, size, device=device, dtype=dtype)
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        product = a @ a
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        del product
        best = min(best, time.perf_counter() - start)
    return 2.0 * size**3 / best


def memory_gib(device: torch.device) -> float:
    """Peak memory of this process so far: allocated on the GPU, or resident on a CPU; in GiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
