"""Requests a second of our evaluation beside lm-eval's HFLM, on the same model, measured in turn in one run.

    python -m tools.bench.eval_throughput SETS MODEL [--limit 20] [--rounds 3] [--batch-size 8]

SETS and MODEL are as for hflm_agreement. Both score the same requests of each task, already built, one task after the
other; printed are the medians over the rounds and their ratio.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from megatron.errors import run_command
from tools.bench.eval_sets import build_models, task_manager, write_tasks


def build_requests(folder: Path, tasks: list[str], limit: int) -> dict[str, list[Any]]:
    """The log-likelihood requests of the first `limit` documents of each task."""
    from lm_eval.tasks import get_task_dict

    found = get_task_dict(tasks, task_manager(folder))
    for task in found.values():
        task.build_all_requests(limit=limit)
    return {name: list(task.instances) for name, task in found.items()}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="eval_throughput")
    parser.add_argument("sets", type=Path, help="folder of the sets")
    parser.add_argument("model", help="folder of the model")
    parser.add_argument("--limit", type=int, default=20, help="documents of each set")
    parser.add_argument("--rounds", type=int, default=3, help="measurements of each")
    parser.add_argument("--batch-size", type=int, default=8, help="requests computed together")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        requests = build_requests(Path(folder), write_tasks(args.sets, Path(folder)), args.limit)
    models = build_models(args.model, args.batch_size)
    seconds: dict[str, dict[str, list[float]]] = {task: {name: [] for name in models} for task in requests}
    for _ in range(args.rounds):
        for task, instances in requests.items():
            for name, lm in models.items():
                start = time.perf_counter()
                lm.loglikelihood(instances, disable_tqdm=True)
                seconds[task][name].append(time.perf_counter() - start)
    _print(requests, seconds)


def _print(requests: dict[str, list[Any]], seconds: dict[str, dict[str, list[float]]]) -> None:
    total = {"HFLM": 0.0, "ours": 0.0}
    for task, times in seconds.items():
        medians = {name: statistics.median(values) for name, values in times.items()}
        total = {name: total[name] + medians[name] for name in total}
        _print_line(task, len(requests[task]), medians)
    _print_line("all", sum(map(len, requests.values())), total)


def _print_line(task: str, count: int, medians: dict[str, float]) -> None:
    theirs, ours = medians["HFLM"], medians["ours"]
    print(
        f"{task:<15} {count:>5} requests  HFLM {count / theirs:8.2f}/s  ours {count / ours:8.2f}/s  "
        f"{theirs / ours:.2f} times HFLM's"
    )


if __name__ == "__main__":
    sys.exit(run_command(main))
