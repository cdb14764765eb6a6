"""Results as tables: every metric of every task, classes of images, and the paper's table of six tasks."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from eval_tasks.published import ACCURACY_COLUMNS, COLUMNS, PERPLEXITY_COLUMN, PILE_COLUMN, published_row
from megatron.config.sections.model import ModelConfig
from megatron.text import align, shortened

Results = Mapping[str, Mapping[str, Any]]
_LONGEST_CELL = 32


def format_table(results: Results) -> str:
    """A line for each task and metric: task, metric, value, standard error."""
    return ruled([("task", "metric", "value", "stderr"), *_rows(results)], num_text_columns=2)


def _rows(results: Results) -> Iterator[tuple[str, str, str, str]]:
    for task, values in results.items():
        for key, value in values.items():
            metric, comma, filter_name = key.partition(",")
            if not comma or metric.endswith("_stderr"):
                continue
            error = values.get(f"{metric}_stderr,{filter_name}")
            name = metric if filter_name == "none" else f"{metric} ({filter_name})"
            yield task, name, _number(value), _number(error)


def _number(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, (int, float)) and not math.isnan(value) else "-"


def ruled(rows: Sequence[Sequence[str]], num_text_columns: int) -> str:
    """Columns of text, then of numbers, with a rule below the first row."""
    lines = align(rows, range(num_text_columns))
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def format_classes(classes: Sequence[Mapping[str, Any]]) -> str:
    """A line for each class of images: number, name, images, accuracy, standard error, what most mistakes take it for.

    classes: as eval_tasks.images lists them.
    """
    rows = [("class", "name", "taken for", "images", "acc", "stderr")]
    for values in classes:
        wrong = f"{values['taken_for_name']} ({values['taken']})" if "taken_for" in values else ""
        numbers = str(values["num_images"]), _number(values.get("acc")), _number(values.get("acc_stderr"))
        rows.append((str(values["class"]), values["name"], wrong, *numbers))
    return ruled([tuple(shortened(cell, _LONGEST_CELL) for cell in row) for row in rows], num_text_columns=3)


def paper_summary(results: Results, config: ModelConfig) -> dict[str, dict[str, float]] | None:
    """The paper's row of a model when all six tasks are in `results`, and the published row of its size if there is
    one: {model: {column: value}}, accuracies and their average in percent."""
    if any(metric not in results.get(task, {}) for _, task, metric in (PERPLEXITY_COLUMN, *ACCURACY_COLUMNS)):
        return None
    return {"this model": paper_row(results), **published_figures(config)}


def paper_row(results: Results) -> dict[str, float]:
    """{column: value} of those columns of the paper's table that `results` have; the average when all six tasks are.

    A perplexity is one of the Pile where the data's name says so.
    """
    measured = ((column, results.get(task, {}).get(metric)) for column, task, metric in ACCURACY_COLUMNS)
    accuracies = {column: 100 * value for column, value in measured if value is not None}
    own = {
        column: results[task][metric]
        for column, task, metric in (PILE_COLUMN, PERPLEXITY_COLUMN)
        if results.get(task, {}).get(metric) is not None
        and (column != PILE_COLUMN[0] or "pile" in str(results[task].get("alias")).lower())
    }
    average = (
        {"average": sum(accuracies.values()) / len(accuracies)} if len(accuracies) == len(ACCURACY_COLUMNS) else {}
    )
    return {**own, **accuracies, **average}


def published_figures(config: ModelConfig) -> dict[str, dict[str, float]]:
    """{name: {column: figure}} of the published model of this size; empty when there is none."""
    row = published_row(config)
    if row is None:
        return {}
    figures = zip(COLUMNS, row.figures, strict=True)
    return {f"published {row.name}": {column: figure for column, figure in figures if figure is not None}}


def format_summary(summary: Mapping[str, Mapping[str, float]]) -> str:
    """The paper's table; a figure that is not known is a dash."""
    rows = [("zero-shot", *COLUMNS)]
    for name, values in summary.items():
        cells = (f"{values[c]:.{2 if c.endswith('ppl') else 1}f}" if c in values else "-" for c in COLUMNS)
        rows.append((name, *cells))
    return ruled(rows, num_text_columns=1)
