"""Figures: loss against tokens and FLOPs, loss and saving against the length of a stage, and the moment of growth."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tools.figures import pyplot_for
from tools.growth_experiment.regime.recipes import BEST, OFFICIAL
from tools.growth_experiment.regime.saving import (
    Comparison,
    Result,
    all_flops,
    all_tokens,
    is_scratch,
    own_tokens,
    standard_error,
)
from tools.growth_experiment.regime.sizes import STAGES
from tools.growth_experiment.regime.trials import NONE

_SHOWN = {BEST: "tab:orange", "random": "tab:purple", "rotated": "tab:green", "zero": "tab:blue",
          OFFICIAL: "tab:red", NONE: "0.55"}  # fmt: skip
_COMPARED = ("grown", "base")
"""Sizes whose results are drawn: the growth of the published models, and the base that is trained on without it."""


def draw_figures(results: Sequence[Result], output: Path) -> None:
    """Write a regime_NAME.png each for loss_tokens, loss_flops, stage, saving and moment, where there is anything.

    Raises UserError without matplotlib.
    """
    pyplot = pyplot_for("report")
    figures = {
        "loss_tokens": _against(pyplot, results, lambda r: all_tokens(r) / 1e6, "training tokens in all (millions)"),
        "loss_flops": _against(pyplot, results, all_flops, "training FLOPs in all"),
        "stage": _against(
            pyplot, results, lambda r: _since_base(r) / 1e6, "training tokens, the base not counted (millions)"
        ),
        "saving": _saving(pyplot, results),
        "moment": _moment(pyplot, results),
    }
    for name, figure in figures.items():
        file = output / f"regime_{name}.png"
        file.unlink(missing_ok=True)
        if _labelled(figure.axes[0]):
            figure.savefig(file, dpi=120)


def _since_base(result: Result) -> float:
    return all_tokens(result) if is_scratch(result) else own_tokens(result)


def _against(pyplot: Any, results: Sequence[Result], x: Callable[[Result], float], label: str) -> Any:
    """Final losses of the grown size: models from scratch as a line, recipes by the length of their stage."""
    figure, axes = pyplot.subplots(figsize=(6.4, 4.4), layout="constrained")
    _line(axes, [r for r in results if is_scratch(r) and r["size"] == "grown"], x, "from scratch", "black")
    for recipe, colour in _SHOWN.items():
        chosen = [r for r in results if r["recipe"] == recipe and r["size"] in _COMPARED]
        _line(axes, chosen, x, recipe, colour)
    axes.set(xlabel=label, ylabel="held-out loss (nats a token)", xscale="log")
    _legend(axes)
    return figure


def _line(axes: Any, results: Sequence[Result], x: Callable[[Result], float], label: str, colour: str) -> None:
    groups: dict[float, list[float]] = {}
    for result in results:
        groups.setdefault(x(result), []).append(result["loss"]["text"])
    if groups:
        places = sorted(groups)
        axes.plot(places, [statistics.mean(groups[p]) for p in places], "o-", markersize=4, linewidth=1.2,
                  color=colour, label=label)  # fmt: skip


def _saving(pyplot: Any, results: Sequence[Result]) -> Any:
    """Saving after the growth by the updates of the stage, with standard errors over seeds; a bound is an arrow."""
    figure, axes = pyplot.subplots(figsize=(6.4, 4.0), layout="constrained")
    comparison = Comparison(results)
    for recipe, colour in _SHOWN.items():
        points = []
        for label in STAGES:
            group = [r for r in results if (r["recipe"], r["label"]) == (recipe, label) and r["size"] in _COMPARED]
            savings = comparison.savings(group)
            if savings:
                after = [saving.after for saving in savings]
                bounds = {saving.bound for saving in savings}
                mean, error = statistics.mean(after), standard_error(after)
                points.append((group[0]["updates"], mean, error, ">" in bounds, "<" in bounds))
        if points:
            updates, means, errors, lowest, highest = zip(*points, strict=True)
            axes.errorbar(updates, means, errors, marker="o", markersize=4, linewidth=1.2, capsize=3, lolims=lowest,
                          uplims=highest, color=colour, label=recipe)  # fmt: skip
    axes.axhline(1, color="0.7", linewidth=0.8)
    axes.set(xlabel="updates of the stage", ylabel="tokens from scratch to the same loss,\nover those of the stage")
    _legend(axes)
    return figure


def _moment(pyplot: Any, results: Sequence[Result]) -> Any:
    """The loss since the growth, minus that before it; seed 1, a tenth."""
    figure, axes = pyplot.subplots(figsize=(6.4, 4.0), layout="constrained")
    for result in results:
        colour = _SHOWN.get(result["recipe"])
        if colour and result["seed"] == 1 and result["label"] == "tenth" and result["size"] == "grown":
            points = [(0, result["loss_after"]), *result["curve"]]
            axes.plot([u / result["updates"] for u, _ in points], [loss - result["loss_before"] for _, loss in points],
                      "o-", markersize=3, linewidth=1, color=colour, label=result["recipe"])  # fmt: skip
    axes.axhline(0, color="0.7", linewidth=0.8)
    axes.set(xlabel="part of the stage", ylabel="held-out loss minus that before the growth")
    _legend(axes)
    return figure


def _labelled(axes: Any) -> bool:
    return bool(axes.get_legend_handles_labels()[0])


def _legend(axes: Any) -> None:
    if _labelled(axes):
        axes.legend(frameon=False, fontsize=8)
