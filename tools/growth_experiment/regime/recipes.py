"""How a TokenFormer grows: each mechanism alone, and what is chosen from how these did.

All choices are made on the tuning text, with the first seed; results come from the other held-out text.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

OFFICIAL = "official"
"""New tokens at their initialisation, tau from the new count, optimizer and data from the start."""
TOGETHER, BEST = "together", "best"
"""The mechanisms that helped, all at once; and the recipe that helped most, of SCREENED and REFINED."""
CHOSEN = (TOGETHER, BEST)
"""Recipes that stand for others, or for several at once."""

_RANDOM = {"row_norm": "segment"}
KEYS: dict[str, dict[str, Any]] = {
    "zero": {},
    "rotated": {"new_keys": "rotated"},
    "random": _RANDOM,
    "rotated, own norm": {"row_norm": "segment", "new_keys": "rotated"},
}
"""What new keys start as. Each is exact."""
_PLAIN = "random"
"""The keys beside which the mechanisms below are tried."""
MECHANISMS: dict[str, dict[str, Any]] = {
    "old x 0.1": {"lr_scale": {"old": 0.1}},
    "old x 0.3": {"lr_scale": {"old": 0.3}},
    "new values x 0.3": {"lr_scale": {"new_values": 0.3}},
    "new keys x 3": {"lr_scale": {"new_keys": 3.0}},
    "new tokens' warm-up": {"new_tokens_warmup": 0.1},
    "mean moments": {"new_moments": "mean"},
    "warm-up": {"warmup": 0.05},
    "late decay": {"decay": 0.3},
    "rate x 0.5": {"lr": 0.5},
    "from the annealed base": {"annealed": True},
}
"""Numbers of `new_tokens_warmup`, `warmup` and `decay` are parts of the stage; the rate decays throughout
unless told. `lr` is a factor on the base's peak rate."""
_WITH_ZERO = {"zero, decay at old rms": {"new_keys_decay": "at_old_rms"}}
_EXCLUSIVE = ({"old x 0.1", "old x 0.3"},)
_MARGIN = 0.001
"""Nats by which a mechanism has to lower the loss on the tuning text to be taken."""

SCREENED: dict[str, dict[str, Any]] = {
    **KEYS,
    **_WITH_ZERO,
    **{f"{_PLAIN}, {name}": KEYS[_PLAIN] | options for name, options in MECHANISMS.items()},
    "rotated, old x 0.1": KEYS["rotated"] | MECHANISMS["old x 0.1"],
    OFFICIAL: {},
}
"""What is tried alone, once."""
_SPARED = "random, old x 0.3"
"""The best of SCREENED, beside which more is tried."""
_REFINEMENTS: dict[str, dict[str, Any]] = {
    "new keys x 0.3": {"lr_scale": {"old": 0.3, "new_keys": 0.3}},
    "new values x 3": {"lr_scale": {"old": 0.3, "new_values": 3.0}},
    "new keys x 0.3, new values x 3": {"lr_scale": {"old": 0.3, "new_keys": 0.3, "new_values": 3.0}},
    "old keys x 0.1": {"lr_scale": {"old": 0.3, "old_keys": 0.1}},
    "others x 1": {"lr_scale": {"old_keys": 0.3, "old_values": 0.3}},
    "others x 0.1": {"lr_scale": {"old": 0.3, "other": 0.1}},
    "rate x 2": {"lr": 2.0, "lr_scale": {"old": 0.15}},
    "mean moments": MECHANISMS["old x 0.3"] | {"new_moments": "mean"},
    "linear decay": MECHANISMS["old x 0.3"] | {"decay_style": "linear"},
    "1 - sqrt decay": MECHANISMS["old x 0.3"] | {"decay_style": "minus_sqrt"},
    "from the annealed base": MECHANISMS["old x 0.3"] | {"annealed": True},
    "from the annealed base, old x 0.1": MECHANISMS["old x 0.1"] | {"annealed": True},
}
_FINER = {f"{_PLAIN}, old x {factor}": KEYS[_PLAIN] | {"lr_scale": {"old": factor}} for factor in (0.2, 0.5)}
REFINED: dict[str, dict[str, Any]] = _FINER | {
    f"{_SPARED}, {name}": KEYS[_PLAIN] | options for name, options in _REFINEMENTS.items()
}
"""What is tried after SCREENED, once. `rate x 2` doubles that of new tokens alone."""


def options_of(recipe: str, losses: Mapping[str, float]) -> dict[str, Any]:
    """A recipe's options: configuration keys, and `warmup`, `decay`, `decay_style`, `lr`, `annealed`.

    Args:
        losses: of SCREENED, on the tuning text, and of REFINED; needed by the recipes that are chosen from them.
    """
    if recipe == TOGETHER:
        return _together(losses)
    return (SCREENED | REFINED)[best(losses) if recipe == BEST else recipe]


def best(losses: Mapping[str, float]) -> str:
    """`best_alone`, or what was tried beside it where that is lower by more than chance."""
    first = best_alone(losses)
    helped = [
        name
        for name, options in REFINED.items()
        if losses[first] - losses[name] > _MARGIN and not options.get("annealed")
    ]
    return min(helped, key=lambda name: losses[name], default=first)


def best_alone(losses: Mapping[str, float]) -> str:
    """The recipe with the lowest loss, of those that change nothing at the growth and start from the trunk."""
    names = [name for name, options in SCREENED.items() if name != OFFICIAL and not options.get("annealed")]
    return min(names, key=lambda name: losses[name])


def chosen(losses: Mapping[str, float]) -> list[str]:
    """What TOGETHER is made of: keys first, then the mechanisms that helped beside `random`."""
    keys = min(KEYS, key=lambda name: losses[name])
    gains = {name: losses[_PLAIN] - losses[f"{_PLAIN}, {name}"] for name in MECHANISMS}
    helped = {name for name, gain in gains.items() if gain > _MARGIN and not MECHANISMS[name].get("annealed")}
    for group in _EXCLUSIVE:
        helped -= group - {max(group, key=lambda name: gains[name])}
    found = [keys, *(name for name in MECHANISMS if name in helped)]
    waits = "zero, decay at old rms"
    return [*found, waits] if keys == "zero" and losses["zero"] - losses[waits] > _MARGIN else found


def _together(losses: Mapping[str, float]) -> dict[str, Any]:
    options: dict[str, Any] = {}
    for name in chosen(losses):
        more: dict[str, Any] = KEYS.get(name) or MECHANISMS.get(name) or _WITH_ZERO.get(name) or {}
        scales = {**options.get("lr_scale", {}), **more.get("lr_scale", {})}
        options |= more | ({"lr_scale": scales} if scales else {})
    return options
