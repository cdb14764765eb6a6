"""Section `evaluation`: what models of language, of images, and of both are evaluated by, and sparse inference."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field, ValidationError, ValidationInfo, field_validator, model_validator

from megatron.config.sections.base import MAX_FACTOR, Section
from megatron.errors import ConfigError
from megatron.text import shortened, yaml_form

OF_LANGUAGE = ("eval_tasks", "num_fewshot", "include_path", "perplexity_data", "perplexity_stride")
OF_IMAGES, OF_CLASSES = ("eval_data_paths", "eval_split"), ("per_class", "confusion")
OF_PAIRS, OF_TEXTS = ("zero_shot_classes", "zero_shot_templates"), ("pattention_top_k", "pattention_threshold")
"""Keys that only models of language, of images, image classifiers, those of images and texts, and those that make texts
are evaluated by."""


class _OfEachKind(Section):
    """A number for each kind of Pattention, or one for all."""

    expected: ClassVar[str]

    @model_validator(mode="before")
    @classmethod
    def _for_all(cls, values: Any) -> Any:
        if isinstance(values, (dict, cls)):
            return values
        try:
            return cls(**dict.fromkeys(cls.model_fields, values)).model_dump()
        except ValidationError:
            told = f"expected {cls.expected}, or {{qkv: .., proj: .., ffn: ..}}, got {yaml_form(values)}"
            raise ValueError(told) from None


class TokenShares(_OfEachKind):
    """Part of the parameter tokens that a row uses, by kind of Pattention."""

    expected = "a share of the tokens, above 0 and at most 1"
    qkv: float | None = Field(default=None, gt=0, le=1)
    """Of each query, key and value projection. Default: all."""
    proj: float | None = Field(default=None, gt=0, le=1)
    """Of attention's output projection. Default: all."""
    ffn: float | None = Field(default=None, gt=0, le=1)
    """Of the feed-forward. Default: all."""


class WeightThresholds(_OfEachKind):
    """Smallest size of the weights that are kept, by kind of Pattention."""

    expected = "a size of weights, 0 or more"
    qkv: float | None = Field(default=None, ge=0, le=MAX_FACTOR)
    """Of each query, key and value projection. Default: 0."""
    proj: float | None = Field(default=None, ge=0, le=MAX_FACTOR)
    """Of attention's output projection. Default: 0."""
    ffn: float | None = Field(default=None, ge=0, le=MAX_FACTOR)
    """Of the feed-forward. Default: 0."""


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
        if info.field_name == "zero_shot_classes" and any(not name.strip() for name in values or ()):
            raise ValueError("one of the names is empty")
        if info.field_name == "zero_shot_templates":
            for template in values or ():
                if "{}" not in template:
                    raise ValueError(f"'{shortened(template)}' has no {{}} for the name of a class")
        return values

    pattention_top_k: TokenShares | None = None
    """Sparse inference, in eval.py and generate.py: each row of a Pattention's input uses this share of the parameter
    tokens, those of the largest weights; a number, or {qkv: .., proj: .., ffn: ..}. Default: all tokens."""
    pattention_threshold: WeightThresholds | None = None
    """Sparse inference by size, instead of pattention_top_k: tokens whose weight is smaller are left out."""

    @model_validator(mode="after")
    def _one_selection(self) -> EvaluationConfig:
        if self.pattention_top_k is not None and self.pattention_threshold is not None:
            reason = "is another way of saying what pattention_top_k says"
            raise ConfigError("pattention_threshold", reason, "keep one of them", beside=["pattention_top_k"])
        return self

    @field_validator("eval_batch_size", mode="before")
    @classmethod
    def _number_or_auto(cls, value: Any) -> Any:
        if value == "auto" or (isinstance(value, int) and value > 0 and value is not True):
            return value
        raise ValueError(f"expected a positive whole number or auto, got {yaml_form(value)}")
