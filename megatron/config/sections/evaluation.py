"""Section `evaluation`: zero-shot evaluation and perplexity."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator

from megatron.config.sections.base import Section
from megatron.text import yaml_form


class EvaluationConfig(Section):
    """Zero-shot evaluation with lm-eval."""

    eval_tasks: list[str] | None = None
    """Names of lm-eval tasks."""
    eval_results_prefix: str = ""
    """Prefix of the results file (JSON)."""
    eval_batch_size: int | Literal["auto"] = 8
    """Requests evaluated together, or auto: as many as fit in memory."""
    num_fewshot: int | None = Field(default=None, ge=0)
    """Examples in the prompt. Default: what the task says."""
    eval_limit: int | None = Field(default=None, gt=0)
    """Most documents evaluated per task. Default: all."""
    include_path: str | None = None
    """Folder with additional task YAMLs."""
    perplexity_data: str | None = None
    """Text whose perplexity eval.py measures: the prefix of a .bin/.idx pair, or a .txt or .jsonl file."""
    perplexity_stride: int | None = Field(default=None, gt=0)
    """Tokens by which the window moves on, at most seq_length; a smaller stride gives each token a longer context
    and takes longer. Default: half of seq_length."""

    @field_validator("eval_batch_size", mode="before")
    @classmethod
    def _number_or_auto(cls, value: Any) -> Any:
        if value == "auto" or (isinstance(value, int) and value > 0 and value is not True):
            return value
        raise ValueError(f"expected a positive whole number or auto, got {yaml_form(value)}")
