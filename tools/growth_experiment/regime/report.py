"""Tables and figures from the results that are kept; nothing of the trials' folders is needed."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron.errors import UserError
from megatron.files import read_json
from tools.growth_experiment.regime.figures import draw_figures
from tools.growth_experiment.regime.recipes import (
    BEST,
    MECHANISMS,
    REFINED,
    SCREENED,
    TOGETHER,
    best,
    best_alone,
    chosen,
)
from tools.growth_experiment.regime.runs import CHECK, REPEAT, Experiment
from tools.growth_experiment.regime.saving import (
    Comparison,
    Result,
    Saving,
    all_flops,
    all_tokens,
    is_scratch,
    mean_and_error,
    own_tokens,
)
from tools.growth_experiment.report import table


def read_results(experiment: Experiment) -> list[Result]:
    """All that are there, in the order of the trials. Raises UserError when there is none."""
    found: list[Result] = [result for name in experiment.trials if (result := experiment.result(name)) is not None]
    if not found:
        raise UserError(f"--results: {experiment.results} has no result yet; give the command run first")
    return found


def write_report(experiment: Experiment) -> str:
    """Write report.md and the figures into the output folder; returns the report."""
    text = report_text(experiment)
    experiment.output.mkdir(parents=True, exist_ok=True)
    (experiment.output / "report.md").write_text(text + "\n", encoding="utf-8")
    draw_figures(read_results(experiment), experiment.output)
    return text


def report_text(experiment: Experiment) -> str:
    """The tables of what is finished, as Markdown."""
    results = read_results(experiment)
    groups = groups_of(results)
    return "\n\n".join([
        "# Growth in the regime of the published models",
        f"{len(results)} of {len(experiment.trials)} trials. Losses in nats a token; +- is the standard error over "
        "seeds.",
        "## Recipes", recipes_table(results, groups),
        "## New tokens", tokens_table(groups),
        "## From scratch", scratch_table(results),
        "## Screening (tuning text, seed 1)", screening_table(experiment), _choice(experiment),
        "## Learning rates (tuning text)", rates_table(results),
        *([] if experiment.is_check else checked()),
    ])  # fmt: skip


def checked(folder: Path = CHECK) -> list[str]:
    """What the kept results of a check say, if there are any. Raises UserError where they are of several texts."""
    results: list[Result] = [read_json(file, REPEAT) for file in sorted(folder.glob("*.json"))]
    if not results:
        return []
    first, *others = sorted({result["text"] for result in results})
    if others:
        raise UserError(f"{folder}: results of {first} and of {', '.join(others)}; keep those of one text")
    groups = dict(sorted(groups_of(results).items(), key=lambda item: -item[1][0]["loss"]["text"]))
    text = f"{first}, one seed; rates and recipes are those chosen above."
    return ["## Check: another text and factor", text, recipes_table(results, groups),
            scratch_table(sorted(results, key=all_tokens))]  # fmt: skip


Key = tuple[str, str, str]
"""Size, recipe and length of stage."""


def groups_of(results: Sequence[Result]) -> dict[Key, list[Result]]:
    """Grown models and those that were trained on without growth, seeds together."""
    groups: dict[Key, list[Result]] = {}
    for result in results:
        if result["recipe"] and not _is_on_the_way(result):
            groups.setdefault((result["size"], result["recipe"], result["label"]), []).append(result)
    return groups


def _is_on_the_way(result: Result) -> bool:
    """Is it a growth of a chain after which another one follows?"""
    return result["size"] in ("chain 2", "chain 3")


def recipes_table(results: Sequence[Result], groups: dict[Key, list[Result]]) -> str:
    """Final losses, differences to scratch and savings of every recipe."""
    comparison, rows = Comparison(results), []
    for (size, recipe, label), group in groups.items():
        first = group[0]
        rows.append([
            size, recipe, label, str(len(group)), mean_and_error([result["loss"]["text"] for result in group]),
            *_savings(comparison.savings(group)), f"{own_tokens(first) / 1e6:.2f}M", f"{all_tokens(first) / 1e6:.2f}M",
            f"{all_flops(first) - first['flops_before']:.2e}", f"{all_flops(first):.2e}",
        ])  # fmt: skip
    header = ["size", "recipe", "stage", "seeds", "loss", "minus scratch, all tokens", "minus scratch, as many tokens",
              "saving after growth", "saving in all", "saving of FLOPs after growth", "in all", "tokens of the stage",
              "in all", "FLOPs of the stage", "in all"]  # fmt: skip
    return table(header, rows)


def _savings(savings: Sequence[Saving]) -> list[str]:
    if not savings:
        return [""] * 6
    bounds = "".join(sorted({saving.bound for saving in savings} - {""}))
    differences = [mean_and_error([getattr(s, name) for s in savings], 3, "+") for name in
                   ("difference", "same_difference")]  # fmt: skip
    names = ("after", "in_all", "flops_after", "flops_in_all")
    return differences + [
        f"{bounds} {mean_and_error([getattr(saving, name) for saving in savings], 2)}".strip() for name in names
    ]


def tokens_table(groups: dict[Key, list[Result]]) -> str:
    """What became of new tokens, and what the growth changed at once."""
    rows = []
    for (size, recipe, label), group in groups.items():
        if "loss_before" in group[0]:
            jump = statistics.mean(result["loss_after"] - result["loss_before"] for result in group)
            change = max(result["logit_difference"] / result["largest_logit"] for result in group)
            rows.append([size, recipe, label, *_by_kind(group, "new_keys_rms"), *_by_kind(group, "new_tokens_in_use"),
                         f"{jump:+.3f}", f"{change:.0e}"])  # fmt: skip
    kinds = ("qkv", "proj", "ffn")
    header = ["size", "recipe", "stage", *(f"keys' RMS new/old, {kind}" for kind in kinds),
              *(f"new tokens in use, {kind}" for kind in kinds), "loss at the growth",
              "largest change of a logit"]  # fmt: skip
    return table(header, rows)


def _by_kind(group: Sequence[Result], name: str) -> list[str]:
    found: list[dict[str, Any]] = [result[name] for result in group if name in result]
    kinds = ("qkv", "proj", "ffn")
    return [f"{statistics.mean(each[kind] for each in found):.2f}" if found else "" for kind in kinds]


def scratch_table(results: Sequence[Result]) -> str:
    """Annealed models of each size, by the part of the base's tokens."""
    groups: dict[tuple[str, str], list[Result]] = {}
    for result in results:
        if is_scratch(result):
            groups.setdefault((result["size"], result["label"]), []).append(result)
    rows = [
        [size, label, f"{group[0]['parameters']:,}", f"{all_tokens(group[0]) / 1e6:.2f}M", str(len(group)),
         mean_and_error([result["loss"]["text"] for result in group])]
        for (size, label), group in groups.items()
    ]  # fmt: skip
    return table(["size", "length", "parameters", "tokens", "seeds", "loss"], rows)


def screening_table(experiment: Experiment) -> str:
    """Every mechanism alone."""
    losses = experiment.screened()
    plain = losses["random"]
    rows = [
        [recipe, f"{loss:.4f}", f"{loss - plain:+.4f}"] for recipe, loss in losses.items() if loss < float("inf")
    ]  # fmt: skip
    return table(["recipe", "loss", "against random keys"], rows)


def _choice(experiment: Experiment) -> str:
    losses = experiment.screened()
    missing = [recipe for recipe in SCREENED if losses[recipe] == float("inf")]
    if missing:
        return f"Nothing is chosen yet: no result of {', '.join(missing)}."
    helped = ", ".join(chosen(losses))
    first = f"{TOGETHER}: {helped}, of {len(MECHANISMS)} mechanisms; best alone: {best_alone(losses)}"
    waits = any(losses[recipe] == float("inf") for recipe in REFINED)
    return first + ("." if waits else f"; {BEST}, of these and what was tried beside it: {best(losses)}.")


def rates_table(results: Sequence[Result]) -> str:
    """The runs that chose the peak rates, and those that tried the deep Transformer's."""
    tried = [(result["name"].removeprefix("rates/"), result) for result in results if "rates/" in result["name"]]
    rows = [
        [name.rpartition("-")[0], f"{result['peak_lr']:g}", f"{result['loss']['tuning']:.4f}"] for name, result in tried
    ]
    return table(["model", "rate", "loss"], rows)
