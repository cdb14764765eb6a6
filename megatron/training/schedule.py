"""Learning-rate schedules of GPT-NeoX, and Megatron-LM's WSD: linear warm-up, then a decay over lr_decay_iters."""

from __future__ import annotations

import math
from collections.abc import Callable

from megatron.config.schema import RunConfig
from megatron.config.sections.optimization import WsdDecayStyle


class LRSchedule:
    """lr(iteration): update number k (k = 1, 2, ..) uses lr(k - 1), so the first update of a warm-up has lr 0.

    Warm-up rises linearly over lr_warmup_iters iterations, else warmup * lr_decay_iters. With p the part of the
    iterations after it:

    | style       | learning rate                                        |
    |-------------|------------------------------------------------------|
    | linear      | lr (1 - p)                                           |
    | cosine      | min_lr + (lr - min_lr) (1 + cos(pi p)) / 2           |
    | exponential | lr exp(-0.693 p), half of lr at the end              |
    | constant    | lr                                                   |

    never below min_lr. From lr_decay_iters on the value stays at the end's (cosine: min_lr).

    WSD is lr until the last lr_wsd_decay_iters of lr_decay_iters, and then min_lr + f (lr - min_lr). With r the part of
    these iterations:

    | lr_wsd_decay_style | f                   |
    |--------------------|---------------------|
    | exponential        | 2 * 0.5^r - 1       |
    | linear             | 1 - r               |
    | cosine             | (1 + cos(pi r)) / 2 |
    | minus_sqrt         | 1 - sqrt(r)         |

    Args:
        config: the settings.
        start: update at which the schedule begins (a restart after a growth).
    """

    def __init__(self, config: RunConfig, start: int = 0) -> None:
        options, self.start = config.optimization, start
        self.peak, self.floor, self.style = options.optimizer.params.lr, options.min_lr, options.lr_decay_style
        self.total = config.lr_decay_iters
        self.warmup = options.warmup_iters(self.total)
        self.wsd_style, self.wsd_iters = options.lr_wsd_decay_style, options.lr_wsd_decay_iters

    def __call__(self, iteration: int) -> float:
        """Learning rate after `iteration` finished updates, those before `start` counted."""
        iteration -= self.start
        if self.warmup > 0 and iteration <= self.warmup:
            return self.peak * iteration / self.warmup
        if self.style == "WSD":
            return self._wsd(iteration)
        part = min(1.0, (iteration - self.warmup) / max(1.0, self.total - self.warmup))
        return max(self._decayed(part), self.floor)

    def _decayed(self, part: float) -> float:
        if self.style == "linear":
            return self.peak * (1.0 - part)
        if self.style == "cosine":
            return self.floor + (self.peak - self.floor) / 2.0 * (1.0 + math.cos(math.pi * part))
        if self.style == "exponential":
            return self.peak * math.exp(-0.693 * part)
        return self.peak

    def _wsd(self, iteration: int) -> float:
        begun = iteration - (self.total - self.wsd_iters)
        if begun <= 0 or not self.wsd_iters:
            return self.peak
        part = min(1.0, begun / self.wsd_iters)
        return self.floor + _WSD[self.wsd_style](part) * (self.peak - self.floor)


_WSD: dict[WsdDecayStyle, Callable[[float], float]] = {
    "exponential": lambda part: 2.0 * 0.5**part - 1.0,
    "linear": lambda part: 1.0 - part,
    "cosine": lambda part: 0.5 * (1.0 + math.cos(math.pi * part)),
    "minus_sqrt": lambda part: 1.0 - math.sqrt(part),
}
