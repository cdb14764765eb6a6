"""The README.md of an export: what the model is, how it was trained and what it reached, from the run's own files."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCardData

from megatron.config.sections.model import TOKENFORMER, ModelConfig, ModelSection
from megatron.config.sections.vision import ImageConfig
from megatron.errors import UserError
from megatron.exchange.checkpoint import Checkpoint
from megatron.exchange.evaluations import Measured
from megatron.exchange.logged import logged

README = "README.md"
_LICENCE = re.compile(r"[a-z0-9][a-z0-9.-]*")
_OF_A_RUN = re.compile(r"loss|lm_loss|(?:valid|test)_(?:lm_loss|loss|perplexity|acc1|acc5)")
_PAPER = "[TokenFormer](https://arxiv.org/abs/2410.23168)"
_SUFFIXES = ("_text_document", "_image_document")


@dataclass(frozen=True)
class Card:
    """What an export's README.md says that the checkpoint does not."""

    licence: str | None = None
    """Identifier of the Hub, for example apache-2.0; None: the card names none."""
    measured: Sequence[Measured] = ()
    """Results of evaluations."""

    def __post_init__(self) -> None:
        if self.licence is not None and not _LICENCE.fullmatch(self.licence):
            raise UserError(f"--license: {self.licence!r} is no identifier of a licence; give one such as apache-2.0")


NO_CARD = Card()
"""Of which nothing more is known."""


@dataclass(frozen=True)
class Loading:
    """How an export is loaded.

    Args:
        auto_class: of transformers.
        has_code: of its own, so that trust_remote_code is needed.
        processor: class that makes inputs ready, of transformers; None without a tokenizer.
    """

    auto_class: str
    has_code: bool
    processor: str | None


def model_card(
    checkpoint: Checkpoint, described: ModelSection, name: str, dtype: torch.dtype, loading: Loading, card: Card
) -> str:
    """Text of the README.md.

    Args:
        described: the model as it is exported, its segments joined.
        name: of the model.
        dtype: of the parameters in the files.
    """
    is_image = isinstance(described, ImageConfig)
    pipeline = "image-classification" if is_image else "text-generation"
    kinds = ["tokenformer" if kind == TOKENFORMER else "transformer" for kind in described.layer_kinds]
    indexed = [one.indexed(pipeline) for one in card.measured if one.limit is None]
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag=pipeline,
        license=card.licence,
        tags=[*dict.fromkeys(kinds), *(["vision"] if is_image else [])],
        model_name=name,
        eval_results=indexed or None,
    )
    if not indexed:
        data.pop("model_name")  # of the index that there is not
    sections = [
        f"# {name}",
        _introduction(described),
        _section("Model", _table(("", ""), _model_rows(checkpoint, described, dtype))),
        _section("Use", _use(name, loading)),
        _section("Training", _table(("", ""), _training_rows(checkpoint, is_image))),
        _section("Growth", _growths(checkpoint)),
        _section("Evaluation", _evaluations(card.measured)),
        _section("Sharing", _sharing(name)),
    ]
    return f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(filter(None, sections)) + "\n"


def _section(title: str, text: str) -> str:
    return f"## {title}\n\n{text}" if text else ""


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    if not rows:
        return ""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _introduction(config: ModelSection) -> str:
    what = "An image classifier" if isinstance(config, ImageConfig) else "A language model"
    if TOKENFORMER not in config.layer_kinds:
        return f"{what} of Transformer blocks."
    mixed = " and of Transformer blocks" if set(config.layer_kinds) != {TOKENFORMER} else ""
    return (
        f"{what} of {_PAPER} blocks{mixed}: linear projections are attention between inputs and learnable key-value "
        "parameter tokens."
    )


def _model_rows(checkpoint: Checkpoint, config: ModelSection, dtype: torch.dtype) -> list[tuple[str, str]]:
    rows = [
        ("parameters", f"{checkpoint.num_parameters:,}"),
        ("blocks", f"{config.num_layers}"),
        ("width", f"{config.hidden_size}"),
        ("attention heads", f"{config.num_attention_heads}"),
    ]
    for key, what in (
        ("qkv", "parameter tokens of query, key and value, each"),
        ("proj", "parameter tokens of the attention output"),
        ("ffn", "parameter tokens of the feed-forward"),
    ):
        if TOKENFORMER in config.layer_kinds:
            rows.append((what, f"{getattr(config, f'{key}_slot_num')}"))
    if isinstance(config, ModelConfig):
        rows += [("context", f"{config.seq_length} tokens"), ("rows of the embedding", f"{config.padded_vocab_size}")]
    elif isinstance(config, ImageConfig):
        rows += [
            ("images", f"{config.image_size} x {config.image_size}, {config.in_channels} channels"),
            ("patches", f"{config.patch_size} x {config.patch_size}"),
            ("classes", f"{config.num_classes}"),
        ]
    return [*rows, ("weights", str(dtype).removeprefix("torch."))]


def _use(name: str, loading: Loading) -> str:
    trust = ", trust_remote_code=True" if loading.has_code else ""
    classes = [loading.auto_class, *([loading.processor] if loading.processor else [])]
    lines = [
        f"from transformers import {', '.join(classes)}",
        "",
        f'model = {loading.auto_class}.from_pretrained("{name}"{trust})',
    ]
    if loading.processor == "AutoTokenizer":
        lines += [
            f'tokenizer = AutoTokenizer.from_pretrained("{name}"{trust})',
            'inputs = tokenizer("The", return_tensors="pt")',
            "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=20)[0]))",
        ]
    elif loading.processor == "AutoImageProcessor":
        lines[0] = f"from PIL import Image\n{lines[0]}"
        lines += [
            f'processor = AutoImageProcessor.from_pretrained("{name}"{trust})',
            'inputs = processor(Image.open("image.jpg"), return_tensors="pt")',
            "print(model.config.id2label[model(**inputs).logits.argmax(-1).item()])",
        ]
    code = "\n".join(lines)
    asked = " Its code is in the folder, hence `trust_remote_code`." if loading.has_code else ""
    return f"With transformers 5, from the folder `{name}`, or by its name on the Hub.{asked}\n\n```python\n{code}\n```"


def _training_rows(checkpoint: Checkpoint, is_image: bool) -> list[tuple[str, str]]:
    """Of a training checkpoint; a model that comes from elsewhere has none."""
    settings, state = checkpoint.settings or {}, checkpoint.train_state
    if not checkpoint.iteration:
        return []
    optimizer = settings.get("optimizer") or {}
    rate = (optimizer.get("params") or {}).get("lr")
    rows = [
        ("data", ", ".join(_data_names(settings))),
        ("iterations", f"{checkpoint.iteration:,}"),
        ("images read" if is_image else "samples read", _count(state.get("consumed_samples"))),
        ("tokens read", "" if is_image else _count(state.get("consumed_tokens"))),
        ("images an update" if is_image else "samples an update", _count(settings.get("train_batch_size"))),
        ("optimizer", str(optimizer.get("type") or "")),
        ("peak learning rate", "" if rate is None else f"{rate:g}"),
        ("learning rate decay", str(settings.get("lr_decay_style") or "")),
        ("precision", str(settings.get("precision") or "")),
        *_measured_in_training(checkpoint),
    ]
    return [(name, value) for name, value in rows if value]


def _count(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) and value else ""


def _data_names(settings: Mapping[str, Any]) -> list[str]:
    prefixes = [settings.get("data_path"), *(settings.get("train_data_paths") or [])]
    names = [Path(prefix).name for prefix in prefixes if prefix]
    for suffix in _SUFFIXES:
        names = [name.removesuffix(suffix) for name in names]
    return list(dict.fromkeys(names))


def _measured_in_training(checkpoint: Checkpoint) -> Iterator[tuple[str, str]]:
    """The last of each loss, perplexity and accuracy that the run has logged until this checkpoint."""
    found = dict[str, tuple[int, float]]()
    for entry in logged(checkpoint):
        numbers = {name: value for name, value in entry.items() if isinstance(value, int | float)}
        found |= {name: (entry["iteration"], value) for name, value in numbers.items() if _OF_A_RUN.fullmatch(name)}
    for name, (iteration, value) in found.items():
        yield f"{name} at iteration {iteration:,}", f"{value:.4f}"


def _growths(checkpoint: Checkpoint) -> str:
    lineage = checkpoint.train_state.get("lineage") or []
    rows = [
        (
            f"{entry['iteration']:,}",
            f"{entry['consumed_tokens']:,}",
            str(entry["added"]),
            str(entry.get("new_keys", "zero")),
            f"{entry['parameters']:,}",
        )
        for entry in lineage
    ]
    head = ("at iteration", "after tokens", "parameter tokens", "new keys", "parameters then")
    drawn = any(entry.get("new_keys") == "official" for entry in lineage)
    changed = "" if drawn else " that at first changed nothing"
    text = f"The model was grown while it was trained: parameter tokens were added{changed}."
    return f"{text}\n\n{_table(head, rows)}" if rows else ""


def _evaluations(measured: Sequence[Measured]) -> str:
    rows = [
        (
            one.task,
            one.metric,
            f"{one.value:.4f}",
            "" if one.stderr is None else f"{one.stderr:.4f}",
            "" if one.num_fewshot is None else str(one.num_fewshot),
            "all" if one.limit is None else f"the first {one.limit:g}",
        )
        for one in measured
    ]
    return _table(("task", "metric", "value", "standard error", "examples in the prompt", "of the samples"), rows)


def _sharing(name: str) -> str:
    return (
        f"The folder as it is, with this page, or the model alone:\n\n    hf upload USER/{name} {name}\n\n"
        f'```python\nmodel.push_to_hub("USER/{name}")\n```'
    )
