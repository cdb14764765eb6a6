"""Learning-rate schedules of GPT-NeoX: linear warm-up, then a decay over lr_decay_iters."""

from __future__ import annotations

import math

from megatron.config.schema import RunConfig


class LRSchedule:
    """lr(iteration): update number k (k = 1, 2, ..) uses lr(k - 1), so the first update of a warm-up has lr 0.

    Warm-up rises linearly over warmup * lr_decay_iters iterations. With p the part of the iterations after it:

    | style       | learning rate                                        |
    |-------------|------------------------------------------------------|
    | linear      | lr (1 - p)                                           |
    | cosine      | min_lr + (lr - min_lr) (1 + cos(pi p)) / 2           |
    | exponential | lr exp(-0.693 p), half of lr at the end              |
    | constant    | lr                                                   |

    never below min_lr. From lr_decay_iters on the value stays at the end's (cosine: min_lr).

    Args:
        config: the settings.
        start: update at which the schedule begins (a restart after a growth).
    """

    def __init__(self, config: RunConfig, start: int = 0) -> None:
        options, self.start = config.optimization, start
        self.peak, self.floor, self.style = options.optimizer.params.lr, options.min_lr, options.lr_decay_style
        self.total = config.lr_decay_iters
        self.warmup = options.warmup * self.total

    def __call__(self, iteration: int) -> float:
        """Learning rate after `iteration` finished updates, those before `start` counted."""
        iteration -= self.start
        if self.warmup > 0 and iteration <= self.warmup:
            return self.peak * iteration / self.warmup
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
