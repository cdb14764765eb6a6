"""The device and the number formats of this process."""

from __future__ import annotations

import os

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def uses_gpu() -> bool:
    """Does this run use a GPU? DS_ACCELERATOR=cpu says no on a machine that has one."""
    return torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu"


def process_device() -> torch.device:
    """This process's GPU, or the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if uses_gpu() else torch.device("cpu")
