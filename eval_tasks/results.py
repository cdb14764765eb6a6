"""Where results go: a JSON file, TensorBoard, Weights & Biases."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from megatron.config.schema import RunConfig
from megatron.files import write_output
from megatron.log import get_logger
from megatron.metrics import Metrics, Sink, TensorBoard, WandB


def results_path(prefix: str) -> Path:
    """`{prefix}_eval_results_{date and time}.json`; a prefix ending in a separator stays as it is."""
    if prefix and prefix[-1] not in "/_-.":
        prefix += "_"
    return Path(f"{prefix}eval_results_{datetime.now():%m-%d-%Y-%H-%M-%S}.json")


def write_results(results: Mapping[str, Any], path: Path) -> None:
    """Write the results file; a number that is not finite is null. Raises UserError when it cannot be written."""
    text = json.dumps(_finite(results), indent=2, default=_plain, ensure_ascii=False)
    write_output(path, text + "\n", "eval_results_prefix")
    get_logger().info("results written to %s", path)


def _finite(value: Any) -> Any:
    """`value` with None for what JSON has no number for."""
    if isinstance(value, Mapping):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _plain(value: Any) -> Any:
    """What JSON lacks: numpy's numbers, sets, and anything else by its text."""
    if callable(getattr(value, "item", None)):
        return _finite(value.item())
    return sorted(value, key=str) if isinstance(value, (set, frozenset)) else str(value)


def flat_metrics(results: Mapping[str, Any]) -> Metrics:
    """The numbers of run_evaluation as `eval/{task}/{metric}`, with the checkpoint's `iteration` (0 if it has none)."""
    step = re.search(r"global_step(\d+)$", results["checkpoint"])
    metrics: Metrics = {"iteration": int(step[1]) if step else 0}
    for task, values in results["results"].items():
        for key, value in values.items():
            metric, comma, filter_name = key.partition(",")
            if comma and isinstance(value, (int, float)):
                name = metric if filter_name == "none" else f"{metric}_{filter_name}"
                metrics[f"eval/{task}/{name}"] = value
    if "summary" in results:
        metrics["eval/average"] = results["summary"]["this model"]["average"]
    return metrics


def log_to_boards(config: RunConfig, metrics: Metrics) -> None:
    """Send metrics to TensorBoard (tensorboard_dir) and Weights & Biases (use_wandb), where configured.

    The results are on disk by then: a board that fails costs a warning.
    """
    folder = config.logging.tensorboard_dir
    boards: dict[str, Callable[[], Sink]] = {"tensorboard_dir": lambda: TensorBoard(folder or "")} if folder else {}
    if config.logging.use_wandb:
        boards["use_wandb"] = lambda: WandB(config)
    for name, make in boards.items():
        try:
            sink = make()
            sink.write(metrics)
            sink.close()
        except Exception as error:  # whatever a library of others comes to
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            get_logger().warning("%s: the results are not logged there: %s", name, reason.removeprefix(f"{name}: "))
