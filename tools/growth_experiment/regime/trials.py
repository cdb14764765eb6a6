"""The trials, in order of value: what each trains, from what, for how long."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from tools.growth_experiment.regime.recipes import BEST, KEYS, OFFICIAL, REFINED, SCREENED, TOGETHER
from tools.growth_experiment.regime.sizes import SIZES, STAGES, TOKENS_PER_UPDATE, Kind, Size

Start = Literal["scratch", "branch", "grow", "official", "net2net", "clone", "stack"]
Plan = Literal["full", "check"]
"""All trials, or the few that try what was chosen, on another text."""
RATES: dict[Kind, tuple[float, ...]] = {
    "tokenformer": (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2),
    "transformer": (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2),
}
"""Peak rates that are tried for the base of each kind, in runs of a fifth; muP carries them to the other sizes."""
RATES_OF_DEEP = (2e-3, 4e-3)
"""Tried for the deep Transformer from scratch too: does it train as well as it can at the best of its kind?"""
NONE = "no growth"
ON_TRANSFORMERS: dict[str, tuple[Start, str]] = {
    "Net2Net": ("net2net", "wide"), "HyperCloning": ("clone", "double"), "G_stack": ("stack", "deep"),
}  # fmt: skip
"""Ways to grow a Transformer, and the size each leads to."""
ANNEAL = 0.2
"""Part of a run from scratch in which its rate decays."""
_SECONDS = 10.0
"""Of one core, for a trial beside its updates."""


@dataclass(frozen=True)
class Trial:
    """One training run."""

    name: str
    """Unique; also its folder, and with _ for / its result's file."""
    seed: int
    size: Size
    """Of the model that is trained."""
    updates: int
    """Its own, those of what it starts from not counted."""
    start: Start = "scratch"
    parent: str | None = None
    """Name of the trial that it starts from."""
    at: int = 0
    """Iteration of the parent's checkpoint."""
    recipe: str = ""
    """How it grew: of recipes.py or ON_TRANSFORMERS, or NONE."""
    label: str = ""
    """Of STAGES."""
    decay: float = 0.0
    """Part of its updates in which the rate decays; 0 for a trunk. A recipe may have its own."""
    saves: tuple[int, ...] = ()
    """Iterations whose checkpoints are kept beside the last."""
    rate: float | None = None
    """Peak rate; default the best of RATES."""
    needs: tuple[str, ...] = ()
    """Trials whose losses decide how this one is trained."""

    @property
    def file(self) -> str:
        """Name of its result's file."""
        return self.name.replace("/", "_") + ".json"

    @property
    def core_hours(self) -> float:
        """Estimated time on one core with nothing else to do."""
        return (self.updates * self.size.milliseconds / 1e3 + _SECONDS) / 3600

    @property
    def is_trunk(self) -> bool:
        """It ends at its full rate: others go on from it, and its own final loss is no result."""
        return not self.decay


def slug(text: str) -> str:
    """A name as part of a file's name."""
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-")


def rate_trials(kind: Kind, updates: int) -> list[Trial]:
    """The runs that choose a kind's peak rate."""
    size = SIZES["base" if kind == "tokenformer" else "transformer"]
    return [_rate_trial(kind, size, rate, updates) for rate in RATES[kind]]


def _rate_trial(name: str, size: Size, rate: float, updates: int) -> Trial:
    length = round(STAGES["fifth"] * updates)
    return Trial(f"rates/{name}-{rate:g}", 1, size, length, label="fifth", decay=ANNEAL, rate=rate)


def all_trials(updates: int) -> list[Trial]:
    """Every trial in the order in which they run, parents first.

    First what one seed tells: the keys against training from scratch, then every mechanism and the best together. Then
    three seeds of what matters most; what is tried beside the best, and three seeds of the best with stages of three
    lengths; other ways to grow, another factor and the chain, one seed each; and last what makes all of these fuller.

    Args:
        updates: of the base.
    """
    makers = [_Seed(seed, updates) for seed in (1, 2, 3)]
    first, *others = makers
    found = [*rate_trials("tokenformer", updates), *first.base(), *first.grown(KEYS), *first.scratch("grown")]
    found += first.screening()
    for maker in others:
        found += [*maker.base(), *maker.grown((TOGETHER, "zero", "random", OFFICIAL)), *maker.scratch("grown")]
    found += first.grown(REFINED)
    for maker in makers:
        found += [*maker.grown((BEST,)), *maker.longer("fifth", (BEST, "zero"))]
    for maker in makers:
        found += maker.grown((BEST,), "two fifths")
    found += [*rate_trials("transformer", updates), *first.transformers()]
    found += [_rate_trial("deep", SIZES["deep"], rate, updates) for rate in RATES_OF_DEEP]
    found += [*first.tripled((BEST, "zero", OFFICIAL)), *first.chain(BEST), *first.chain("zero")]
    found += first.scratch("chain 4")
    return [*found, *_further(makers)]


def check_trials(updates: int) -> list[Trial]:
    """Some ten trials of one seed that try what was chosen from those of `all_trials`: another text and factor."""
    maker = _Seed(1, updates)
    return [*maker.base(), *maker.tripled((BEST, "zero", "random", OFFICIAL))]


def _further(makers: Sequence[_Seed]) -> Iterator[Trial]:
    _, *others = makers
    for maker in others:
        yield from maker.grown(("rotated",))
    for maker in makers:
        yield from maker.grown(("random", OFFICIAL), "fifth")


class _Seed:
    """The trials of one seed.

    Args:
        seed: of initialisation and order of data.
        updates: of the base.
    """

    def __init__(self, seed: int, updates: int) -> None:
        self._seed, self._updates, self._root = seed, updates, f"seed{seed}"
        self._rates = tuple(trial.name for trial in rate_trials("tokenformer", updates))
        self._screened, self._refined = (
            tuple(f"seed1/grown/{slug(recipe)}-tenth" for recipe in recipes) for recipes in (SCREENED, REFINED)
        )

    def base(self) -> Iterator[Trial]:
        """The trunk that everything grows from, and the same training without growth."""
        yield self._trunk("base", self._updates, (self._before_anneal,))
        yield self._branch("base", NONE, self._updates, STAGES["tenth"], "tenth")

    def screening(self) -> Iterator[Trial]:
        """Every mechanism alone beside the keys, then the best together; and the annealed base that one starts from."""
        yield self._branch("base", "annealed", self._before_anneal, STAGES["tenth"])
        yield from self.grown([recipe for recipe in SCREENED if recipe not in KEYS])
        yield self._grown(TOGETHER)

    def grown(self, recipes: Iterable[str], label: str = "tenth") -> Iterator[Trial]:
        """One growth from the base by each recipe."""
        yield from (self._grown(recipe, label) for recipe in recipes)

    def tripled(self, recipes: Iterable[str]) -> Iterator[Trial]:
        """The same by another factor, and from scratch."""
        yield from (self._grown(recipe, size="tripled") for recipe in recipes)
        yield from self.scratch("tripled")

    def longer(self, label: str, recipes: tuple[str, ...]) -> Iterator[Trial]:
        """A longer stage."""
        yield self._branch("base", NONE, self._updates, STAGES[label], label)
        yield from self.grown(recipes, label)

    def scratch(self, size: str) -> Iterator[Trial]:
        """A trunk of the grown size from scratch, and its annealed models after each of STAGES."""
        starts = {label: self._length((1 - ANNEAL) * part) for label, part in STAGES.items()}
        yield self._trunk(size, starts["all"], tuple(starts.values())[:-1])
        for label, at in starts.items():
            yield self._branch(size, f"scratch {label}", at, ANNEAL * STAGES[label], label)

    def chain(self, recipe: str) -> Iterator[Trial]:
        """Three growths after each other with a tenth of the updates each; only the last decays."""
        parent, at = f"{self._root}/base", self._updates
        length = self._length(STAGES["tenth"])
        for number in (2, 3, 4):
            name = f"{self._root}/chain-{number}/{slug(recipe)}-tenth"
            yield Trial(
                name, self._seed, SIZES[f"chain {number}"], length, "grow", parent, at, recipe, "tenth",
                1.0 if number == 4 else 0.0, needs=self._needs(recipe),
            )  # fmt: skip
            parent, at = name, length

    def transformers(self) -> Iterator[Trial]:
        """Other ways to grow, beside a Transformer of each size from scratch."""
        rates = tuple(trial.name for trial in rate_trials("transformer", self._updates))
        yield self._trunk("transformer", self._updates)
        yield self._branch("transformer", NONE, self._updates, STAGES["tenth"], "tenth")
        for recipe, (start, size) in ON_TRANSFORMERS.items():
            yield Trial(
                f"{self._root}/{size}/{slug(recipe)}-tenth", self._seed, SIZES[size], self._length(STAGES["tenth"]),
                start, f"{self._root}/transformer", self._updates, recipe, "tenth", 1.0, needs=rates,
            )  # fmt: skip
        for _, size in ON_TRANSFORMERS.values():
            yield from self.scratch(size)

    @property
    def _before_anneal(self) -> int:
        return self._length(1 - STAGES["tenth"])

    def _length(self, part: float) -> int:
        return max(2, round(part * self._updates))

    def _trunk(self, size: str, updates: int, saves: tuple[int, ...] = ()) -> Trial:
        needs = tuple(trial.name for trial in rate_trials(SIZES[size].kind, self._updates))
        return Trial(f"{self._root}/{slug(size)}", self._seed, SIZES[size], updates, saves=saves, needs=needs)

    def _branch(self, trunk: str, name: str, at: int, part: float, label: str = "") -> Trial:
        stage = f"-{slug(label)}" if name == NONE else ""
        return Trial(
            f"{self._root}/{slug(trunk)}-{slug(name)}{stage}", self._seed, SIZES[trunk], self._length(part), "branch",
            f"{self._root}/{slug(trunk)}", at, NONE if name == NONE else "", label, 1.0,
        )  # fmt: skip

    def _grown(self, recipe: str, label: str = "tenth", size: str = "grown") -> Trial:
        name, parent, at = f"{self._root}/{size}/{slug(recipe)}-{slug(label)}", f"{self._root}/base", self._updates
        if (SCREENED | REFINED).get(recipe, {}).get("annealed"):
            parent, at = f"{parent}-annealed", self._before_anneal + self._length(STAGES["tenth"])
        start: Start = "official" if recipe == OFFICIAL else "grow"
        return Trial(
            name, self._seed, SIZES[size], self._length(STAGES[label]), start, parent, at, recipe, label, 1.0,
            needs=self._needs(recipe),
        )  # fmt: skip

    def _needs(self, recipe: str) -> tuple[str, ...]:
        chosen_from = {TOGETHER: self._screened, BEST: self._screened + self._refined}
        return self._rates + chosen_from.get(recipe, ())


def cost_before(trial: Trial, trials: dict[str, Trial], flops_per_token: dict[str, float]) -> tuple[int, float]:
    """Tokens and FLOPs of everything that a trial starts from.

    Args:
        trials: all, by name.
        flops_per_token: by size.
    """
    if trial.parent is None:
        return 0, 0.0
    parent = trials[trial.parent]
    tokens, flops = cost_before(parent, trials, flops_per_token)
    own = (trial.at - first_iteration(parent)) * TOKENS_PER_UPDATE
    return tokens + own, flops + own * flops_per_token[parent.size.name]


def first_iteration(trial: Trial) -> int:
    """The iteration that a trial counts from: a branch goes on counting where its trunk was."""
    return trial.at if trial.start == "branch" else 0
