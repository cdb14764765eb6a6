"""What a plan says of the growths of a run: when, by what factor, at which rates, and what was measured near that."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron.config.schema import RunConfig
from megatron.config.sections.model import ModelConfig
from megatron.config.sections.optimization import OptimizationConfig
from megatron.config.sections.scaling import ScalingConfig, initial_keys
from megatron.growth.advice import PARTS, Measured, Measurements, best_of, measurements, same_way
from megatron.growth.plan import KINDS, segments_of
from megatron.growth.schedule import GrowthSchedule
from megatron.planner.networks import num_parameters

_SCHEDULE = {
    "new_tokens_warmup": "new_tokens_warmup for {} of the updates", "warmup": "warmup: {}",
    "decay": "the rate decays in the last {} of the updates", "decay_style": "lr_wsd_decay_style: {}", "lr": "lr x {}",
}  # fmt: skip
"""Words for what megatron.growth.advice.Measured has as parts and factors."""


@dataclass
class _Planned:
    """A run before it starts, at a growth to come (megatron.growth.schedule.Progress)."""

    iteration: int
    consumed_tokens: int = 0
    lineage: list[dict[str, Any]] = field(default_factory=list)


def growth_lines(config: RunConfig, model: ModelConfig, update_tokens: int) -> list[str]:
    """Some lines for each growth of a run's schedule, and one that says where their figures come from.

    Args:
        model: before the first growth, its vocabulary known.
        update_tokens: tokens of an update of all ranks.
    """
    growths = _Growths(config, model, update_tokens)
    lines = [line for number in range(len(growths.starts)) for line in growths.lines(number, measurements())]
    return [*lines, _source(measurements())] if lines else []


class _Growths:
    """The growths of a run that has not started."""

    def __init__(self, config: RunConfig, model: ModelConfig, update_tokens: int) -> None:
        self._config, self._model, self._last = config, model, config.training.train_iters
        self._schedule = GrowthSchedule(config.scaling, self._last, update_tokens)
        self.starts = self._schedule.starts()
        self._parameters = self._counted()

    def lines(self, number: int, known: Measurements) -> Iterator[str]:
        """What is configured, and what was measured near it."""
        start, end = self.starts[number], [*self.starts[1:], self._last][number]
        before, after = self._parameters[number : number + 2]
        part = (end - start) / self.starts[0] if end and end > start else None
        length = "none" if part is None else f"{(end or 0) - start:,}, {part:.2g} of those before the first growth"
        scaling = self._schedule.after(self._model, number + 1).scaling
        yield (
            f"growth {number + 1}: at iteration {start:,}, {self._phase(number)}: {before:,} -> {after:,} parameters "
            f"({after / before:.2g}-fold); updates after it: {length}"
        )
        yield f"  as configured: {_way(scaling)}; {self._rate(number)}"
        found = known.near(after / before, part) if part else []
        yield from (f"  {line}" for line in _measured_lines(found, scaling))

    def _counted(self) -> list[int]:
        """Parameters before the first growth and after each; a block that does not grow has none of its own."""
        counts = [num_parameters(self._model)]
        for done in range(1, len(self.starts) + 1):
            grown = self._schedule.after(self._model, done).model
            new = {kind: sum(block[-1] for block in segments_of(grown, kind)) for kind in KINDS}
            counts.append(counts[-1] + 2 * grown.hidden_size * (3 * new["qkv"] + new["proj"] + new["ffn"]))
        return counts

    def _options(self, number: int, done: int) -> tuple[OptimizationConfig, int, int]:
        """Settings at growth `number` with `done` growths made, the update they start from, their schedule's length."""
        at, tokens = self.starts[number], self._schedule.update_tokens
        made = [{"scheduled": True, "iteration": start, "consumed_tokens": start * tokens, "updates": start}
                for start in self.starts[:done]]  # fmt: skip
        options, start = self._schedule.learning_rate(self._config.optimization, _Planned(at, at * tokens, made))
        return options, start, options.lr_decay_iters or self._last or at

    def _phase(self, number: int) -> str:
        """Where the learning rate is when a growth comes."""
        options, start, total = self._options(number, number)
        position, warmup = self.starts[number] - start, options.warmup_iters(total)
        if position <= warmup:
            return "in the warm-up"
        if options.lr_decay_style == "constant":
            return "at a constant rate"
        if options.lr_decay_style == "WSD":
            in_decay = options.lr_wsd_decay_iters and position > total - options.lr_wsd_decay_iters
            return "in the decay of WSD" if in_decay else "in the stable phase of WSD"
        part = min(1.0, (position - warmup) / max(1.0, total - warmup))
        return f"after {part:.0%} of a {options.lr_decay_style} decay"

    def _rate(self, number: int) -> str:
        if self._schedule.growths[number].lr_policy == "continue":
            return "the schedule of the rate goes on"
        options, _, total = self._options(number, number + 1)
        peak, warmup = options.optimizer.params.lr, options.warmup_iters(total)
        return f"a schedule of its own from {peak:g}, {warmup:g} updates of warm-up"


def _way(scaling: ScalingConfig) -> str:
    factors = {part: scaling.lr_factor(part) for part in PARTS}
    if scaling.freeze_old_tokens:
        factors |= dict.fromkeys(PARTS[2:], 0.0)
    scaled = ", ".join(f"{part} x {factor:g}" for part, factor in factors.items() if factor != 1)
    keys = initial_keys(scaling.new_keys, scaling.row_norm)
    return f"new_keys {keys}, row_norm {scaling.row_norm}, rates {scaled or 'of all alike'}"


def _measured_lines(found: Sequence[Measured], scaling: ScalingConfig) -> list[str]:
    """What is known of a growth such as this one, and what is not."""
    if not found:
        return ["expected saving: unknown; nothing was measured near this factor and length"]
    near = f"near it, {found[0].factor:.2g}-fold and {found[0].part:.2g}"
    asked, best = same_way(found, scaling), best_of(found)
    lines = [f"{near}, so configured: {_result(asked)}" if asked else f"{near}, this way was not measured"]
    if best and best is not asked:
        lines.append(f"best there: {_keys(best)}: {_result(best)}")
    plain = next((each for each in found if each.keys == {"row_norm": "segment"} and not each.schedule), None)
    late = next((each for each in found if each.schedule.get("annealed")), None)
    if late and plain and late.minus_no_growth and plain.minus_no_growth:
        lines.append(f"grown after the decay instead: {plain.gain - late.gain:+.3f} nats")
    return lines


def _result(found: Measured) -> str:
    """Differences in loss, and savings, with the range over seeds."""
    seeds = f"{len(found.losses)} seed{'s' if len(found.losses) > 1 else ''}"
    parts = []
    if found.minus_no_growth:
        parts.append(f"{_range(found.minus_no_growth, '+.3f')} nats against training on without growth")
    if found.minus_scratch:
        parts.append(f"{_range(found.minus_scratch, '+.3f')} against as many updates from scratch")
    if found.savings:
        after, in_all = _range(found.savings, ".2g"), _range(found.savings_in_all, ".2g")
        parts.append(f"saving {found.bound}{after} after the growth, {found.bound}{in_all} in all")
    else:
        parts.append("saving not measured yet")
    return f"{'; '.join(parts)} ({seeds})"


def _range(values: Sequence[float], form: str) -> str:
    mean = format(statistics.mean(values), form)
    return f"{mean} ({min(values):{form}} to {max(values):{form}})" if len(values) > 1 else mean


def _keys(found: Measured) -> str:
    words = [f"{key}: {_flow(value)}" for key, value in found.keys.items()]
    return ", ".join(words + [_SCHEDULE[key].format(value) for key, value in found.schedule.items()])


def _flow(value: Any) -> str:
    """As YAML has it in a line."""
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{key}: {_flow(each)}' for key, each in value.items())}}}"
    return str(value)


def _source(known: Measurements) -> str:
    return (
        f"growth, measured: {known.page}, {known.finished} of {known.trials} trials; a base of "
        f"{known.base_parameters:,} parameters and {known.tokens_per_parameter} tokens a parameter, {known.text} as "
        "bytes; saving: updates from scratch to the same loss, over those of the growth; other sizes and texts may do "
        "otherwise"
    )
