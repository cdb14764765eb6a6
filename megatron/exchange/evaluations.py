"""Results files of eval.py, as a model card says them: in the Hub's index form, and as rows of a table."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult

from megatron.errors import UserError
from megatron.exchange.checkpoint import Checkpoint
from megatron.exchange.huggingface_weights import read_json

_FILES = "*eval_results_*.json"
# Readers of files: of data with such a one, the task's name says more.
_READERS = {"json", "csv", "parquet", "text", "arrow", "imagefolder", "webdataset"}
_HUB_NAME = re.compile(r"\w[\w.-]*(?:/[\w.-]+)?", re.ASCII)
_HUB_METRICS = {"acc": "accuracy", "acc_norm": "accuracy", "acc1": "accuracy", "acc5": "accuracy"}


@dataclass(frozen=True)
class Measured:
    """One number that an evaluation gave."""

    task: str
    metric: str
    """As lm-eval calls it, with its filter if it has one."""
    value: float
    stderr: float | None
    num_fewshot: int | None
    limit: float | None
    """Of how many samples, or of which share of them, where an evaluation did not take all."""
    dataset: str
    """Name of the data on the Hub where the task tells one, else that of the task."""
    dataset_config: str | None
    split: str | None

    def indexed(self, pipeline: str) -> EvalResult:
        """In the form of a model card's model-index, which has no place for a limit."""
        metric = self.metric.partition(" ")[0]
        return EvalResult(
            task_type=pipeline,
            dataset_type=self.dataset,
            dataset_name=self.task,
            dataset_config=self.dataset_config,
            dataset_split=self.split,
            metric_type=_HUB_METRICS.get(metric, metric),
            metric_name=self.metric,
            metric_value=self.value,
        )


def found_results(checkpoint: Checkpoint) -> list[Path]:
    """Results files beside a checkpoint or its run that are about it, with all of its parameter tokens."""
    if checkpoint.iteration is None:
        return []
    places = (checkpoint.folder, checkpoint.folder.parent)
    files = [file for place in places for file in sorted(place.glob(_FILES)) if file.is_file()]
    contents = {file: read_json(file) for file in files}
    return [file for file in files if _is_about(contents[file], checkpoint) and not is_sparse(contents[file])]


def read_results(files: Iterable[str | Path], checkpoint: Checkpoint) -> list[Measured]:
    """What these files say; of a number that two of them give, the last one.

    Raises: UserError for a file that holds no results, those of another checkpoint, or of a part of its tokens.
    """
    measured = dict[tuple[str, str], Measured]()
    for file in files:
        content = read_json(Path(file))
        results = content.get("results")
        if not isinstance(results, dict) or not all(isinstance(values, dict) for values in results.values()):
            raise UserError(f"{file}: holds no results; give a file that eval.py wrote")
        if not _is_about(content, checkpoint):
            told = str(content.get("checkpoint"))[:200]
            raise UserError(f"{file}: holds results of {told}, and this is {checkpoint.folder.name}; evaluate that")
        if is_sparse(content):
            raise UserError(f"{file}: holds results with a part of the parameter tokens; evaluate with all of them")
        for one in _of_file(content):
            measured[one.task, one.metric] = one
    return _apart(list(measured.values()))


def is_sparse(content: Mapping[str, Any]) -> bool:
    """Are these results with a part of the parameter tokens (sparse inference)?"""
    return bool(content.get("tokens_used"))


def limit_of(content: Mapping[str, Any], task: str) -> float | None:
    """Of how many samples, or of which share of them, the results of a task are; None: of all."""
    limits = (_table(_table(content, "configs"), task).get("limit"), _table(content, "config").get("limit"))
    return next((told for told in limits if _is_number(told)), None)


def _is_about(content: Mapping[str, Any], checkpoint: Checkpoint) -> bool:
    told = content.get("checkpoint")
    return isinstance(told, str) and Path(told).name == checkpoint.folder.name


def _of_file(content: Mapping[str, Any]) -> Iterator[Measured]:
    configs, shots = (_table(content, key) for key in ("configs", "n-shot"))
    for task, values in content["results"].items():
        config = _table(configs, task)
        path, split = config.get("dataset_path"), config.get("test_split") or config.get("validation_split")
        is_named = isinstance(path, str) and path not in _READERS and _HUB_NAME.fullmatch(path)
        for key, value in values.items():
            metric, comma, filtered = key.partition(",")
            if not comma or metric.endswith("_stderr") or not _is_number(value):
                continue
            error, shot = values.get(f"{metric}_stderr,{filtered}"), shots.get(task)
            yield Measured(
                task=task,
                metric=metric if filtered == "none" else f"{metric} ({filtered})",
                value=value,
                stderr=error if _is_number(error) else None,
                num_fewshot=shot if isinstance(shot, int) else None,
                limit=limit_of(content, task),
                dataset=str(path) if is_named else task,
                dataset_config=_text(config.get("dataset_name")) if is_named else None,
                split=_text(split) if is_named else None,
            )


def _table(content: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    found = content.get(key)
    return found if isinstance(found, dict) else {}


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) and value else None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _apart(measured: Sequence[Measured]) -> list[Measured]:
    """The index has one entry for a set of data: two tasks on the same one are told apart by their own names."""
    tasks = dict[tuple[str, str | None, str | None], set[str]]()
    for one in measured:
        tasks.setdefault((one.dataset, one.dataset_config, one.split), set()).add(one.task)
    return [
        one
        if len(tasks[one.dataset, one.dataset_config, one.split]) == 1
        else replace(one, dataset=one.task, dataset_config=None, split=None)
        for one in measured
    ]
