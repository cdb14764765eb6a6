"""Compares our log-likelihoods with those of lm-eval's HFLM, request by request, on local files of the six tasks.

    python -m tools.bench.hflm_agreement SETS MODEL [MODEL ..] [--limit 200]

SETS is a folder of {task}*.jsonl (lambada_openai, hellaswag, piqa, arc_easy, arc_challenge, winogrande). A MODEL is a
folder in Hugging Face's form with a tokenizer.json. Exit code 1 when a difference reaches --tolerance.

HFLM sums in fp32, whose rounding is 1.2e-4 from 1024 nats on: for the unlikely long answers of random models compare
with --softmax-dtype float64.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

from megatron.errors import run_command
from tools.bench.eval_sets import build_models, task_manager, write_tasks


def answers(lm: Any, tasks: list[str], folder: Path, limit: int) -> tuple[dict[str, Any], dict[str, list[Any]]]:
    """Metrics of each task, and (log-likelihood, greedy) of each of its requests in order."""
    from lm_eval import simple_evaluate

    found = simple_evaluate(lm, tasks=tasks, task_manager=task_manager(folder), limit=limit, bootstrap_iters=0)
    assert found is not None, "one process"
    samples = found["samples"]
    return found["results"], {
        task: [tuple(answer[0]) for sample in samples[task] for answer in sample["resps"]] for task in tasks
    }


def compare(model: str, tasks: list[str], folder: Path, limit: int, batch_size: int, softmax_dtype: str) -> float:
    """Print a line for each task; the largest difference comes back."""
    both = [answers(lm, tasks, folder, limit) for lm in build_models(model, batch_size, softmax_dtype).values()]
    (their_metrics, theirs), (our_metrics, ours) = both
    largest = 0.0
    for task in tasks:
        pairs = list(zip(theirs[task], ours[task], strict=True))
        difference = max(abs(float(a[0]) - float(b[0])) for a, b in pairs)
        deepest = min(float(a[0]) for a, _ in pairs)
        greedy = sum(str(a[1]) != str(b[1]) for a, b in pairs)
        metrics = [k for k, v in their_metrics[task].items() if k in ("acc,none", "acc_norm,none") and v is not None]
        same = all(their_metrics[task][key] == our_metrics[task][key] for key in metrics)
        print(
            f"{Path(model).name:<24} {task:<15} {len(pairs):>5} requests down to {deepest:.0f} nats  "
            f"largest difference {difference:.1e}  greedy differs {greedy}  accuracies {'equal' if same else 'DIFFER'}",
            flush=True,
        )
        largest = max(largest, difference)
    return largest


def main() -> int:
    """Compare every model; returns the exit code."""
    parser = argparse.ArgumentParser(prog="hflm_agreement")
    parser.add_argument("sets", type=Path, help="folder of the sets")
    parser.add_argument("models", nargs="+", help="folders of models")
    parser.add_argument("--limit", type=int, default=200, help="documents of each set")
    parser.add_argument("--batch-size", type=int, default=16, help="requests computed together")
    parser.add_argument("--tolerance", type=float, default=1e-4, help="largest difference allowed")
    parser.add_argument("--softmax-dtype", default="float32", help="what HFLM sums in")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        tasks = write_tasks(args.sets, Path(folder))
        options = (tasks, Path(folder), args.limit, args.batch_size, args.softmax_dtype)
        found = [compare(model, *options) for model in args.models]
    return int(max(found) >= args.tolerance)


if __name__ == "__main__":
    sys.exit(run_command(main))
