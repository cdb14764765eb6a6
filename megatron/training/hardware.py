"""What this process's device is measured by: its peak rate and the memory in use."""

from __future__ import annotations

import resource

import torch

from megatron.mpu.gpus import is_mig_slice, peak_tflops


def peak_flops(device: torch.device, dtype: torch.dtype, given_tflops: float | None = None) -> tuple[float | None, str]:
    """(peak FLOP/s of one device, where the number comes from); (None, why) where no data sheet gives one.

    The peak is of 16-bit matrix products: fp32 training and CPUs have none unless it is given.
    """
    if given_tflops is not None:
        return given_tflops * 1e12, "peak_tflops of the configuration"
    if device.type != "cuda":
        return None, "no MFU on a CPU without peak_tflops"
    if dtype == torch.float32:
        return None, "no MFU in fp32 without peak_tflops"
    name = torch.cuda.get_device_name(device)
    if (found := peak_tflops(name)) is not None:
        return found[0] * 1e12, f"{found[1]}: {name}"
    kind = "a MIG slice" if is_mig_slice(name) else "not in the table"
    return None, f"no MFU without peak_tflops, {name} is {kind}"


def memory_gib(device: torch.device) -> float:
    """Peak memory of this process so far: allocated on the GPU, or resident on a CPU; in GiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
