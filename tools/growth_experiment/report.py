"""Tables, results.json and figures of the growth experiment, from the metrics of its finished trials only."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

from megatron.files import read_json
from tools.growth_experiment.figures import draw_figures
from tools.growth_experiment.results import Groups, Result, by_key, read_results
from tools.growth_experiment.trials import FRACTIONS, GROWTH_RATES, RATES, SIZES, VARIANTS

NAMES = {
    "a": "TokenFormer, scratch", "b": "TokenFormer, zero keys", "c": "Transformer, scratch",
    "d": "Transformer, Net2Net", "e": "TokenFormer, as official", "f": "variants",
    "h": "TokenFormer, rotated keys", "r": "rates",
    "s": "TokenFormer, scratch, fewer tokens",
}  # fmt: skip


def spread(values: Sequence[float], digits: int = 3) -> str:
    """`mean +- standard deviation (number of seeds)`; one value has no deviation."""
    if len(values) == 1:
        return f"{values[0]:.{digits}f} (1)"
    return f"{statistics.mean(values):.{digits}f} +- {statistics.stdev(values):.{digits}f} ({len(values)})"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def final_losses(groups: Groups) -> str:
    """Held-out loss of every size from scratch."""
    rows = []
    for size in SIZES:
        cells = [size.name]
        for part in ("a", "c"):
            trials = groups.get((part, "", size.name))
            cells += (
                [f"{trials[0].facts['non_embedding']:,}", spread([t.final for t in trials])] if trials else ["", ""]
            )
        rows.append(cells)
    header = ["size", "TokenFormer, non-embedding", "loss (seeds)", "Transformer, non-embedding", "loss (seeds)"]
    return table(header, rows)


def reaching_scratch(groups: Groups) -> str:
    """What each way takes to the loss that training from scratch ends at, same size and kind of model."""
    rows = []
    for size in SIZES[1:]:
        for part in ("s", "b", "h", "e", "d"):
            scratch = groups.get(("c" if part == "d" else "a", "", size.name))
            if not scratch:
                continue
            if part in "sd":
                rows.append(_row_of_scratch(scratch))
            base = groups["c" if part == "d" else "a", "", SIZES[0].name]
            for label in FRACTIONS:
                if trials := groups.get((part, label, size.name)):
                    rows.append(_row_of_growth(trials, scratch, base))
    header = ["size", "model", "stage budget", "final loss (seeds)", "minus scratch", "seeds that reach it",
              "tokens after last growth", "cumulative tokens", "cumulative FLOPs"]  # fmt: skip
    return table(header, rows)


def _row_of_scratch(scratch: list[Result]) -> list[str]:
    first = scratch[0]
    updates, name = first.facts["updates"], NAMES[first.key[0]]
    tokens, flops = first.cumulative_tokens(updates), first.cumulative_flops(updates)
    losses = spread([result.final for result in scratch])
    return [first.key[2], name, "", losses, "0", "", _millions(tokens), _millions(tokens), f"{flops:.2e}"]


def _row_of_growth(trials: list[Result], scratch: list[Result], base: list[Result]) -> list[str]:
    part, label, size = trials[0].key
    target = statistics.mean(result.final for result in scratch)
    is_target = target <= statistics.mean(result.final for result in base)
    gap = statistics.mean(result.final for result in trials) - target
    end = trials[0].facts["updates"]
    budget = _millions(trials[0].tokens(end))
    reached = [(trial, updates) for trial in trials if (updates := trial.reaches(target)) is not None]
    tokens, flops = trials[0].cumulative_tokens(end), trials[0].cumulative_flops(end)
    cells = [f"> {budget}", f"> {_millions(tokens)}", f"> {flops:.2e}"]
    if reached:
        after = statistics.mean(trial.tokens(updates) for trial, updates in reached)
        tokens = statistics.mean(trial.cumulative_tokens(updates) for trial, updates in reached)
        flops = statistics.mean(trial.cumulative_flops(updates) for trial, updates in reached)
        cells = [_millions(after), _millions(tokens), f"{flops:.2e}"]
    seeds = f"{len(reached)} of {len(trials)}" if is_target else ""
    losses = spread([trial.final for trial in trials])
    named = f"{label} {budget}".strip()
    return [size, NAMES[part], named, losses, f"{gap:+.3f}", seeds, *(cells if is_target else ["no target"] * 3)]


def _millions(tokens: float) -> str:
    return f"{tokens / 1e6:.2f}M"


def whole_family(groups: Groups) -> str:
    """What it takes to have all four sizes, each trained to its end."""
    rows = []
    for part, labels in (
        ("a", [""]),
        ("c", [""]),
        ("b", list(FRACTIONS)),
        ("h", list(FRACTIONS)),
        ("e", list(FRACTIONS)),
        ("d", list(FRACTIONS)),
    ):
        for label in labels:
            chains = [groups.get((part, label, size.name)) for size in SIZES]
            last = chains[-1]
            if not last or (not label and not all(chains)):
                continue
            ends = [group[0] for group in chains if group] if not label else [last[0]]
            tokens = sum(end.cumulative_tokens(end.facts["updates"]) for end in ends)
            flops = sum(end.cumulative_flops(end.facts["updates"]) for end in ends)
            rows.append([NAMES[part], label, _millions(tokens), f"{flops:.2e}", spread([r.final for r in last])])
    return table(["model", "stage budget", "tokens", "FLOPs", f"final loss of {SIZES[-1].name} (seeds)"], rows)


def moments(groups: Groups) -> str:
    """The loss before and after each growth, and how long it takes to be back."""
    rows = []
    for size in SIZES[1:]:
        for part in ("b", "h", "e", "d"):
            for label in FRACTIONS:
                if trials := groups.get((part, label, size.name)):
                    rows.append(_row_of_moment(trials))
    header = ["grown to", "model", "stage budget", "loss before", "right after", "highest in the stage", "at its end",
              "largest change of a logit", "tokens until below for good"]  # fmt: skip
    return table(header, rows)


def _row_of_moment(trials: list[Result]) -> list[str]:
    part, label, size = trials[0].key

    def mean(values: Iterable[float]) -> str:
        return f"{statistics.mean(values):.3f}"

    below = [trial.stays_below(trial.facts["loss_before_growth"]) for trial in trials]
    found = [updates for updates in below if updates is not None]
    text = f"{trials[0].tokens(statistics.mean(found)):,.0f}" if len(found) == len(trials) else "not in the stage"
    return [
        size, NAMES[part], label,
        mean(trial.facts["loss_before_growth"] for trial in trials),
        mean(trial.facts["loss_after_growth"] for trial in trials),
        mean(max(loss for _, loss in trial.curve) for trial in trials),
        mean(trial.final for trial in trials),
        f"{max(trial.facts['logit_difference'] for trial in trials):.1e}", text,
    ]  # fmt: skip


def variants(groups: Groups) -> str:
    """Part f, each beside the first."""
    found = [(label, trials[0].final) for label in VARIANTS if (trials := groups.get(("f", label, SIZES[-1].name)))]
    rows = [[label, f"{loss:.3f}", f"{loss - found[0][1]:+.3f}"] for label, loss in found]
    return table(["one growth, S1 -> S4, a tenth of the tokens, seed 1", "final loss", "against the first"], rows)


def rates(groups: Groups) -> str:
    """Part r: losses on the tuning text, the lowest of each row in bold."""
    names = {"tokenformer": "TokenFormer, scratch", "transformer": "Transformer, scratch",
             "grow": "S1 grown, zero keys", "rotate": "S1 grown, rotated keys",
             "official": "S1 grown as official", "net2net": "S1 widened by Net2Net"}  # fmt: skip
    everything = sorted({*RATES, *GROWTH_RATES})
    rows = []
    for name, title in names.items():
        for size in SIZES:
            trials = [groups.get(("r", f"{name} {rate:g}", size.name)) for rate in everything]
            losses = [trial[0].final for trial in trials if trial]
            if losses:
                texts = [f"{trial[0].final:.3f}" if trial else "" for trial in trials]
                best = f"{min(losses):.3f}"
                rows.append([size.name, title, *(f"**{text}**" if text == best else text for text in texts)])
    return table(["size", "model", *(f"{rate:g}" for rate in everything)], rows)


def write_report(output: Path) -> None:
    """Write report.md, results.json and the figures, and print the report."""
    results = read_results(output)
    groups = by_key(results)
    data = read_json(output / "data.json", "delete it and run the stage prepare again")
    text = "\n\n".join([
        "# Growth experiment",
        f"{len(results)} finished trials; {data['tokens']:,} tokens from scratch; {data['held_out_tokens']:,} held-out "
        "tokens, the same for all. Losses in nats per token; +- is the standard deviation over seeds.",
        "## From scratch", final_losses(groups),
        "## Reaching the loss of training from scratch", reaching_scratch(groups),
        f"No target: training this size from scratch ends above the loss of {SIZES[0].name}, from which growth starts.",
        "## All four sizes", whole_family(groups),
        "## The moment of growth", moments(groups),
        "## Variants", variants(groups),
        "## Learning rates (short runs, tuning text, seed 1)", rates(groups),
    ])  # fmt: skip
    (output / "report.md").write_text(text + "\n", encoding="utf-8")
    (output / "results.json").write_text(json.dumps([asdict(r) for r in results], indent=1), encoding="utf-8")
    draw_figures(groups, output)
    print(text)
