"""Memory against the planner, and training steps of the published models beside the Transformer of equal size."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from megatron.config import RunConfig, load_config
from megatron.errors import UserError
from megatron.mpu.device import process_device
from megatron.planner import Workload
from megatron.planner.memory import memory_of
from megatron.training import train
from tools.gpu.running import Settings, Skip
from tools.gpu.small_runs import corpus

Check = tuple[str, bool, str]
ROOT = Path(__file__).parents[2]
KINDS = ("tokenformer", "transformer")
# Samples of 2048 tokens that fit, by GiB of the device.
_MICRO_BATCHES = {
    "150M": ((70, 16), (35, 8), (20, 4), (0, 1)), "450M": ((130, 16), (70, 8), (35, 4), (0, 1)),
    "900M": ((130, 8), (70, 4), (0, 1)), "1-5B": ((130, 8), (70, 4), (0, 1)),
}  # fmt: skip
MEMORY_BOUND = 0.3  # of the planner's figure, which leaves out the allocator's fragments


def published_step(settings: Settings, kind: str, size: str, folder: str, **keys: Any) -> RunConfig:
    """A training step of a published model: real shapes, made-up tokens."""
    overrides: dict[str, Any] = {
        "tokenizer_type": "CharLevelTokenizer", "vocab_file": None, "padded_vocab_size": 50304,
        "data_path": corpus(settings, vocabulary=50000, tokens=2_000_000), "precision": "bf16", "eval_iters": 0,
        "train_iters": 10, "gradient_accumulation_steps": 1, "save": None, "load": None, "tensorboard_dir": None,
        "log_dir": str(Path(settings.folder) / folder), "num_workers": 2, "checkpoint_activations": False,
    }  # fmt: skip
    if settings.toy:
        overrides |= {
            "num_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "attention_config": None, "seq_length": 64,
            "max_position_embeddings": 64, "padded_vocab_size": 512, "data_path": corpus(settings), "num_workers": 0,
            "distributed_backend": "gloo", "train_iters": 4,
        }  # fmt: skip
        sizes = {"qkv_slot_num": 64, "proj_slot_num": 64, "ffn_slot_num": 256}
        overrides |= sizes if kind == "tokenformer" else {"intermediate_size": 384}
    return load_config([ROOT / f"configs/{kind}/{size}_train_pile.yml"], {**overrides, **keys})


def first_micro_batch(settings: Settings, size: str) -> int:
    """The micro-batch to try first, by the memory of the device."""
    if settings.toy:
        return 2
    memory = torch.cuda.get_device_properties(0).total_memory / 2**30
    return next(count for least, count in _MICRO_BATCHES[size] if memory >= least)


def memory(settings: Settings) -> Iterator[Check]:
    """Memory of a training step of 150M, measured, against the planner's prediction."""
    if settings.device == "cpu":
        raise Skip("a CPU process has no memory of its own to measure")
    micro = max(1, first_micro_batch(settings, "150M") // 2)
    for recompute in (False, True):
        keys = {"train_micro_batch_size_per_gpu": micro, "checkpoint_activations": recompute, "train_iters": 3}
        config = published_step(settings, "tokenformer", "150M", f"memory-{recompute}", **keys)
        torch.cuda.reset_peak_memory_stats()
        train(config)
        measured = torch.cuda.max_memory_allocated()
        work = Workload.of(config)
        predicted = memory_of(work, work.configured(1)).total
        what = "recomputed" if recompute else "kept"
        ok = abs(measured / predicted - 1) <= MEMORY_BOUND
        figure = f"{measured / 2**30:.2f} GiB, planned {predicted / 2**30:.2f} ({measured / predicted:.2f} times)"
        yield f"150M, {micro} samples, activations {what}", ok, figure


def _step_rate(settings: Settings, kind: str, size: str, micro: int, round_number: int) -> tuple[float, float | None]:
    """Median (tokens/s, MFU) of the iterations after the first ones; the micro-batch is halved until it fits."""
    folder = f"speed-{kind}-{size}-{round_number}"
    config = published_step(settings, kind, size, folder, train_micro_batch_size_per_gpu=micro)
    train(config)
    lines = [json.loads(line) for line in (Path(settings.folder) / folder / "metrics.jsonl").open()]
    steady = lines[len(lines) // 3 :]
    mfu = statistics.median(line["mfu"] for line in steady) if "mfu" in steady[0] else None
    return statistics.median(line["tokens_per_second"] for line in steady), mfu


def _speed(settings: Settings, size: str, rounds: int) -> Iterator[Check]:
    micro = first_micro_batch(settings, size)
    rates: dict[str, list[tuple[float, float | None]]] = {kind: [] for kind in KINDS}
    for number in range(rounds):
        for kind in KINDS:  # in turns, so that a machine that slows down slows both
            micro = largest_that_fits(settings, kind, size, micro, number, rates[kind])
    where = torch.cuda.get_device_name(0) if settings.device == "cuda" else "CPU, toy size"
    medians = {kind: statistics.median(rate for rate, _ in found) for kind, found in rates.items()}
    for kind, found in rates.items():
        mfus = [mfu for _, mfu in found if mfu is not None]
        mfu = f", MFU {statistics.median(mfus):.1%}" if mfus else ", no MFU"
        yield f"{size}, {kind}", medians[kind] > 0, f"{medians[kind]:,.0f} tokens/s{mfu}; {micro} samples; {where}"
    ratio = medians["tokenformer"] / medians["transformer"]
    yield f"{size}, TokenFormer beside the Transformer", True, f"{ratio:.2f} times its tokens/s"


def largest_that_fits(
    settings: Settings, kind: str, size: str, micro: int, number: int, rates: list[tuple[float, float | None]]
) -> int:
    """Add (tokens/s, MFU) of steps with the largest micro-batch from `micro` down that fits, which comes back."""
    while True:
        try:
            rates.append(_step_rate(settings, kind, size, micro, number))
            return micro
        except torch.OutOfMemoryError:
            if micro == 1:
                raise UserError(f"{size}: one sample does not fit into {process_device()}") from None
        torch.cuda.empty_cache()
        micro //= 2


def speed_150m(settings: Settings) -> Iterator[Check]:
    """Training steps of 150M."""
    yield from _speed(settings, "150M", 1 if settings.quick or settings.toy else 3)


def speed_1_5b(settings: Settings) -> Iterator[Check]:
    """Training steps of 1-5B."""
    if settings.quick:
        raise Skip("left out by --quick")
    yield from _speed(settings, "1-5B", 1 if settings.toy else 2)
