"""Figures of the growth experiment: loss against tokens and FLOPs, and the first updates after each growth."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tools.figures import pyplot_for
from tools.growth_experiment.results import Groups, Result
from tools.growth_experiment.trials import FRACTIONS, SIZES

_COLOURS = {"a": "0.55", "b": "tab:blue", "e": "tab:red", "c": "0.55", "d": "tab:green", "h": "tab:orange"}  # fmt: skip
_CHAINS = {
    "h": "rotated keys (exact)",
    "b": "zero keys (exact)",
    "e": "as the official code grows",
    "d": "Transformer, Net2Net",
}
_STYLES = dict(zip(FRACTIONS, (":", "--", "-"), strict=True))
_MOMENT, _FIRST_UPDATES = "quarter", 100
_KINDS = (("a", ("h", "b", "e"), "TokenFormer"), ("c", ("d",), "Transformer"))


def draw_figures(groups: Groups, output: Path) -> None:
    """Write growth_loss_tokens.png, growth_loss_flops.png and growth_moment.png; seed 1 of everything.

    Raises UserError without matplotlib.
    """
    pyplot = pyplot_for("--stage report")
    firsts = {key: result for key, results in groups.items() for result in results if result.facts["seed"] == 1}
    figures = {
        "loss_tokens": _against(
            pyplot, firsts, lambda r, u: r.cumulative_tokens(u) / 1e6, "cumulative training tokens (millions)", False
        ),
        "loss_flops": _against(pyplot, firsts, lambda r, u: r.cumulative_flops(u), "cumulative training FLOPs", True),
        "moment": _moment(pyplot, firsts),
    }
    for name, figure in figures.items():
        figure.savefig(output / f"growth_{name}.png", dpi=120)


def _against(
    pyplot: Any,
    firsts: dict[tuple[str, str, str], Result],
    x: Callable[[Result, float], float],
    label: str,
    logarithmic: bool,
) -> Any:
    """TokenFormer on the left, Transformer, if there are trials of it, on the right."""
    kinds = [kind for kind in _KINDS if any(key[0] == kind[0] for key in firsts)]
    figure, panels = pyplot.subplots(
        1, len(kinds), figsize=(1 + 5 * len(kinds), 4.4), sharey=True, squeeze=False, layout="constrained"
    )
    for axes, (scratch, grown, title) in zip(panels[0], kinds, strict=True):
        for number, size in enumerate(SIZES):
            if result := firsts.get((scratch, "", size.name)):
                shade = str(0.75 - 0.2 * number)
                points = result.curve
                axes.plot([x(result, u) for u, _ in points], [loss for _, loss in points], color=shade, linewidth=1,
                          label=f"scratch {size.name}")  # fmt: skip
        for part in grown:
            for budget, style in _STYLES.items():
                chain = [firsts[key] for size in SIZES[1:] if (key := (part, budget, size.name)) in firsts]
                for number, result in enumerate(chain):
                    axes.plot([x(result, u) for u, _ in result.curve], [loss for _, loss in result.curve], style,
                              color=_COLOURS[part], linewidth=1.2,
                              label=None if number else f"{_CHAINS[part]}, {budget}")  # fmt: skip
        axes.set(xlabel=label, title=title, xscale="log" if logarithmic else "linear")
        axes.set_ylim(*_limits(firsts))
        axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(0.0, -0.14), ncols=2)
    panels[0][0].set_ylabel("held-out loss (nats per token)")
    return figure


def _limits(firsts: dict[tuple[str, str, str], Result]) -> tuple[float, float]:
    """From the best loss to what a run from scratch has after a tenth of its updates."""
    finals = [result.final for result in firsts.values()]
    early = [loss for key, r in firsts.items() if key[0] in "ac" for u, loss in r.curve if u * 10 >= r.facts["updates"]]
    return min(finals) - 0.05, max(early, default=max(finals)) + 0.05


def _moment(pyplot: Any, firsts: dict[tuple[str, str, str], Result]) -> Any:
    """One panel a growth."""
    figure, panels = pyplot.subplots(1, len(SIZES) - 1, figsize=(11, 3.6), layout="constrained")
    for axes, before, after in zip(panels, SIZES, SIZES[1:], strict=False):
        for part, label in _CHAINS.items():
            result = firsts.get((part, _MOMENT, after.name))
            if result is None or "loss_before_growth" not in result.facts:
                continue
            level = result.facts["loss_before_growth"]
            points = [(0, level), *((u, loss) for u, loss in result.curve if u <= _FIRST_UPDATES)]
            axes.plot([u for u, _ in points], [loss - level for _, loss in points], "o-", markersize=3, linewidth=1,
                      color=_COLOURS[part], label=label)  # fmt: skip
        axes.axhline(0, color="0.7", linewidth=0.8)
        axes.set(xlabel="updates after the growth", title=f"{before.name} to {after.name}")
    panels[0].set_ylabel("held-out loss minus that before the growth")
    panels[0].legend(frameon=False, fontsize=8)
    return figure
