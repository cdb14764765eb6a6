"""Growth as part of a run: which growths it has made, its configuration since then, and when the next one is due.

A run with a growth schedule is described by one configuration, whose model section is the model before the first
growth. `TrainState.lineage` says how many growths are made; everything else follows from the two.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, Protocol

from megatron.config.sections.model import ModelSection
from megatron.config.sections.optimization import OptimizationConfig
from megatron.config.sections.scaling import ScalingConfig, ScheduledGrowth
from megatron.errors import UserError
from megatron.growth.plan import KINDS, Model, TokenCounts, grown_config, segments_of, with_tokens
from megatron.log import get_logger

Lineage = Sequence[Mapping[str, Any]]
"""The growths behind a model, as megatron.growth.grow.lineage_entry describes each."""


class Progress(Protocol):
    """Where a run is; TrainState is one."""

    iteration: int
    """Finished iterations."""
    consumed_tokens: int
    """Tokens read by then; data that a smaller model's run has read counts among them."""
    lineage: list[dict[str, Any]]
    """The growths behind its model."""


class Grown(NamedTuple, Generic[Model]):
    """The two sections of a configuration that a growth changes."""

    model: Model
    """The model with the tokens of all growths made."""
    scaling: ScalingConfig
    """What both it and a growth say is that of the latest growth."""


@dataclass(frozen=True)
class GrowthSchedule:
    """The growths that the configuration of a run lists."""

    scaling: ScalingConfig
    """The run's, as the YAML files say."""
    train_iters: int | None = None
    """Updates of the run."""
    update_tokens: int = 1
    """Tokens that an update of all ranks reads."""

    @property
    def growths(self) -> Sequence[ScheduledGrowth]:
        """The growths, in order."""
        return self.scaling.growth

    def check(self, model: ModelSection, options: OptimizationConfig, tensor_ranks: int, now: Progress) -> None:
        """Raise a UserError when one of the growths to come is impossible, before anything is trained.

        Args:
            model: with the growths in it that are made.
            options: the run's own optimization settings.
            tensor_ranks: each needs a new token of every growth: ZeRO does not allow a rank with none to train.
            now: where the run is.
        """
        done = growths_done(now.lineage)
        for number, growth in enumerate(self.growths[done:], done):
            own = _restarted(options, growth)
            peak, floor = own.optimizer.params.lr, own.min_lr
            if growth.lr_policy == "restart" and peak < floor:
                raise UserError(
                    f"growth[{number}]: lr {peak:g} is below min_lr {floor:g}; give the growth a lower min_lr too"
                )
            model = _grown_once(model, growth, number)
            if growth.freeze_old_tokens and not any(_adds_tokens(blocks) for _, blocks in _all_segments(model)):
                raise UserError(
                    f"growth[{number}]: freeze_old_tokens where no tokens are added; there is nothing to train"
                )
        for key, blocks in _all_segments(model):
            fewest = min((size for block in blocks for size in block if size), default=tensor_ranks)
            if fewest < tensor_ranks:
                raise UserError(
                    f"growth: {key} grows by {fewest} where model_parallel_size is {tensor_ranks}; each rank "
                    "needs a new token: grow by more, or lower model_parallel_size"
                )
        self._check_times(options, now)

    def _check_times(self, options: OptimizationConfig, now: Progress) -> None:
        """Are the growths to come in order, each with time for its decay? Says so when the run ends before one."""
        last, done = now.iteration, growths_done(now.lineage)
        for number, growth in enumerate(self.growths[done:], done):
            begin = max(now.iteration, self._start_of(growth, now.iteration, now.consumed_tokens))
            if begin < last:
                raise UserError(
                    f"growth[{number}]: comes at iteration {begin}, that before it at {last}; sort the growths by time"
                )
            if growth.lr_policy == "restart" and options.lr_decay_style == "WSD":
                self._check_decay(_restarted(options, growth), number, begin)
            if begin > (self.train_iters or begin):
                get_logger().info(
                    "growth[%d] is not made: it comes at iteration %d, train_iters is %d",
                    number, begin, self.train_iters,
                )  # fmt: skip
            last = begin

    def _check_decay(self, options: OptimizationConfig, number: int, begin: int) -> None:
        """Does WSD's decay fit into the schedule that growth `number` starts at iteration `begin`?"""
        total = self.growths[number].lr_decay_iters
        if total is None:
            is_last = all(growth.lr_policy == "continue" for growth in self.growths[number + 1 :])
            total = (self.train_iters or 0) - begin if is_last else 0
        warmup, decay = options.warmup_iters(total), options.lr_wsd_decay_iters
        if decay and 0 < total < decay + warmup:
            raise UserError(
                f"growth[{number}]: lr_wsd_decay_iters {decay} of {total} iterations from there on, of which "
                f"{warmup:g} are warm-up; shorten the decay or the warm-up, or grow earlier"
            )

    def after(self, model: Model, done: int, already: int = 0) -> Grown[Model]:
        """Model and scaling of a run after the first `done` growths.

        Args:
            already: growths that `model` has in it.

        Raises: UserError naming the growth that asks for fewer tokens than there are.
        """
        for number, growth in enumerate(self.growths[already:done], already):
            model = _grown_once(model, growth, number)
        if not done:
            return Grown(model, self.scaling)
        latest = self.growths[done - 1]
        keys = ScheduledGrowth.model_fields.keys() & ScalingConfig.model_fields.keys()
        return Grown(model, self.scaling.replaced(**{key: getattr(latest, key) for key in sorted(keys)}))

    def as_saved(self, model: Model, saved: ModelSection, lineage: Lineage) -> Grown[Model]:
        """Model and scaling of a run that goes on from a checkpoint.

        Args:
            model: as the YAML files say.
            saved: model of the checkpoint. How its tokens are divided into segments is taken over from it.
            lineage: of the checkpoint.

        Raises: UserError when the schedule does not lead to this model.
        """
        done = growths_done(lineage) if self.growths else 0
        if done > len(self.growths):
            raise UserError(
                f"growth: the run has made {done} growths of its schedule, the configuration lists "
                f"{len(self.growths)}; give the schedule the run was started with"
            )
        if saved.token_segments is None:
            return Grown(model, self.scaling)
        if _tokens_of(model) == _tokens_of(saved):  # its own config.yml: the model since the last growth
            return self.after(model, done, already=done)
        now = self.after(_before_growths(model, saved, done), done)
        if _tokens_of(now.model) != _tokens_of(saved):
            raise UserError(
                f"growth: the first {done} growths of the schedule do not lead to the model of the checkpoint; give "
                "the schedule the run was started with"
            )
        return now

    def is_due(self, now: Progress) -> bool:
        """Has the time of the next growth come, with training to follow it?"""
        done = growths_done(now.lineage)
        if done >= len(self.growths) or now.iteration >= (self.train_iters or math.inf):
            return False
        growth = self.growths[done]
        if growth.at_iteration is not None:
            return now.iteration >= growth.at_iteration
        assert growth.at_tokens is not None, "one of the two is given"
        return now.consumed_tokens >= growth.at_tokens

    def learning_rate(self, options: OptimizationConfig, now: Progress) -> tuple[OptimizationConfig, int]:
        """The optimization settings in force, and the update they start from.

        A growth with lr_policy restart has a schedule of its own, which ends where the next restart begins unless
        lr_decay_iters says otherwise; before the first, the run's own schedule does so. WSD keeps its decay for the end
        of the run: a schedule that a restart ends stays at its peak.

        Args:
            options: of the run's configuration.
            now: where the run is.
        """
        made = [entry for entry in now.lineage if entry.get("scheduled")]
        begun = [pair for pair in zip(made, self.growths, strict=False) if pair[1].lr_policy == "restart"]
        later = [growth for growth in self.growths[len(made) :] if growth.lr_policy == "restart"]
        since, tokens = now.iteration, now.consumed_tokens
        if begun:
            since, tokens = int(begun[-1][0]["iteration"]), int(begun[-1][0]["consumed_tokens"])
        end = self._start_of(later[0], since, tokens) if later else self.train_iters
        first = since if begun else 0
        decay = None if end is None else max(1, min(end, self.train_iters or end) - first)
        given = begun[-1][1].lr_decay_iters if begun else options.lr_decay_iters
        if later and given is None and options.lr_decay_style == "WSD":
            options = options.replaced(lr_wsd_decay_iters=0)
        if not begun:
            return options.replaced(lr_decay_iters=given or (decay if later else None)), 0
        entry, growth = begun[-1]
        return _restarted(options, growth).replaced(lr_decay_iters=given or decay), int(entry["updates"])

    def starts(self) -> list[int]:
        """The iteration at which each growth comes in a run that starts anew."""
        found, iteration, tokens = [], 0, 0
        for growth in self.growths:
            now = self._start_of(growth, iteration, tokens)
            iteration, tokens = now, tokens + (now - iteration) * self.update_tokens
            found.append(now)
        return found

    def _start_of(self, growth: ScheduledGrowth, iteration: int, consumed_tokens: int) -> int:
        """The iteration at which a growth will be due, counted on from where the run is or was."""
        if growth.at_iteration is not None:
            return growth.at_iteration
        assert growth.at_tokens is not None, "one of the two is given"
        return iteration + max(0, math.ceil((growth.at_tokens - consumed_tokens) / self.update_tokens))


def _restarted(options: OptimizationConfig, growth: ScheduledGrowth) -> OptimizationConfig:
    """The run's settings with those that a growth has for its own schedule."""
    own = {"optimizer.params.lr": growth.lr, "min_lr": growth.min_lr, "warmup": growth.warmup}
    own["lr_warmup_iters"] = growth.lr_warmup_iters
    given: dict[str, Any] = {key: value for key, value in own.items() if value is not None}
    if growth.warmup is not None:
        given.setdefault("lr_warmup_iters", None)  # the run's would win
    return options.replaced(**given)


def _grown_once(model: Model, growth: ScheduledGrowth, number: int) -> Model:
    layers = None if growth.layers is None else tuple(growth.layers)
    sizes = (growth.qkv_slot_num, growth.proj_slot_num, growth.ffn_slot_num)
    counts = TokenCounts(*sizes, layers, growth.new_keys, growth.row_norm, growth.tower)
    try:
        return grown_config(model, counts)
    except UserError as error:
        raise UserError(f"growth[{number}]: {error}") from error


def _adds_tokens(blocks: Sequence[Sequence[int]]) -> bool:
    return any(block[-1] for block in blocks)


def _before_growths(model: Model, saved: ModelSection, done: int) -> Model:
    """The configured model with the segments that the saved one had before the last `done` of its growths."""
    saved_towers = saved.towers()
    towers = {prefix: _before(tower, saved_towers[prefix], done) for prefix, tower in model.towers().items()}
    found = model.with_towers(towers)
    assert isinstance(found, type(model))
    return found


def _before(tower: ModelSection, saved: ModelSection, done: int) -> ModelSection:
    first = {kind: [block[: len(block) - done] for block in segments_of(saved, kind)] for kind in KINDS}
    for kind in KINDS:
        asked, total = getattr(tower, f"{kind}_slot_num"), max(map(sum, first[kind])) or None
        if asked != total:
            raise UserError(
                f"{tower.spelled(f'{kind}_slot_num')}: {asked} in the configuration, {total} in the checkpoint"
                + (f" before its {done} scheduled growths" if done else "")
                + "; use the configuration the model was trained with"
            )
    stages = len(first["qkv"][0])
    return with_tokens(tower, None if stages == 1 else first, (saved.segment_norms or [])[:stages])


def _tokens_of(model: ModelSection) -> list[Any]:
    """How the tokens of a model are divided into segments and row norms."""
    return [(tower.token_segments, tower.segment_norms) for tower in model.towers().values()]


def _all_segments(model: ModelSection) -> Iterator[tuple[str, Sequence[Sequence[int]]]]:
    """The key of each count of tokens, and the segments that make it up, block by block."""
    for tower in model.towers().values():
        for kind, blocks in (tower.token_segments or {}).items():
            yield tower.spelled(f"{kind}_slot_num"), blocks


def past_growths(lineage: Lineage) -> list[dict[str, Any]]:
    """The lineage for a run that starts from this one's model: none of its growths is of the new run's schedule."""
    return [{**entry, "scheduled": False} for entry in lineage]


def growths_done(lineage: Lineage) -> int:
    """How many growths of its schedule a run has made."""
    return sum(1 for entry in lineage if entry.get("scheduled"))
