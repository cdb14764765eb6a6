"""What a node is: Python, packages, limits, environment, the product's files, NVIDIA's GPUs. Standard library only."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import re
import resource
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
_VARIABLES = re.compile(
    r"(TORCH_)?NCCL_\w+|GLOO_\w+|UCX_\w+|OMP_\w+|MKL_NUM_THREADS|LD_LIBRARY_PATH|CUDA_VISIBLE_DEVICES|CUDA_HOME"
    r"|CUDA_DEVICE_MAX_CONNECTIONS|CUDA_LAUNCH_BLOCKING|CUBLAS_WORKSPACE_CONFIG|NVIDIA_TF32_OVERRIDE"
    r"|TORCH_ALLOW_TF32_CUBLAS_OVERRIDE|PYTORCH_(CUDA_)?ALLOC_CONF|DS_ACCELERATOR"
)
_SECONDS = 20


def python() -> dict[str, str]:
    """Version of the interpreter, and which one it is."""
    return {"version": platform.python_version(), "executable": sys.executable}


def packages(names: Sequence[str]) -> dict[str, str | None]:
    """Installed version of each package; None for one that is not there."""
    return {name: _version(name) for name in names}


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def source() -> dict[str, str]:
    """Git revision of the product, and a digest of the Python files that are really there."""
    files = sorted(
        [*ROOT.glob("*.py"), *(path for name in ("megatron", "eval_tasks") for path in (ROOT / name).rglob("*.py"))]
    )
    digest = hashlib.sha256()
    for path in files:
        digest.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes() + b"\0")
    return {"revision": _revision(), "digest": digest.hexdigest()[:12]}


def _revision() -> str:
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude", "*"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return result.stdout.strip() or "unknown"


def environment() -> dict[str, str]:
    """The variables that change how NCCL, CUDA, OpenMP and torch work."""
    return {name: value for name, value in sorted(os.environ.items()) if _VARIABLES.fullmatch(name)}


def limits() -> dict[str, int]:
    """Soft limits on open files and on locked memory in bytes (-1: none), and the size of /dev/shm in bytes."""
    return {
        "nofile": resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        "memlock": resource.getrlimit(resource.RLIMIT_MEMLOCK)[0],
        "shm": shutil.disk_usage("/dev/shm").total,
    }


def gpus() -> dict[str, Any]:
    """Driver, its CUDA version and the state of each NVIDIA GPU; `driver` is None on a machine without nvidia-smi.

    Raises RuntimeError with what nvidia-smi says when it fails.
    """
    if shutil.which("nvidia-smi") is None:
        return {"driver": None, "cuda": None, "gpus": []}
    result = subprocess.run(["nvidia-smi", "-q", "-x"], capture_output=True, text=True, timeout=_SECONDS)
    if result.returncode:
        raise RuntimeError(f"nvidia-smi: {(result.stdout + result.stderr).strip()[-300:]}")
    return read_smi(result.stdout)


def read_smi(text: str) -> dict[str, Any]:
    """What the XML of `nvidia-smi -q -x` says. A field that is not there counts as nothing wrong."""
    log = ElementTree.fromstring(text)
    devices = [_gpu(index, element) for index, element in enumerate(log.iter("gpu")) if _is_ours(index, element)]
    return {"driver": log.findtext("driver_version"), "cuda": log.findtext("cuda_version"), "gpus": devices}


def _is_ours(index: int, gpu: ElementTree.Element) -> bool:
    """Is it one that CUDA_VISIBLE_DEVICES leaves? Others may belong to another job."""
    visible = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    uuid = gpu.findtext("uuid") or ""
    return not visible or any(name == str(index) or uuid.startswith(name) for name in visible)


def _gpu(index: int, gpu: ElementTree.Element) -> dict[str, Any]:
    reasons = [*gpu.iterfind("clocks_event_reasons/*"), *gpu.iterfind("clocks_throttle_reasons/*")]
    active = [reason.tag for reason in reasons if (reason.text or "").strip() == "Active"]
    return {
        "index": index,
        "name": gpu.findtext("product_name"),
        "temperature": _number(gpu.findtext("temperature/gpu_temp")),
        "uncorrected": sum(_number(element.text) or 0 for element in _uncorrected(gpu)),
        "remap": [e.tag for e in gpu.iterfind("remapped_rows/*") if (e.text or "").strip() == "Yes"],
        "slowdown": [re.sub(r"^clocks_(event|throttle)_reasons?_", "", tag) for tag in active],
        "mig": (gpu.findtext("mig_mode/current_mig") or "").strip() == "Enabled",
        "processes": [
            _process(e) for e in gpu.iterfind("processes/process_info") if "C" in (e.findtext("type") or "C")
        ],
    }


def _uncorrected(gpu: ElementTree.Element) -> list[ElementTree.Element]:
    """Counts since the driver was loaded; GPUs before Ampere call them double-bit errors."""
    counts = [element for element in gpu.iterfind("ecc_errors/volatile/*") if "uncorrect" in element.tag]
    return counts or gpu.findall("ecc_errors/volatile/double_bit/total")


def _process(element: ElementTree.Element) -> str:
    name = os.path.basename((element.findtext("process_name") or "?").split(" ")[0])
    return f"{name} (pid {element.findtext('pid')}, {element.findtext('used_memory')})"


def _number(text: str | None) -> int | None:
    match = re.match(r"\s*(\d+)", text or "")
    return int(match[1]) if match else None
