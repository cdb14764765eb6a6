"""What a growth saves: the tokens that training from scratch takes to the same loss, over what the growth took."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tools.growth_experiment.regime.sizes import STAGES

Result = Mapping[str, Any]
"""One file of results."""


@dataclass(frozen=True)
class Curve:
    """Losses of models from scratch, each annealed, by the tokens they took; shortest first."""

    tokens: Sequence[float]
    losses: Sequence[float]
    flops_per_token: float

    def tokens_to(self, loss: float) -> tuple[float, str]:
        """Tokens to a loss, on a line over the logarithm of tokens; `<` or `>` where it is beyond the ends."""
        if loss > self.losses[0]:
            return self.tokens[0], "<"
        for i in range(1, len(self.losses)):
            before, after = self.losses[i - 1], self.losses[i]
            if after <= loss <= before:
                part = (before - loss) / (before - after) if before > after else 1.0
                return math.exp(math.log(self.tokens[i - 1]) * (1 - part) + math.log(self.tokens[i]) * part), ""
        return self.tokens[-1], ">"

    def loss_after(self, tokens: float) -> float:
        """The loss after so many tokens, on the same line; the first or last one beyond the ends."""
        return float(np.interp(math.log(tokens), [math.log(each) for each in self.tokens], self.losses))


@dataclass(frozen=True)
class Saving:
    """Of one grown model."""

    difference: float
    """Its loss minus that from scratch with all tokens, nats a token."""
    same_difference: float
    """Its loss minus that from scratch with the tokens that it took after the base."""
    after: float
    """Tokens from scratch to the same loss, over those after the base."""
    in_all: float
    """The same with the base's tokens counted."""
    flops_after: float
    flops_in_all: float
    bound: str
    """`>` or `<` where the loss from scratch at no measured length is the same."""


def own_tokens(result: Result) -> float:
    """Tokens of this trial."""
    return float(result["updates"] * result["tokens_per_update"])


def all_tokens(result: Result) -> float:
    """Those of what it started from too."""
    return float(result["tokens_before"] + own_tokens(result))


def all_flops(result: Result) -> float:
    """FLOPs of it and of what it started from."""
    return float(result["flops_before"] + own_tokens(result) * result["flops_per_token"])


def scratch_curves(results: Iterable[Result]) -> dict[tuple[str, int], Curve]:
    """By size and seed; of those that have finished at all lengths."""
    points: dict[tuple[str, int], list[tuple[float, float, float]]] = {}
    for result in results:
        if is_scratch(result):
            found = points.setdefault((result["size"], result["seed"]), [])
            found.append((all_tokens(result), result["loss"]["text"], result["flops_per_token"]))
    curves = {}
    for key, found in points.items():
        if len(found) < len(STAGES):
            continue
        tokens, losses, flops = zip(*sorted(found), strict=True)
        curves[key] = Curve(tokens, losses, flops[0])
    return curves


def is_scratch(result: Result) -> bool:
    """Is it an annealed model of a trunk from scratch?"""
    return result["start"] == "branch" and not result["recipe"] and bool(result["label"])


def saving_of(result: Result, curve: Curve, base: Result) -> Saving:
    """What a grown model saves against models of its size from scratch.

    Args:
        curve: of its size.
        base: the trunk that it grew from, or that its chain began with.
    """
    loss = result["loss"]["text"]
    tokens, bound = curve.tokens_to(loss)
    after, flops = all_tokens(result) - all_tokens(base), tokens * curve.flops_per_token
    return Saving(
        loss - curve.losses[-1],
        loss - curve.loss_after(after),
        tokens / after,
        tokens / all_tokens(result),
        flops / (all_flops(result) - all_flops(base)),
        flops / all_flops(result),
        bound,
    )


class Comparison:
    """Results beside models from scratch of the same seed, or of the first where their own is not there."""

    def __init__(self, results: Sequence[Result]) -> None:
        self._curves = scratch_curves(results)
        trunks = [each for each in results if each["start"] == "scratch" and not each["label"]]
        self._trunks = {(each["size"], each["seed"]): each for each in trunks}

    def saving(self, result: Result) -> Saving | None:
        """What a model saves; None while what it is compared with has not finished.

        A model that did not grow is compared with what others grew to.
        """
        size = {"base": "grown", "transformer": "wide"}.get(str(result["size"]), str(result["size"]))
        curve = self._curves.get((size, result["seed"])) or self._curves.get((size, 1))
        base = self._trunks.get(("base" if result["kind"] == "tokenformer" else "transformer", result["seed"]))
        return saving_of(result, curve, base) if curve and base else None

    def savings(self, group: Iterable[Result]) -> list[Saving]:
        """Those of a group of results that there are."""
        return [saving for result in group if (saving := self.saving(result))]


def mean_and_error(values: Sequence[float], digits: int = 3, sign: str = "") -> str:
    """`mean +- standard error`; one value has no error."""
    mean = f"{statistics.mean(values):{sign}.{digits}f}"
    if len(values) == 1:
        return mean
    return f"{mean} +- {standard_error(values):.{digits}f}"


def standard_error(values: Sequence[float]) -> float:
    """Of the mean; 0 for one value, whose error is not known."""
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0
