"""Training steps of the published sizes on one device, and what the planner says of them on the machine as measured.

Each part adds its lines to `mfu.jsonl` in the folder of the settings, where `machine.yml` lies already.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator
from pathlib import Path

from megatron.planner import Workload, predict, read_machine
from megatron.planner.networks import flops_per_token
from tools.gpu.running import Settings
from tools.gpu.speed_parts import KINDS, first_micro_batch, largest_that_fits, published_step

Check = tuple[str, bool, str]


def mfu_150m(settings: Settings) -> Iterator[Check]:
    """Of 150M."""
    yield from _mfu(settings, "150M", rounds=2)


def mfu_450m(settings: Settings) -> Iterator[Check]:
    """Of 450M."""
    yield from _mfu(settings, "450M", rounds=1)


def mfu_900m(settings: Settings) -> Iterator[Check]:
    """Of 900M."""
    yield from _mfu(settings, "900M", rounds=1)


def mfu_1_5b(settings: Settings) -> Iterator[Check]:
    """Of 1-5B."""
    yield from _mfu(settings, "1-5B", rounds=1)


def _mfu(settings: Settings, size: str, rounds: int) -> Iterator[Check]:
    """TokenFormer and Transformer in turns, with one micro-batch for both: what the larger one fits."""
    micro = first_micro_batch(settings, size)
    rates: dict[str, list[tuple[float, float | None]]] = {kind: [] for kind in KINDS}
    for number in range(1 if settings.toy else rounds):
        for kind in KINDS:
            micro = largest_that_fits(settings, kind, size, micro, number, rates[kind])
    for kind, found in rates.items():
        line = _line(settings, kind, size, micro, statistics.median(rate for rate, _ in found))
        with (Path(settings.folder) / "mfu.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        figures = f"MFU {line['mfu']:.1%}, planned {line['predicted_mfu']:.1%}"
        yield f"{size}, {kind}", True, f"{line['tokens_per_second']:,.0f} tokens/s, {figures}, {micro} samples"


def _line(settings: Settings, kind: str, size: str, micro: int, rate: float) -> dict[str, float | str]:
    """MFU is against the peak of the machine file, so that a device without a data sheet has one too."""
    machine = read_machine(str(Path(settings.folder) / "machine.yml"))
    config = published_step(settings, kind, size, "planned", train_micro_batch_size_per_gpu=micro)
    work = Workload.of(config)
    predicted = predict(work, machine, work.configured(1))
    return {
        "size": size, "model": kind, "samples": micro, "tokens_per_second": rate,
        "mfu": rate * flops_per_token(work.model) / machine.peak_flops,
        "predicted_mfu": predicted.mfu, "predicted_tokens_per_second": predicted.tokens_per_second,
    }  # fmt: skip
