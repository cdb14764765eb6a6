"""What the planner predicts of a training step on one device beside what is measured.

    python -m tools.bench.planner [--machine NAME or FILE] [--sizes 150M 450M] [--samples 8] [--rounds 5] [--json FILE]

Without --machine the device is measured first (tools.bench.machine). The steps are those of tools.bench.step: bf16 on a
GPU, fp32 on a CPU, one micro-batch, no recomputation; predicted and measured include the optimizer. `--sizes toy` is a
model of a second.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import yaml

from megatron.config import load_config
from megatron.errors import UserError, run_command
from megatron.planner import Candidate, Machine, Workload, find_machine, predict, read_machine
from megatron.text import align
from tools.bench.machine import measured as measured_machine
from tools.bench.measure import Result, as_document, default_device, parser, where, write_json
from tools.bench.step import measure
from tools.bench.step_models import Shape

SHAPES = {
    "toy": Shape(2, 128, 4, 2048, 64),
    "150M": Shape(12, 768, 12, length=2048),
    "450M": Shape(24, 1024, 16, length=2048),
    "900M": Shape(32, 1280, 16, length=2048),
    "1-5B": Shape(40, 1536, 16, length=2048),
}
"""The published sizes, and one for a CPU in a hurry."""
KINDS = ("TokenFormer", "Transformer")


def prediction(shape: Shape, kind: str, samples: int, machine: Machine, precision: str) -> Candidate:
    """Of one step of so many samples on one device."""
    section = shape.tokenformer() if kind == "TokenFormer" else shape.transformer()
    keys: dict[str, Any] = {
        **section.model_dump(exclude_unset=True), "precision": precision, "train_micro_batch_size_per_gpu": samples,
    }  # fmt: skip
    work = Workload.of(load_config([], keys))
    return predict(work, machine, work.configured(1))


def main() -> int:
    """Measure and print."""
    flags = parser(__doc__, rounds=5)
    flags.add_argument("--machine", help="a known machine, or a YAML file")
    flags.add_argument("--sizes", nargs="+", choices=SHAPES, default=["150M"])
    flags.add_argument("--samples", type=int, default=8, help="samples of a step")
    options = flags.parse_args()
    if options.samples < 1:
        raise UserError(f"--samples: {options.samples}; give a positive number")
    device = default_device()
    machine = find_machine(options.machine) if options.machine else _measure_machine(device)
    tables = {size: _measure(size, options, machine, device) for size in options.sizes}
    print(f"{machine.name}; {where(device)}; {options.samples} samples a step")
    head = ("size", "model", "measured", "predicted", "predicted / measured")
    rows = [
        (size, kind, *(f"{value * 1e3:,.3g} ms" for value in (r.median, r.facts["predicted"])), r.facts["of measured"])
        for size, results in tables.items()
        for kind, r in results.items()
    ]
    print("\n".join(align([head, *rows], [0, 1])))
    write_json(options.json, as_document("planner", tables, vars(options), device))
    return 0


def _measure_machine(device: torch.device) -> Machine:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "measured.yml"
        file.write_text(yaml.safe_dump(measured_machine(device, quick=True)), encoding="utf-8")
        return read_machine(str(file))


def _measure(size: str, options: Any, machine: Machine, device: torch.device) -> dict[str, Result]:
    shape, precision = SHAPES[size], "bf16" if device.type == "cuda" else "fp32"
    results = measure(shape, options.samples, list(KINDS), "auto", options.rounds, device)
    for kind, result in results.items():
        found = prediction(shape, kind, options.samples, machine, precision)
        ratio = f"{found.time.total / result.median:.2f}"
        result.facts |= {"predicted": found.time.total, "of measured": ratio, "predicted MFU": found.mfu}
    return results


if __name__ == "__main__":
    sys.exit(run_command(main))
