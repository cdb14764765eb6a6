"""What eval.py does: lm-eval's tasks on a checkpoint, a table, and a results file."""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron.config.schema import EvaluationConfig, RunConfig
from megatron.errors import UserError
from megatron.inference.prepare import checkpoint_source, load_for_inference
from megatron.log import get_logger

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

    from eval_tasks.adapter import TokenFormerLM

# Standard errors without a closed form (perplexities) come from this many resamples.
BOOTSTRAP_ITERS = 100


def run_evaluation(config: RunConfig) -> dict[str, Any]:
    """Evaluate the checkpoint of `config` on eval_tasks, print a table and write a results file.

    Returns: lm-eval's results, `results[task]["acc,none"]` and so on, with `checkpoint` and `tokenizer`.

    Raises: UserError when tasks, checkpoint, tokenizer, data or the lm_eval package are missing.
    """
    _check_installed()
    options = config.evaluation
    tasks, manager = find_tasks(options)
    path = checkpoint_source(config.checkpoint)
    results_file = results_path(options.eval_results_prefix)
    model, tokenizer = load_for_inference(config)
    from eval_tasks.adapter import TokenFormerLM

    lm = TokenFormerLM(model, tokenizer, options.eval_batch_size, config.model.seq_length)
    evaluated = _evaluate(lm, tasks, manager, options)
    results = {**evaluated, "checkpoint": str(path), "tokenizer": lm.tokenizer_name}
    print(format_table(results["results"]), flush=True)
    _write_results(results, results_file)
    return results


def _check_installed() -> None:
    try:
        import lm_eval  # noqa: F401
    except ImportError as error:
        raise UserError(
            "eval_tasks: the lm_eval package is not installed; pip install -r requirements/requirements-eval.txt"
        ) from error


def find_tasks(options: EvaluationConfig) -> tuple[list[str], TaskManager]:
    """The names that eval_tasks means (patterns like arc_* too), and the task manager that knows them.

    lm-eval's own tasks are read (4 s) only when include_path does not have all names. Raises UserError for a name
    that nothing matches.
    """
    from lm_eval.tasks import TaskManager

    if not options.eval_tasks:
        raise UserError("eval_tasks: missing; name lm-eval tasks, for example --eval_tasks lambada_openai piqa")
    folder = options.include_path
    if folder is not None and not Path(folder).is_dir():
        raise UserError(f"include_path: {folder} is not a folder; name the one with the task YAMLs")
    if folder is not None:
        manager = TaskManager(include_path=folder, include_defaults=False)
        if all(manager.match_tasks([name]) for name in options.eval_tasks):
            return manager.match_tasks(options.eval_tasks), manager
    manager = TaskManager(include_path=folder)
    for name in options.eval_tasks:
        if not manager.match_tasks([name]):
            near = difflib.get_close_matches(name, manager.all_tasks, 3, 0.5)
            hint = f"; did you mean {', '.join(near)}?" if near else "; `lm_eval ls tasks` lists all names"
            raise UserError(f"eval_tasks: unknown task '{name}'{hint}")
    return manager.match_tasks(options.eval_tasks), manager


def results_path(prefix: str) -> Path:
    """`{prefix}_eval_results_{date and time}.json`; a prefix ending in a separator stays as it is."""
    if prefix and prefix[-1] not in "/_-.":
        prefix += "_"
    return Path(f"{prefix}eval_results_{datetime.now():%m-%d-%Y-%H-%M-%S}.json")


def _evaluate(
    lm: TokenFormerLM, tasks: list[str], manager: TaskManager, options: EvaluationConfig
) -> Mapping[str, Any]:
    from lm_eval import simple_evaluate

    # Resampling is a short loop; worker processes forked beside a CUDA context or torch's threads are a risk.
    os.environ.setdefault("DISABLE_MULTIPROC", "1")
    try:
        results = simple_evaluate(
            model=lm,
            tasks=tasks,
            num_fewshot=options.num_fewshot,
            batch_size=options.eval_batch_size,
            limit=options.eval_limit,
            bootstrap_iters=BOOTSTRAP_ITERS,
            log_samples=False,
            task_manager=manager,
        )
    except (OSError, ImportError) as error:
        names = ", ".join(tasks)
        raise UserError(
            f"eval_tasks: the data of {names} cannot be loaded: {error}; check the network or the task's data_files"
        ) from error
    assert results is not None, "only ranks other than 0 get None"
    return dict(results)


def _rows(results: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[str, str, str, str]]:
    for task, values in results.items():
        for key, value in values.items():
            metric, comma, filter_name = key.partition(",")
            if not comma or metric.endswith("_stderr"):
                continue
            error = values.get(f"{metric}_stderr,{filter_name}")
            name = metric if filter_name == "none" else f"{metric} ({filter_name})"
            yield task, name, _number(value), _number(error)


def _number(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, (int, float)) else "-"


def format_table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """A line for each task and metric: task, metric, value, standard error."""
    rows = [("task", "metric", "value", "stderr"), *_rows(results)]
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    lines = [
        f"{row[0]:<{widths[0]}}  {row[1]:<{widths[1]}}  {row[2]:>{widths[2]}}  {row[3]:>{widths[3]}}" for row in rows
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def _write_results(results: Mapping[str, Any], path: Path) -> None:
    from lm_eval.utils import handle_non_serializable

    text = json.dumps(results, indent=2, default=handle_non_serializable, ensure_ascii=False)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"eval_results_prefix: {path} cannot be written: {error.strerror}; choose another prefix"
        ) from error
    get_logger().info("results written to %s", path)
