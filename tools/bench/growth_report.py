"""Tables, results.json and figures of the growth experiment, from the metrics of its finished trials only."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron.errors import UserError
from tools.bench.growth_figures import draw_figures
from tools.bench.growth_plan import FRACTIONS, GROWTH_RATES, PARTS, RATES, SIZES, VARIANTS
from tools.bench.growth_runs import read_metrics

NAMES = {
    "a": "TokenFormer, scratch", "b": "TokenFormer, zero keys", "c": "Transformer, scratch",
    "d": "Transformer, Net2Net", "e": "TokenFormer, as official", "f": "variants",
    "h": "TokenFormer, rotated keys", "r": "rates",
    "s": "TokenFormer, scratch, fewer tokens",
}  # fmt: skip


@dataclass(frozen=True)
class Result:
    """A finished trial.

    Attributes:
        facts: of trial.json.
        tokens_before, flops_before: what the trials it started from took in all.
        curve: held-out loss by updates of this trial; update 0 of a grown model is the moment of growth.
    """

    folder: str
    facts: dict[str, Any]
    tokens_before: int
    flops_before: float
    curve: list[tuple[int, float]]

    @property
    def key(self) -> tuple[str, str, str]:
        """Part, budget or variant, and size."""
        return self.facts["part"], self.facts["label"], self.facts["size"]

    @property
    def final(self) -> float:
        """Held-out loss at the end."""
        return self.curve[-1][1]

    def tokens(self, updates: float) -> float:
        """Tokens of so many updates of this trial."""
        return updates * self.facts["tokens_per_update"]

    def cumulative_tokens(self, updates: float) -> float:
        """The same, with those of the trials before."""
        return self.tokens_before + self.tokens(updates)

    def cumulative_flops(self, updates: float) -> float:
        """Training FLOPs up to so many updates, those of the trials before included; evaluation is not counted."""
        return self.flops_before + self.tokens(updates) * self.facts["flops_per_token"]

    def reaches(self, target: float) -> float | None:
        """Updates after which the loss is down to `target`, on a line between evaluations; None if it never is."""
        for (start, before), (end, after) in zip(self.curve, self.curve[1:], strict=False):
            if after <= target:
                return end if before <= target else start + (end - start) * (before - target) / (before - after)
        return None

    def stays_below(self, target: float) -> float | None:
        """Updates after which the loss is down to `target` for good; None if it ends above."""
        above = [number for number, (_, loss) in enumerate(self.curve) if loss > target]
        if not above:
            return 0
        if above[-1] + 1 == len(self.curve):
            return None
        (start, before), (end, after) = self.curve[above[-1] : above[-1] + 2]
        return start + (end - start) * (before - target) / (before - after)


def read_results(output: Path) -> list[Result]:
    """All finished trials below `output`. Raises UserError when there is none."""
    found: dict[str, Result] = {}
    files = {
        str(path.parent.relative_to(output)): path for part in PARTS for path in output.glob(f"{part}/**/trial.json")
    }
    for folder in sorted(files):
        _read(folder, files, found)
    if not found:
        raise UserError(f"{output}: no finished trial; run the stages prepare and run first")
    return list(found.values())


def _read(folder: str, files: dict[str, Path], found: dict[str, Result]) -> Result | None:
    if folder in found:
        return found[folder]
    facts = json.loads(files[folder].read_text(encoding="utf-8"))
    curve = [(line["iteration"], line["valid_lm_loss"]) for line in read_metrics(files[folder].parent)
             if "valid_lm_loss" in line]  # fmt: skip
    if not curve or curve[-1][0] != facts["updates"]:
        return None
    tokens, flops = 0, 0.0
    if facts["parent"]:
        parent = _read(facts["parent"], files, found)
        if parent is None:
            return None
        updates = parent.facts["updates"]
        tokens, flops = round(parent.cumulative_tokens(updates)), parent.cumulative_flops(updates)
        curve = [(0, facts["loss_after_growth"]), *curve]
    found[folder] = Result(folder, facts, tokens, flops, curve)
    return found[folder]


def by_key(results: Iterable[Result]) -> dict[tuple[str, str, str], list[Result]]:
    """Seeds together."""
    groups: dict[tuple[str, str, str], list[Result]] = {}
    for result in results:
        groups.setdefault(result.key, []).append(result)
    return groups


Groups = dict[tuple[str, str, str], list[Result]]


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
    data = json.loads((output / "data.json").read_text(encoding="utf-8"))
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
