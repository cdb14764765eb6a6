"""What was measured of growth, for the advice on one: the figures of measured.json, and which of them are near.

`python -m tools.growth_experiment.regime report --publish` writes that file from the results it keeps, and nothing else
does; docs/growth_experiment.md says how they were measured.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from megatron.config.sections.scaling import Part, ScalingConfig, initial_keys

FILE = Path(__file__).with_name("measured.json")
NEAR_FACTOR, NEAR_PART = 1.5, 2.0
"""By what the factor of a growth, and the part of its training, may differ from those that were measured."""
PARTS: tuple[Part, ...] = ("new_keys", "new_values", "old_keys", "old_values", "other")


@dataclass(frozen=True)
class Measured:
    """One way to grow, by one factor and with one length of training after it. Sequences have a number for each seed.

    Losses are on held-out text, in nats a token. What is compared is of the same seed.
    """

    recipe: str
    """Its name on the page."""
    keys: Mapping[str, Any]
    """Of an entry of `growth`."""
    schedule: Mapping[str, Any]
    """What is other than in most: `new_tokens_warmup`, `warmup` and `decay` as parts of the updates after the growth,
    `decay_style`, `lr` as a factor on the peak rate, `annealed` for a growth after the decay of the rate."""
    factor: float
    """Parameters after the growth over those before."""
    part: float
    """Updates after the growth over those before."""
    losses: Sequence[float]
    minus_no_growth: Sequence[float] = ()
    """The loss minus that of the small model after as many updates more."""
    minus_scratch: Sequence[float] = ()
    """The loss minus that of a model from scratch after as many updates as came after the growth."""
    savings: Sequence[float] = ()
    """Updates from scratch to the same loss, over those after the growth."""
    savings_in_all: Sequence[float] = ()
    """The same over all updates, those before the growth too."""
    bound: str = ""
    """`>` or `<` where no length from scratch that was measured has this loss."""

    @property
    def gain(self) -> float:
        """Nats a token that the growth is better than training on without it."""
        return -statistics.mean(self.minus_no_growth) if self.minus_no_growth else -math.inf


@dataclass(frozen=True)
class Measurements:
    """All that was measured, and of what."""

    page: str
    text: str
    base_parameters: int
    tokens_per_parameter: int
    """Of the training before the growth."""
    finished: int
    """Trials of the experiment that have a result."""
    trials: int
    measured: Sequence[Measured]

    def near(self, factor: float, part: float) -> list[Measured]:
        """What was measured at the point that is nearest to a growth; nothing where none is near.

        Args:
            factor: parameters after the growth over those before.
            part: updates after it over those before the first growth.
        """

        def distances(each: Measured) -> tuple[float, float]:
            by_factor, by_part = abs(math.log(factor / each.factor)), abs(math.log(part / each.part))
            return by_factor / math.log(NEAR_FACTOR), by_part / math.log(NEAR_PART)

        found = [(sum(distances(each)), each) for each in self.measured if max(distances(each)) <= 1]
        least = min((distance for distance, _ in found), default=0.0)
        return [each for distance, each in found if distance == least]


@cache
def measurements(file: Path = FILE) -> Measurements:
    """What the file has."""
    content = json.loads(file.read_text(encoding="utf-8"))
    return Measurements(**{**content, "measured": [Measured(**each) for each in content["measured"]]})


def best_of(found: Iterable[Measured]) -> Measured | None:
    """The way that gained most, of those that most seeds have; growth of an annealed model is not among them."""
    choice = [each for each in found if not each.schedule.get("annealed") and each.minus_no_growth]
    seeds = max((len(each.minus_no_growth) for each in choice), default=0)
    return max((each for each in choice if len(each.minus_no_growth) == seeds), key=lambda e: e.gain, default=None)


def same_way(found: Iterable[Measured], scaling: ScalingConfig) -> Measured | None:
    """What was measured of the keys of `scaling`, which are those of one growth (GrowthSchedule.after).

    Of several the one that most seeds have: a recipe that was chosen has a name of its own beside that of its trial.
    """
    asked = _way(scaling)
    same = [each for each in found if not each.schedule and _way(ScalingConfig(**each.keys)) == asked]
    return max(same, key=lambda each: len(each.losses), default=None)


def _way(scaling: ScalingConfig) -> tuple[Any, ...]:
    """All that says how new tokens start and are trained."""
    rates = [scaling.lr_factor(part) for part in PARTS]
    others = [scaling.freeze_old_tokens, scaling.new_tokens_warmup, scaling.new_keys_decay, scaling.new_moments]
    return initial_keys(scaling.new_keys, scaling.row_norm), scaling.row_norm, *rates, *others
