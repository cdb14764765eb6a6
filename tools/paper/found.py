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
from megatron.files import read_errors
from megatron.growth.plan import segments_of
from megatron.metrics import METRICS_FILE


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
        return Found(path, checkpoint.model_config, results["results"])
    checkpoint = open_checkpoint(path, config, key="PATH")
    found = Found(path, checkpoint.model_config, dict(_results_of(Path(path), checkpoint)))
    if isinstance(checkpoint.model_config, ModelConfig):
        found.stages = list(_stages(Path(path), checkpoint, checkpoint.model_config))
    return found


def _read_results(path: Path) -> dict[str, Any]:
    with read_errors(f"PATH: {path}"):
        text = path.read_text(encoding="utf-8")
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, dict) or not {"results", "checkpoint"} <= found.keys():
        raise UserError(f"PATH: {path} is no results file of eval.py; name one, a checkpoint or a run's folder")
    return found


def _results_of(path: Path, checkpoint: Checkpoint) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Tasks of the results files in a run's folder, and in the one above, of its checkpoints; newer files last."""
    own = {checkpoint.folder.resolve(), path.resolve()}
    run = path if path.is_dir() and path != checkpoint.folder else path.parent
    places = {path, run, run.parent}
    files = {file.resolve() for place in places for file in place.glob("*eval_results_*.json")}
    for file in sorted(files, key=lambda file: file.stat().st_mtime):
        results = _read_results(file)
        evaluated = Path(results["checkpoint"]).resolve()
        if evaluated in own or evaluated.parent in own:
            yield from results["results"].items()


def _stages(path: Path, checkpoint: Checkpoint, config: ModelConfig) -> Iterator[Stage]:
    """Validation perplexities at the end of each stage of a run."""
    lineage = list(checkpoint.train_state.get("lineage", []))
    sizes = _sizes(config)
    if len(sizes) != len(lineage) + 1:  # grown before it had a lineage: only what it is now can be told
        sizes = [size_of(config)] * (len(lineage) + 1)
    begins = [0, *(entry["consumed_tokens"] for entry in lineage)]
    points = list(_validations(path, checkpoint))
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


def _validations(path: Path, checkpoint: Checkpoint) -> Iterator[tuple[float, float]]:
    """(tokens consumed, validation perplexity) of the lines of metrics.jsonl that have one."""
    folders = [checkpoint.resolved().get("log_dir"), checkpoint.folder.parent, path]
    files = (Path(folder) / METRICS_FILE for folder in folders if folder)
    file = next((file for file in files if file.is_file()), None)
    if file is None:
        return
    with read_errors(str(file)):
        lines = file.read_text(encoding="utf-8").splitlines()
    for line in lines:
        try:
            point = json.loads(line)
        except ValueError:
            continue  # the last line of a run that was killed
        if isinstance(point, dict) and point.get("valid_perplexity") and point.get("consumed_tokens"):
            yield point["consumed_tokens"], point["valid_perplexity"]


def of_size(found: Sequence[Found], size: Size | None) -> Iterator[Found]:
    """Those whose model is a language model of this size."""
    for item in found:
        if size is not None and isinstance(item.config, ModelConfig) and size_of(item.config) == size:
            yield item
