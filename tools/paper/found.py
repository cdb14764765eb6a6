"""What runs, checkpoints and results files have to say for a table."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

from eval_tasks.published import Size, size_of
from megatron.config import RunConfig
from megatron.config.sections.model import ModelConfig, ModelSection
from megatron.errors import UserError
from megatron.exchange import Checkpoint, open_checkpoint
from megatron.exchange.evaluations import is_sparse, limit_of
from megatron.exchange.logged import logged
from megatron.files import read_errors
from megatron.growth.plan import segments_of


@dataclass(frozen=True)
class Stage:
    """A run between two growths, as far as it has come."""

    size: Size
    tokens: float
    """Tokens trained on since it began."""
    perplexity: float
    """Of the validation set, the last one measured."""


@dataclass
class Found:
    """What one path of the command line has."""

    name: str
    config: ModelSection
    results: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    """lm-eval's form: task -> metric -> value."""
    stages: list[Stage] = field(default_factory=list)


def find(path: str, config: RunConfig | None = None) -> Found:
    """What a results file of eval.py, or a checkpoint or a run's folder with all that lies beside it, has to say.

    Args:
        config: of an official pytorch_model.bin.

    Raises: UserError for a path that is none of these.
    """
    if path.endswith(".json"):
        results = _read_results(Path(path))
        checkpoint = open_checkpoint(results["checkpoint"], config, key=path)
        name = f"{path}: {part}" if (part := _part(results)) else path
        return Found(name, checkpoint.model_config, results["results"])
    checkpoint = open_checkpoint(path, config, key="PATH")
    found = Found(path, checkpoint.model_config, dict(_results_of(Path(path), checkpoint)))
    if isinstance(checkpoint.model_config, ModelConfig):
        found.stages = list(_stages(checkpoint, checkpoint.model_config))
    return found


def _read_results(path: Path) -> dict[str, Any]:
    with read_errors(f"PATH: {path}"):
        text = path.read_text(encoding="utf-8")
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    kinds = {"results": dict, "checkpoint": str}
    if not isinstance(found, dict) or not all(isinstance(found.get(key), kind) for key, kind in kinds.items()):
        raise UserError(f"PATH: {path} is no results file of eval.py; name one, a checkpoint or a run's folder")
    return found


def _part(results: Mapping[str, Any]) -> str:
    """What an evaluation left out, so that its figures are not the model's."""
    if is_sparse(results):
        return "a part of the parameter tokens"
    return "a part of the samples" if any(limit_of(results, task) for task in results["results"]) else ""


def _results_of(path: Path, checkpoint: Checkpoint) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Tasks of whole evaluations of this checkpoint, from files in its run's folder and above; the newest last."""
    own = {checkpoint.folder.resolve(), path.resolve()}
    run = path if path.is_dir() and path != checkpoint.folder else path.parent
    places = {path, run, run.parent}
    files = {file.resolve() for place in places for file in place.glob("*eval_results_*.json")}
    for file in sorted(files, key=lambda file: file.stat().st_mtime):
        results = _read_results(file)
        if Path(results["checkpoint"]).resolve() in own and not _part(results):
            yield from results["results"].items()


def _stages(checkpoint: Checkpoint, config: ModelConfig) -> Iterator[Stage]:
    """Validation perplexities at the end of each stage of a run."""
    lineage = list(checkpoint.train_state.get("lineage", []))
    sizes = _sizes(config)
    if len(sizes) != len(lineage) + 1:  # grown before it had a lineage: only what it is now can be told
        sizes = [size_of(config)] * (len(lineage) + 1)
    begins = [0, *(entry["consumed_tokens"] for entry in lineage)]
    points = list(_validations(checkpoint))
    for number, (size, begin) in enumerate(zip(sizes, begins, strict=True)):
        end = begins[number + 1] if number + 1 < len(begins) else float("inf")
        inside = [(tokens, value) for tokens, value in points if begin < tokens <= end]
        if inside:
            yield Stage(size, inside[-1][0] - begin, inside[-1][1])


def _sizes(config: ModelConfig) -> list[Size]:
    """Of the model before its first growth, and after each; tokens are those of the first block."""
    whole = size_of(config)
    if whole[2] is None:
        return [whole]
    counts = (list(accumulate(segments_of(config, kind)[0])) for kind in ("qkv", "proj", "ffn"))
    return [(config.num_layers, config.hidden_size, *tokens) for tokens in zip(*counts, strict=True)]


def _validations(checkpoint: Checkpoint) -> Iterator[tuple[float, float]]:
    """(tokens consumed, perplexity) of the validations of a run until this checkpoint."""
    for entry in logged(checkpoint):
        if entry.get("valid_perplexity") and entry.get("consumed_tokens"):
            yield entry["consumed_tokens"], entry["valid_perplexity"]


def of_size(found: Sequence[Found], size: Size | None) -> Iterator[Found]:
    """Those whose model is a language model of this size."""
    for item in found:
        if size is not None and isinstance(item.config, ModelConfig) and size_of(item.config) == size:
            yield item
