"""Measures what the planner assumes of a machine, and writes the file that it reads.

    python -m tools.bench.machine FILE.yml [--quick]

On a GPU of megatron.planner the file starts from its data sheet (`base`), and the fractions say how much of it products
and memory traffic reach here. Anywhere else it holds what was measured, with fractions of 1.

    python deepy.py train.py configs/... --dry-run --machine FILE.yml
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml

from megatron.errors import run_command
from megatron.files import write_output
from megatron.planner import MACHINES
from megatron.planner.step_time import FP32_SLOWDOWN
from tools.bench.measure import default_device, synchronize


def fastest(work: Callable[[], object], device: torch.device, seconds: float, calls: int = 1) -> float:
    """Seconds of one call of `work` in the fastest of the rounds of `calls` that fit into so many seconds."""
    for _ in range(2):
        work()
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end or best == float("inf"):
        synchronize(device)
        begin = time.perf_counter()
        for _ in range(calls):
            work()
        synchronize(device)
        best = min(best, (time.perf_counter() - begin) / calls)
    return best


def product_flops(device: torch.device, size: int, seconds: float) -> float:
    """FLOP/s of products of the shapes that training has: [2 size, size] times [size, size], 16 bits on a GPU."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    left, right = (torch.randn(rows, size, device=device, dtype=dtype) for rows in (2 * size, size))
    out = torch.empty(2 * size, size, device=device, dtype=dtype)
    return 4.0 * size**3 / fastest(lambda: torch.matmul(left, right, out=out), device, seconds, calls=3)


def memory_bandwidth(device: torch.device, size: int, seconds: float) -> float:
    """Bytes/s, read and written, of a sum of two arrays of `size` bytes into a third."""
    left, right, out = (torch.ones(size // 4, device=device) for _ in range(3))
    return 3.0 * size / fastest(lambda: torch.add(left, right, out=out), device, seconds, calls=3)


def launch_seconds(device: torch.device, seconds: float) -> float:
    """Host time of an operation on next to nothing."""
    value = torch.ones(1, device=device)
    return fastest(lambda: value.add_(1.0), device, seconds, calls=200)


def measured(device: torch.device, quick: bool) -> dict[str, Any]:
    """The fields of a machine file."""
    on_gpu, seconds = device.type == "cuda", 0.2 if quick else 3.0
    product = product_flops(device, 8192 if on_gpu else 512, seconds)
    bandwidth = memory_bandwidth(device, 2**30 if on_gpu else 2**25, seconds)
    launch = launch_seconds(device, seconds / 2)
    facts: dict[str, Any] = {"launch_seconds": float(f"{launch:.3g}")}
    base = _data_sheet(device)
    if base is not None:
        sheet = MACHINES[base]
        fractions = {"compute": product / sheet.peak_flops, "bandwidth": bandwidth / sheet.memory_bandwidth}
        facts |= {f"{name}_fraction": round(min(1.0, value), 3) for name, value in fractions.items()}
        return {"base": base, "name": f"{base}, measured", **facts}
    if not on_gpu:
        product *= FP32_SLOWDOWN  # the planner knows 16-bit rates, and takes fp32 to be so much slower
    total = torch.cuda.get_device_properties(device).total_memory if on_gpu else _main_memory()
    facts |= {"memory_bytes": float(total), "peak_flops": round(product), "memory_bandwidth": round(bandwidth)}
    return {"name": "measured", "gpus_per_node": 1, **facts, "compute_fraction": 1.0, "bandwidth_fraction": 1.0}


def _data_sheet(device: torch.device) -> str | None:
    """The planner's machine with this GPU; None where it knows none of its name and memory."""
    if device.type != "cuda":
        return None
    properties = torch.cuda.get_device_properties(device)
    return next(
        (
            name
            for name, machine in MACHINES.items()
            if name.partition("-")[0] in properties.name.replace("-", " ").split()
            and abs(properties.total_memory / machine.memory_bytes - 1) < 0.1
        ),
        None,
    )


def _main_memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def main() -> int:
    """Measure and write."""
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("file", type=Path)
    flags.add_argument("--quick", action="store_true", help="a second instead of ten")
    options = flags.parse_args()
    text = yaml.safe_dump(measured(default_device(), options.quick), sort_keys=False)
    write_output(options.file, text, "FILE")
    print(text, end="")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
