"""The finished trials of the growth experiment, read from their metrics."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.errors import UserError
from megatron.files import read_json
from tools.growth_experiment.runs import read_metrics
from tools.growth_experiment.trials import PARTS


@dataclass(frozen=True)
class Result:
    """A finished trial."""

    folder: str
    facts: dict[str, Any]
    """What trial.json says."""
    tokens_before: int
    """Tokens that the trials it started from took in all."""
    flops_before: float
    """FLOPs that the trials it started from took in all."""
    curve: list[tuple[int, float]]
    """Held-out loss by updates of this trial; update 0 of a grown model is the moment of growth."""

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
    facts = read_json(files[folder], "delete it: the stage run trains the trial again")
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


Groups = dict[tuple[str, str, str], list[Result]]
"""Results by part, budget or variant, and size."""


def by_key(results: Iterable[Result]) -> Groups:
    """Seeds together."""
    groups: Groups = {}
    for result in results:
        groups.setdefault(result.key, []).append(result)
    return groups
