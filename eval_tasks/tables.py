"""Results as tables: every metric of every task, and the paper's table of six tasks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from megatron.config.sections.model import TOKENFORMER, ModelConfig
from megatron.text import align

Results = Mapping[str, Mapping[str, Any]]

# Column, task, metric; Table 1 of the paper (arXiv 2410.23168). The perplexity does not enter the average.
PERPLEXITY_COLUMN = ("LAMBADA ppl", "lambada_openai", "perplexity,none")
PAPER_COLUMNS = (
    ("LAMBADA", "lambada_openai", "acc,none"),
    ("HellaSwag", "hellaswag", "acc_norm,none"),
    ("PIQA", "piqa", "acc,none"),
    ("ARC-E", "arc_easy", "acc,none"),
    ("ARC-C", "arc_challenge", "acc_norm,none"),
    ("WinoGrande", "winogrande", "acc,none"),
)
_COLUMNS = ("LAMBADA ppl", *(column for column, _, _ in PAPER_COLUMNS), "average")

# Percentages of the model cards of the published checkpoints (huggingface.co/Haiyang-W), in the order of PAPER_COLUMNS
# with the average behind; by layers, width and tokens of qkv, proj and ffn.
_PUBLISHED = {
    (12, 768, 768, 768, 3072): ("TokenFormer-150M", (45.0, 35.5, 64.9, 47.3, 24.9, 50.4, 44.7)),
    (24, 1024, 1024, 1024, 4096): ("TokenFormer-450M", (57.3, 47.5, 69.5, 56.2, 26.7, 54.6, 52.0)),
    (32, 1280, 1280, 1280, 5120): ("TokenFormer-900M", (64.0, 55.3, 72.4, 59.9, 30.6, 56.4, 56.4)),
    (40, 1536, 1536, 1536, 6144): ("TokenFormer-1-5B", (64.7, 60.0, 74.8, 64.8, 32.0, 59.7, 59.3)),
}


def format_table(results: Results) -> str:
    """A line for each task and metric: task, metric, value, standard error."""
    return _ruled([("task", "metric", "value", "stderr"), *_rows(results)], num_text_columns=2)


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
    return f"{value:.4f}" if isinstance(value, (int, float)) else "-"


def _ruled(rows: Sequence[Sequence[str]], num_text_columns: int) -> str:
    """Columns of text, then of numbers, with a rule below the first row."""
    lines = align(rows, range(num_text_columns))
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def paper_summary(results: Results, config: ModelConfig) -> dict[str, dict[str, float]] | None:
    """The paper's row of a model when all six tasks are in `results`, and the published row of its size if there is
    one: {model: {column: value}}, accuracies and their average in percent."""
    if any(metric not in results.get(task, {}) for _, task, metric in (PERPLEXITY_COLUMN, *PAPER_COLUMNS)):
        return None
    accuracies = {column: 100 * results[task][metric] for column, task, metric in PAPER_COLUMNS}
    column, task, metric = PERPLEXITY_COLUMN
    own = {column: results[task][metric], **accuracies, "average": sum(accuracies.values()) / len(accuracies)}
    return {"this model": own, **published_figures(config)}


def published_figures(config: ModelConfig) -> dict[str, dict[str, float]]:
    """{name: {column: percent}} of the published model of this size; empty when there is none."""
    size = (config.num_layers, config.hidden_size, config.qkv_slot_num, config.proj_slot_num, config.ffn_slot_num)
    if size not in _PUBLISHED or set(config.layer_kinds) != {TOKENFORMER}:
        return {}
    name, figures = _PUBLISHED[size]
    return {f"published {name}": dict(zip(_COLUMNS[1:], figures, strict=True))}


def format_summary(summary: Mapping[str, Mapping[str, float]]) -> str:
    """The paper's table; a figure that was not published is a dash."""
    rows = [("zero-shot", *_COLUMNS)]
    for name, values in summary.items():
        digits = {"LAMBADA ppl": 2}
        cells = (f"{values[c]:.{digits.get(c, 1)}f}" if c in values else "-" for c in _COLUMNS)
        rows.append((name, *cells))
    return _ruled(rows, num_text_columns=1)
