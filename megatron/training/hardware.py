"""What a run runs on: the peak rate of a device, the memory in use, and a line that says it."""

from __future__ import annotations

import resource

import torch

from megatron.config.update_size import UpdateSize
from megatron.engine.settings import EngineSettings
from megatron.log import get_logger
from megatron.mpu.device import process_device
from megatron.mpu.gpus import is_mig_slice, peak_tflops
from megatron.mpu.layout import Layout
from megatron.ops.pattention_backends import select_backend


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


def report(settings: EngineSettings, layout: Layout, parameters: int, update: UpdateSize, measure: str) -> None:
    """Log what is trained, on what, and how large an update is; `measure` says how MFU is counted."""
    log, device = get_logger(), process_device()
    backend, _ = select_backend(settings.pattention_backend, device.type, settings.recompute_scores)
    log.info(
        "%s parameters in %s on %d x %s%s, ZeRO %d, pattention %s, attention %s%s%s",
        f"{parameters:,}", settings.dtype, layout.world_size, device.type, _grid(layout),
        settings.zero_stage, backend, settings.attention_backend, ", blocks compiled" * settings.compile_blocks,
        "" if settings.ema_decay is None else f", EMA of decay {settings.ema_decay}",
    )  # fmt: skip
    log.info("%d samples x %d tokens an update; %s", update.samples, update.tokens // update.samples, measure)


def _grid(layout: Layout) -> str:
    """` (2 data x 1 pipeline x 4 tensor, sequence parallel)`; nothing for one process."""
    if layout.world_size == 1:
        return ""
    axes = f"{layout.data.size} data x {layout.pipeline.size} pipeline x {layout.tensor.size} tensor"
    return f" ({axes}{', sequence parallel' if layout.sequence_parallel else ''})"
