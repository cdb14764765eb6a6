"""Section `evaluation`: what models of language, of images, and of images and texts are evaluated by."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, ValidationInfo, field_validator

from megatron.config.sections.base import Section
from megatron.text import shortened, yaml_form

OF_LANGUAGE = ("eval_tasks", "num_fewshot", "include_path", "perplexity_data", "perplexity_stride")
OF_IMAGES, OF_CLASSES = ("eval_data_paths", "eval_split"), ("per_class", "confusion")
OF_PAIRS = ("zero_shot_classes", "zero_shot_templates")
"""Keys that only models of language, of images, image classifiers, and those of images and texts are evaluated by."""


class EvaluationConfig(Section):
    """Zero-shot evaluation with lm-eval and perplexity; accuracy of image classifiers, zero-shot too, and retrieval."""

    eval_tasks: list[str] | None = None
    """Names of lm-eval tasks."""
    eval_results_prefix: str = ""
    """Prefix of the results file (JSON)."""
    eval_batch_size: int | Literal["auto"] = 8
    """Requests or images evaluated together, or auto: as many as fit in memory."""
    num_fewshot: int | None = Field(default=None, ge=0)
    """Examples in the prompt. Default: what the task says."""
    eval_limit: int | None = Field(default=None, gt=0)
    """Most documents evaluated per task, or images per set. Default: all."""
    include_path: str | None = None
    """Folder with additional task YAMLs."""
    use_ema: bool = True
    """Evaluation, generation and the validations of a run take the average of the weights (ema_decay) where there is
    one. false: the weights."""
    perplexity_data: str | None = None
    """Text whose perplexity eval.py measures: the prefix of a .bin/.idx pair, or a .txt or .jsonl file."""
    perplexity_stride: int | None = Field(default=None, gt=0)
    """Tokens by which the window moves on, at most seq_length; a smaller stride gives each token a longer context
    and takes longer. Default: half of seq_length."""
    eval_data_paths: list[str] | None = None
    """Image models: prefixes of the sets that eval.py evaluates, each by itself. Default: those of eval_split."""
    eval_split: Literal["train", "valid", "test"] = "valid"
    """Image models: which of the run's sets eval.py evaluates; images are not augmented there."""
    per_class: bool = False
    """Image classifiers: tell the accuracy of each class, and what it is most often taken for."""
    confusion: bool = False
    """Image classifiers: draw which classes are taken for which, a PNG beside the results file."""
    zero_shot_classes: list[str] | None = None
    """Models of images and texts: names of the classes that images are told apart by, in the order of their numbers.
    Default: those that a file beside the data says."""
    zero_shot_templates: list[str] = ["a photo of a {}."]
    """Models of images and texts: texts about a class, with {} for its name. A class is the mean of their vectors."""

    @field_validator("zero_shot_classes", "zero_shot_templates")
    @classmethod
    def _enough(cls, values: list[str] | None, info: ValidationInfo) -> list[str] | None:
        fewest = 2 if info.field_name == "zero_shot_classes" else 1
        if values is not None and len(values) < fewest:
            raise ValueError(f"{len(values)} of them; give at least {fewest}")
        if info.field_name == "zero_shot_templates":
            for template in values or ():
                if "{}" not in template:
                    raise ValueError(f"'{shortened(template)}' has no {{}} for the name of a class")
        return values

    @field_validator("eval_batch_size", mode="before")
    @classmethod
    def _number_or_auto(cls, value: Any) -> Any:
        if value == "auto" or (isinstance(value, int) and value > 0 and value is not True):
            return value
        raise ValueError(f"expected a positive whole number or auto, got {yaml_form(value)}")
