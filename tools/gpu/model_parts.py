"""The machine, and what a model computes on it without training: decoding, evaluation."""

from __future__ import annotations

import importlib.metadata
import math
import platform
import shutil
import subprocess
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from megatron.evaluation.perplexity import perplexity
from megatron.inference import generate
from megatron.inference.cache import KVCache
from megatron.model import LanguageModel
from megatron.mpu.device import DTYPES, process_device, why_no_gpu
from megatron.mpu.gpus import peak_tflops
from megatron.tokenizer import CharLevelTokenizer
from tools.gpu.running import Settings
from tools.gpu.small_runs import small_config

Check = tuple[str, bool, str]
NEEDED = (
    "torch",
    "deepspeed",
    "numpy",
    "pydantic",
    "PyYAML",
    "tokenizers",
    "safetensors",
    "tqdm",
    "zstandard",
    "psutil",
)
OPTIONAL = ("triton", "flash-attn", "apex", "mpi4py", "lm_eval", "transformers", "wandb", "tensorboard")
# Largest difference, as a part of the largest logit, between two ways of computing the same.
LOGITS = {"fp32": 1e-3, "bf16": 0.1, "fp16": 0.02}


def versions(settings: Settings) -> Iterator[Check]:
    """What is installed, and what torch and the driver say of the device."""
    yield "python", True, f"{platform.python_version()} on {platform.platform()}"
    found = {name: _version(name) for name in (*NEEDED, *OPTIONAL)}
    missing = [name for name in NEEDED if found[name] is None]
    yield "packages", not missing, ", ".join(f"{name} {found[name] or 'MISSING'}" for name in NEEDED)
    yield "optional packages", True, ", ".join(f"{name} {found[name] or '-'}" for name in OPTIONAL)
    if settings.device == "cpu":
        yield "device", True, f"CPU, {torch.get_num_threads()} threads; no GPU: {why_no_gpu()}"
        return
    properties = torch.cuda.get_device_properties(0)
    nccl = ".".join(map(str, torch.cuda.nccl.version())) if torch.distributed.is_nccl_available() else "none"
    yield "CUDA", True, f"torch's {torch.version.cuda}, NCCL {nccl}, driver {_driver()}"
    peak = peak_tflops(properties.name)
    rate = f"{peak[0]:g} TFLOP/s ({peak[1]})" if peak else "not in the table of peaks: give peak_tflops"
    yield "device", True, f"{properties.name}, {properties.total_memory / 2**30:.1f} GiB, {rate}"


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _driver() -> str:
    if shutil.which("nvidia-smi") is None:
        return "unknown (no nvidia-smi)"
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    return done.stdout.split("\n")[0].strip() or "unknown"


def _model(settings: Settings, dtype: torch.dtype) -> LanguageModel:
    config = small_config(settings, "model", padded_vocab_size=512).language
    model = LanguageModel(config, seed=3)
    with torch.no_grad():
        for parameter in model.parameters():  # at their initial size all logits would be alike
            parameter.mul_(4.0)
    return model.to(process_device(), dtype).eval()


def decoding(settings: Settings) -> Iterator[Check]:
    """Logits with a key-value cache against those without; generation from prompts of several lengths."""
    for name, dtype in DTYPES.items():
        if name == "fp16" and settings.device == "cpu":
            continue
        difference, scale = _cached_logits(_model(settings, dtype))
        ok = difference <= LOGITS[name] * scale
        yield (
            f"cached logits, {name}",
            ok,
            f"{difference:.1e} apart (largest {scale:.1f}, bound {LOGITS[name]:g} of it)",
        )
    model, tokenizer = _model(settings, torch.float32), CharLevelTokenizer()
    prompts = ["a", "the parameters of", "a model whose"]
    ways: dict[str, dict[str, Any]] = {
        "cached and not": {"recompute": True},
        "with and without fast_decoding": {"fast": False},  # on a GPU: recorded steps and steps that are not
    }
    for name, slow in ways.items():
        fast, plain = (generate(model, tokenizer, prompts, maximum_tokens=20, **how) for how in ({}, slow))
        equal = sum(a.text == b.text for a, b in zip(fast, plain, strict=True))
        yield f"generation, {name}", equal == len(prompts), f"{equal} of {len(prompts)} texts equal"


@torch.no_grad()
def _cached_logits(model: LanguageModel) -> tuple[float, float]:
    """(largest difference, largest logit) of a prefill and single steps against one pass over the whole text."""
    device, length = process_device(), model.config.seq_length
    ids = torch.randint(1, 256, (2, length), generator=torch.Generator().manual_seed(0)).to(device)
    whole = model(ids).float()
    cache = KVCache(model.config.num_layers, torch.zeros(2, dtype=torch.int64, device=device))
    half = length // 2
    parts = [model(ids[:, :half], cache.step(half))]
    parts += [model(ids[:, i : i + 1], cache.step(1)) for i in range(half, length)]
    return (torch.cat(parts, 1).float() - whole).abs().max().item(), whole.abs().max().item()


def evaluation(settings: Settings) -> Iterator[Check]:
    """Perplexity on the device against the CPU's in fp32."""
    tokens = np.random.RandomState(1).randint(1, 256, size=2000)
    length = small_config(settings, "model").language.seq_length
    expected = perplexity(_model(settings, torch.float32).cpu(), tokens, length)["loss"]
    for name, dtype in DTYPES.items():
        if name == "fp16" and settings.device == "cpu":
            continue
        found = perplexity(_model(settings, dtype), tokens, length)["loss"]
        bound = {"fp32": 1e-3, "bf16": 0.1, "fp16": 0.02}[name]
        ok = math.isfinite(found) and abs(found - expected) <= bound
        yield f"perplexity, {name}", ok, f"{abs(found - expected):.1e} nats from the CPU's fp32 (bound {bound:g})"
