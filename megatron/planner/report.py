"""A plan as text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import TypeVar

from megatron.config.schema import RunConfig
from megatron.config.sections.images import ImagesConfig
from megatron.config.sections.model import ModelConfig, ModelSection, VocabularySection
from megatron.config.sections.tokenizer import TokenizerConfig
from megatron.config.sections.vision import ImageTowerSection
from megatron.errors import UserError
from megatron.growth.schedule import GrowthSchedule
from megatron.planner.choice import Choice
from megatron.planner.growth import growth_lines
from megatron.planner.machine import GIB, Machine
from megatron.planner.networks import flops_per_token, networks, num_parameters
from megatron.planner.plan import Candidate, candidates, predict
from megatron.planner.workload import Workload
from megatron.text import align
from megatron.tokenizer import build_tokenizer

ASSUMED_VOCABULARY = 50304
"""Rows of the published models' embedding."""

Vocabulary = TypeVar("Vocabulary", bound=VocabularySection)

_HEADINGS = (
    "", "tensor", "seq.par.", "pipeline", "data", "ZeRO", "micro x steps", "recompute", "GiB/GPU", "s/update",
    "{}/s", "MFU", "comm.", "bubble", "",
)  # fmt: skip


def report(config: RunConfig, machine: Machine, gpus: int, rows: int = 10) -> str:
    """The configured layout and the `rows` best ones, as a table with the assumptions above it.

    A run with a growth schedule is planned for the largest model it comes to. Below is what the whole run takes in the
    best layout, model by model, where its length is known.
    """
    work, notes = _known(Workload.of(config), config.tokenizer)
    models = _models(work.model, config)
    grown, growths = models[-1], len(models) - 1
    if growths:
        line = f"growth: planned for the model after the last growth ({growths} in all); at first it has "
        notes += [f"{line}{num_parameters(models[0]):,} parameters"]
        if type(work.model) is ModelConfig:  # growths of other models were not measured
            notes += growth_lines(config, work.model, work.samples(gpus) * work.model.seq_length)
    if (norms := max(network.model.norm_groups for network in networks(grown))) > 1:
        notes += [f"row norms: up to {norms} in a layer (row_norm: segment)"]
    work = replace(work, model=grown)
    lines = [*_facts(work, machine, gpus), *notes]
    table: list[tuple[str, ...]] = [tuple(heading.format(work.unit) for heading in _HEADINGS)]
    try:
        configured = predict(work, machine, work.configured(gpus))
        table.append(_row("configured", configured, machine, work))
    except UserError as error:
        lines.append(f"configured: cannot run on {gpus} GPUs: {error}")
    found = candidates(work, machine, gpus)
    best = distinct([candidate for candidate in found if candidate.fits])[:rows]
    table += [_row(str(number), candidate, machine, work) for number, candidate in enumerate(best, 1)]
    shown = ["", *align(table, (0, len(table[0]) - 1))] if len(table) > 1 else []
    if best:
        shown += _run_lines([replace(work, model=model) for model in models], config, best[0].choice, machine)
    return "\n".join([*lines, *shown, "", _advice(best, found, machine, gpus)])


def _known(work: Workload, tokenizer: TokenizerConfig) -> tuple[Workload, list[str]]:
    """The workload with what the data decides, and lines that say what is assumed."""
    notes = []
    if work.model.samples is ImagesConfig:
        notes += ["images are taken to be there in time (cores for decoding: docs/vision.md, Speed)"]
    if not isinstance(work.model, VocabularySection):
        return work, notes
    model, assumed = with_vocabulary(work.model, tokenizer)
    return replace(work, model=model), notes + assumed


def _models(model: ModelSection, config: RunConfig) -> list[ModelSection]:
    """The model at first and after each growth of the run."""
    schedule = GrowthSchedule(config.scaling)
    return [schedule.after(model, done).model for done in range(len(config.scaling.growth) + 1)]


def _run_lines(works: Sequence[Workload], config: RunConfig, choice: Choice, machine: Machine) -> list[str]:
    """What the updates of each model of a run take in one layout, and all of them; nothing where they are not known."""
    total = config.training.train_iters
    if total is None:
        return []
    schedule = GrowthSchedule(config.scaling, total, choice.samples * works[0].model.tokens_per_sample())
    bounds = [0, *(min(start, total) for start in schedule.starts()), total]
    unit = works[0].unit
    rows = [("run in layout 1", "updates", "parameters", f"GFLOP/{unit[:-1]}", "s/update", f"{unit}/s", "hours")]
    hours = 0.0
    for number, (work, (start, end)) in enumerate(zip(works, pairwise(bounds), strict=True)):
        predicted = predict(work, machine, choice)
        seconds, name = predicted.time.total, f"after growth {number}" if number else "at first"
        flops = flops_per_token(work.model) * work.tokens_per_unit / 1e9
        cells = f"{end - start:,}", f"{num_parameters(work.model):,}", f"{flops:.4g}", f"{seconds:.3g}"
        rows.append((name, *cells, _speed(predicted, work), f"{(end - start) * seconds / 3600:.3g}"))
        hours += (end - start) * seconds / 3600
    if len(works) > 1:
        rows.append(("in all", f"{total:,}", "", "", "", "", f"{hours:.3g}"))
    return ["", *align(rows, (0,))]


def _speed(candidate: Candidate, work: Workload) -> str:
    return f"{candidate.tokens_per_second / work.tokens_per_unit:,.0f}"


def world(choice: Choice, nodes: int) -> str:
    """The processes that a launch starts on so many nodes, and how they are laid out."""
    processes = choice.gpus
    per_node = f"{nodes} x {processes // nodes}" if processes % nodes == 0 else f"{nodes}, {processes} in all"
    return f"nodes x processes {per_node} -> data {choice.data} x pipeline {choice.pipeline} x tensor {choice.tensor}"


def with_vocabulary(model: Vocabulary, tokenizer: TokenizerConfig) -> tuple[Vocabulary, list[str]]:
    """The model with its vocabulary known, and a line that says so if it had to be assumed."""
    if model.padded_vocab_size is not None:
        return model, []
    if model.vocab_size is not None:
        return model.with_vocabulary(model.vocab_size), []
    if Path(tokenizer.vocab_file or "").is_file():
        return model.with_vocabulary(build_tokenizer(tokenizer).vocab_size), []
    note = f"vocabulary: unknown without the tokenizer, {ASSUMED_VOCABULARY} rows assumed (set padded_vocab_size)"
    return model.with_vocabulary(ASSUMED_VOCABULARY), [note]


def assumed_batch(config: RunConfig) -> tuple[RunConfig, str]:
    """A configuration whose batch is known, and a line that says so if it had to be assumed."""
    training = config.training
    if training.train_micro_batch_size_per_gpu or training.train_batch_size:
        return config, ""
    note = "batch: unknown, train_micro_batch_size_per_gpu 1 assumed (give it, or train_batch_size)\n"
    return config.replaced(**{"training.train_micro_batch_size_per_gpu": 1}), note


def distinct(found: Sequence[Candidate]) -> list[Candidate]:
    """The best candidate of each layout and ZeRO stage, whatever its micro-batches."""
    best: dict[object, Candidate] = {}
    for candidate in found:
        c = candidate.choice
        best.setdefault((c.tensor, c.pipeline, c.sequence_parallel, c.zero_stage), candidate)
    return list(best.values())


def _facts(work: Workload, machine: Machine, gpus: int) -> list[str]:
    growing = ""
    if work.training.train_batch_size is None:
        each = work.update_size(1).samples
        growing = f" ({each} samples a data rank: it grows with the GPUs; give train_batch_size to keep it)"
    model, cost = work.model, ""
    if work.unit != "tokens":
        gflops = work.tokens_per_unit * flops_per_token(model) / 1e9
        cost = f"; of {work.unit}, one takes {gflops / 3:.4g} GFLOP forward, {gflops:.4g} in training"
    return [
        f"machine: {machine.name}, {machine.gpus_per_node} GPUs a node, {machine.usable_bytes / GIB:.1f} GiB a GPU for "
        "tensors (choose another with --machine NAME or FILE)",
        f"model: {num_parameters(model):,} parameters, {work.dtype}{cost}",
        f"update: {work.samples(gpus)} {_sample(work)}, number of GPUs: {gpus}{growing}",
        "memory and times are predictions, not measurements",
    ]


def _sample(work: Workload) -> str:
    """What a sample is, in the plural."""
    parts = [network.model for network in networks(work.model)]
    if work.unit == "tokens":
        return f"samples x {work.model.tokens_per_sample()} tokens"
    images = [tower for tower in parts if isinstance(tower, ImageTowerSection)]
    tokens = " and ".join(str(part.tokens_per_sample()) for part in parts)
    sizes = ", ".join(f"{tower.image_size} x {tower.image_size} x {tower.in_channels}" for tower in images)
    return f"{work.unit}{', images' * (work.unit != 'images')} of {sizes}, {tokens} tokens each"


def _row(name: str, candidate: Candidate, machine: Machine, work: Workload) -> tuple[str, ...]:
    c, time = candidate.choice, candidate.time
    missing = (candidate.memory.total - machine.usable_bytes) / GIB
    return (
        name,
        str(c.tensor),
        "yes" if c.sequence_parallel else "no",
        str(c.pipeline),
        str(c.data),
        str(c.zero_stage),
        f"{c.micro_batch} x {c.accumulation}",
        "yes" if c.recompute else "no",
        f"{candidate.memory.total / GIB:.1f}",
        f"{time.total:.3g}",
        _speed(candidate, work),
        f"{candidate.mfu:.1%}",
        f"{time.communication / time.total:.1%}",
        f"{time.bubble / time.total:.1%}",
        "" if candidate.fits else f"does not fit: {missing:.1f} GiB too much",
    )


def _advice(best: Sequence[Candidate], found: Sequence[Candidate], machine: Machine, gpus: int) -> str:
    if best:
        keys = " ".join(f"--set {key}={str(value).lower()}" for key, value in best[0].choice.overrides().items())
        return f"for layout 1: {keys}"
    if not found:
        return f"no layout: the samples of an update cannot be divided over {gpus} GPUs; change train_batch_size"
    smallest = min(found, key=lambda candidate: candidate.memory.total)
    missing, c = (smallest.memory.total - machine.usable_bytes) / GIB, smallest.choice
    return (
        f"nothing fits {gpus} x {machine.name}: the smallest layout (tensor {c.tensor}, pipeline {c.pipeline}, ZeRO "
        f"{c.zero_stage}, micro-batch {c.micro_batch}) needs {missing:.1f} GiB more a GPU; take more GPUs"
    )
