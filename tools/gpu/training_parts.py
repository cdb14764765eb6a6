"""What training computes on this device, against the CPU's fp32 and against itself."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import yaml

from megatron.checkpoint.store import CheckpointReader
from megatron.engine.optimizer import build_optimizer
from megatron.engine.settings import EngineSettings
from megatron.model import LanguageModel
from megatron.mpu.device import process_device
from megatron.training import train
from tools.gpu.running import Settings, Skip
from tools.gpu.small_runs import losses, small_config, train_small, worst
from tools.gpu.small_runs import reference as expected_losses

Check = tuple[str, bool, str]
ROOT = Path(__file__).parents[2]

# Largest difference of a loss from the CPU's fp32 run, in nats. Rounding to 8 (bf16) or 11 (fp16) bits moves a loss of
# 5 by about 0.02 and 0.003; differences grow over the updates.
BOUNDS = {"fp32": 5e-3, "bf16": 0.1, "fp16": 0.05}
# Between two ways of computing the same in fp32 on one device.
SAME = 2e-3


def reference(settings: Settings) -> Iterator[Check]:
    """fp32 on the CPU: what the other parts are compared with."""
    found = train_small(settings, "reference", distributed_backend="gloo")
    (Path(settings.folder) / "reference.json").write_text(json.dumps(found))
    yield "fp32 on the CPU learns", found[-1] < found[0], f"loss {found[0]:.3f} to {found[-2]:.3f}"


def precision(settings: Settings) -> Iterator[Check]:
    """Every number format at every ZeRO stage."""
    expected = expected_losses(settings)
    for dtype, bound in BOUNDS.items():
        if dtype == "fp16" and settings.device == "cpu":
            continue  # DeepSpeed refuses it there
        for stage in (0,) if dtype == "fp32" else (0, 1, 3):
            # The scale starts where it does not overflow: a skipped update would be another run.
            keys: dict[str, Any] = {"precision": dtype, "zero_optimization": {"stage": stage}}
            keys["fp16"] = {"initial_scale_power": 8}
            found = train_small(settings, f"{dtype}-{stage}", **keys)
            distance = worst(found, expected)
            yield f"{dtype}, ZeRO {stage}", distance <= bound, f"{distance:.1e} from the CPU's fp32 (bound {bound:g})"


def resume(settings: Settings) -> Iterator[Check]:
    """A run that is killed and started again ends with the bits of one that was not."""
    keys: dict[str, Any] = {"deterministic": True, "checkpoint_factor": 5, "hidden_dropout": 0.1}
    iterations = small_config(settings, "whole").training.train_iters or 0
    keys["train_iters"] = 5 * iterations if settings.toy else 2 * iterations
    whole = train_small(settings, "whole", **keys)
    folder = Path(settings.folder) / "killed"
    reached = _train_and_kill(settings, small_config(settings, "killed", **keys).flat(), folder)
    yield "killed before its end", reached, f"at iteration {len(losses(folder))} of {keys['train_iters']}"
    train(small_config(settings, "killed", **keys))
    found = losses(folder)
    yield "losses of the resumed run", found == whole, f"largest difference {worst(found, whole):.1e}"
    left, right = (CheckpointReader(Path(settings.folder) / n / f"global_step{keys['train_iters']}") for n in NAMES)
    names = [(kind, name) for kind in ("model", "optimizer") for name in right.names(kind)]
    other = [name for kind, name in names if not torch.equal(left.tensor(kind, name), right.tensor(kind, name))]
    yield "weights and moments, bit for bit", not other, f"{len(names) - len(other)} of {len(names)} tensors equal"


NAMES = ("killed", "whole")


def _train_and_kill(settings: Settings, keys: dict[str, Any], folder: Path) -> bool:
    """Start train.py, and kill it some iterations after its first checkpoint; was it still running?"""
    file = Path(settings.folder) / "killed.yml"
    file.write_text(yaml.safe_dump(keys), encoding="utf-8")
    ranks = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "LOCAL_PROCESS")
    environment = {name: value for name, value in os.environ.items() if name not in ranks}
    environment["OMP_NUM_THREADS"] = str(torch.get_num_threads())  # sums of as many parts as here
    process = subprocess.Popen([sys.executable, "train.py", str(file)], cwd=ROOT, env=environment)
    while process.poll() is None:
        if (folder / "metrics.jsonl").exists() and len(losses(folder)) >= 8 and (folder / "latest").exists():
            break
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    return process.wait() == -signal.SIGKILL


def growth(settings: Settings) -> Iterator[Check]:
    """Growing inside a run leaves the loss what it was; tokens with a row norm of their own come last."""
    config = small_config(settings, "grown")
    at, model = (config.training.train_iters or 0) // 2, config.model
    sizes = {f"{kind}_slot_num": 2 * (getattr(model, f"{kind}_slot_num") or 0) for kind in ("qkv", "proj", "ffn")}
    scheduled = {"at_iteration": at, **sizes, "lr_policy": "continue"}
    own = {**scheduled, "at_iteration": at + 2, "ffn_slot_num": 3 * (model.ffn_slot_num or 0), "row_norm": "segment"}
    plain, found = train_small(settings, "ungrown"), train_small(settings, "grown", growth=[scheduled, own])
    distance = abs(found[at] - plain[at])
    yield "loss after growing", distance <= SAME, f"{distance:.1e} from the run that did not grow (bound {SAME:g})"
    lineage = CheckpointReader(Path(settings.folder) / "grown" / f"global_step{len(plain) - 1}").train_state["lineage"]
    for name, entry in zip(("", ", own row norm"), lineage, strict=True):
        difference = entry["logit_difference"]
        yield f"proof of unchanged logits{name}", difference < 1e-3, f"{difference:.1e}"


def recomputation(settings: Settings) -> Iterator[Check]:
    """Recomputed blocks give the same losses, in less memory."""
    peaks = []
    runs = []
    for name, keys in (("kept", {}), ("recomputed", {"checkpoint_activations": True})):
        if settings.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        runs.append(train_small(settings, name, **keys))
        peaks.append(torch.cuda.max_memory_allocated() / 2**20 if settings.device == "cuda" else 0.0)
    distance = worst(*runs)
    yield "losses with recomputation", distance <= SAME, f"{distance:.1e} from those without (bound {SAME:g})"
    if settings.device == "cuda":
        yield "memory with recomputation", peaks[1] < peaks[0], f"{peaks[1]:.0f} MiB instead of {peaks[0]:.0f} MiB"


def optimizers(settings: Settings) -> Iterator[Check]:
    """torch's fused AdamW, and the others that need a GPU where they are installed."""
    config = small_config(settings, "optimizer", padded_vocab_size=512)
    model = LanguageModel(config.language, device=process_device())
    fused = build_optimizer(model, EngineSettings(config, config.update_size(1))).defaults.get("fused")
    yield "AdamW of torch is fused", fused is True, f"fused={fused}"
    if importlib.util.find_spec("apex") is None:
        raise Skip("NVIDIA apex is not installed (optional)")
    params = config.optimization.optimizer.params.model_dump()
    found = train_small(settings, "apex", optimizer={"type": "ApexAdam", "params": params})
    plain = train_small(settings, "adam")
    yield "apex's AdamW", worst(found, plain) <= SAME, f"{worst(found, plain):.1e} from torch's (bound {SAME:g})"


def flash_attention(settings: Settings) -> Iterator[Check]:
    """flash-attn against torch's attention."""
    if settings.device == "cpu":
        raise Skip("flash-attn needs a GPU")
    if importlib.util.find_spec("flash_attn") is None:
        raise Skip("flash-attn is not installed (optional)")
    runs = [train_small(settings, name, precision="bf16", attention_backend=name) for name in ("sdpa", "flash_attn")]
    yield "losses with flash-attn", worst(*runs) <= BOUNDS["bf16"], f"{worst(*runs):.1e} from torch's attention"


def two_ranks(settings: Settings) -> Iterator[Check]:
    """Two processes share the device, and a model, by tensors and by stages."""
    expected = expected_losses(settings)
    batch = small_config(settings, "batch").training.train_micro_batch_size_per_gpu
    layouts: dict[str, dict[str, Any]] = {
        "tensor parallel": {"model_parallel_size": 2},
        "tensor and sequence parallel": {"model_parallel_size": 2, "sequence_parallel": True},
        "pipeline": {"pipe_parallel_size": 2},
        "data parallel, ZeRO 1": {"zero_optimization": {"stage": 1}, "train_batch_size": batch},
    }
    shared = {"distributed_backend": "gloo", "ranks_per_gpu": 2}
    for name, keys in layouts.items():
        if "train_batch_size" in keys and batch is not None:
            keys["train_micro_batch_size_per_gpu"] = batch // 2
        found = train_small(settings, f"ranks {name}", **shared, **keys)
        distance = worst(found, expected)
        figure = f"{distance:.1e} from one process on the CPU (bound {BOUNDS['fp32']:g})"
        yield name, distance <= BOUNDS["fp32"], figure
