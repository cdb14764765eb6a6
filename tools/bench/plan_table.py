"""The table of predicted layouts in docs/parallelism.md, computed by megatron.planner.

    python -m tools.bench.plan_table [--machine H200-141GB] [--gpus 8 64 512]

For each published training configuration, in bf16 and with its 1024 samples an update: the layout predicted fastest,
and the memory of the fullest GPU. Predictions, not measurements.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron.config import load_config
from megatron.errors import run_command
from megatron.planner import DEFAULT_MACHINE, Candidate, Workload, find_machine, plan
from megatron.planner.machine import GIB

CONFIGS = Path(__file__).parents[2] / "configs"
SIZES = ("150M", "450M", "900M", "1-5B")
SAMPLES, VOCABULARY = 1024, 50304  # of the published runs


def published_run(size: str) -> Workload:
    """The published training configuration in bf16, with its batch given for the whole run instead of for 8 GPUs."""
    overrides = {
        "train_batch_size": SAMPLES, "gradient_accumulation_steps": None, "padded_vocab_size": VOCABULARY,
    }  # fmt: skip
    return Workload.of(
        load_config([CONFIGS / "tokenformer" / f"{size}_train_pile.yml", CONFIGS / "bf16.yml"], overrides)
    )


def row(size: str, gpus: int, best: Candidate | None) -> str:
    """A line of the Markdown table."""
    if best is None:
        return f"| {size} | {gpus} | nothing fits | | | | | | | |"
    c, time = best.choice, best.time
    axes = f"{c.tensor} x {c.pipeline} x {c.data}" + (", sequence" if c.sequence_parallel else "")
    cells = (
        size,
        str(gpus),
        axes,
        str(c.zero_stage),
        f"{c.micro_batch} x {c.accumulation}" + (", recomputed" if c.recompute else ""),
        f"{best.memory.total / GIB:.1f}",
        f"{time.total:.3g}",
        f"{best.tokens_per_second / 1e6:.2f}M",
        f"{best.mfu:.0%}",
        f"{time.communication / time.total:.1%}",
    )
    return f"| {' | '.join(cells)} |"


def main(argv: Sequence[str]) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m tools.bench.plan_table")
    parser.add_argument("--machine", default=DEFAULT_MACHINE, metavar="NAME", help="known machine, or a YAML file")
    parser.add_argument("--gpus", nargs="+", type=int, default=[8, 64, 512])
    args = parser.parse_args(argv)
    machine = find_machine(args.machine)
    headings = ("model", "GPUs", "tensor x pipeline x data", "ZeRO", "micro x steps", "GiB/GPU", "s/update", "tokens/s")
    print("| " + " | ".join((*headings, "MFU", "comm")) + " |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for size in SIZES:
        work = published_run(size)
        for gpus in args.gpus:
            print(row(size, gpus, next(iter(plan(work, machine, gpus)), None)))


if __name__ == "__main__":
    sys.exit(run_command(lambda: main(sys.argv[1:])))
