"""Where a run starts: from nothing, from its own checkpoint, or from a smaller model; and the growth that is due then.

A growth is always made here, from a checkpoint: a run in which one comes due saves, and starts anew from what it saved.
A run killed around a growth therefore finds itself before it or after it, and does the same as one that was not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron.checkpoint.store import CheckpointReader
from megatron.config.schema import RunConfig
from megatron.config.sections.model import ModelSection
from megatron.config.update_size import UpdateSize
from megatron.errors import UserError
from megatron.exchange import Checkpoint, open_checkpoint
from megatron.growth.grow import grown_checkpoint
from megatron.growth.plan import KINDS, TokenCounts, describe, grown_config
from megatron.growth.proof import Difference, compare_logits
from megatron.growth.schedule import (
    Progress,
    after_growths,
    check_schedule,
    check_times,
    grown_as_saved,
    growths_done,
    is_due,
    lineage_entry,
    next_growth,
    past_growths,
)
from megatron.log import get_logger
from megatron.model.compatibility import check_fit, check_same_model, check_same_task, described_model
from megatron.mpu import Layout
from megatron.mpu.device import process_device
from megatron.mpu.processes import first_rank_does
from megatron.tasks import Task
from megatron.training.checkpointing import check_save_folder, data_differences
from megatron.training.resume import Resumption, open_for_resume
from megatron.training.soundness import require_sound
from megatron.training.state import TrainState


@dataclass
class Start:
    """What a run starts with."""

    config: RunConfig
    """The configuration, with the model and scaling of its latest growth."""
    state: TrainState
    """Progress; that of a new run unless there is a checkpoint."""
    checkpoint: Checkpoint | None = None
    """Its tensors, growths included, are those of the model and its optimizer; None means the initial values."""
    resumed: bool = False
    """The run continues from its own checkpoint."""
    _growths: list[tuple[Checkpoint, Checkpoint]] = field(default_factory=list)

    def grow(self, after: RunConfig, scheduled: bool) -> None:
        """Add the tokens that make this model that of `after`, and note it in the lineage."""
        assert self.checkpoint is not None, "only a model that exists grows"
        before, state, new_keys = self.checkpoint, self.state, after.scaling.new_keys
        grown = grown_checkpoint(before, after.model, after.training.seed, new_keys)
        entry = lineage_entry(before, grown, state.state_dict(), new_keys, scheduled=scheduled)
        get_logger().info(
            "growth at iteration %d: %s; %s to %s parameters",
            state.iteration, entry["added"], f"{before.num_parameters:,}", f"{grown.num_parameters:,}",
        )  # fmt: skip
        state.lineage = [*state.lineage, entry]
        self.config, self.checkpoint, self._growths = after, grown, [*self._growths, (before, grown)]

    def prove(self, inputs: Sequence[Tensor], layout: Layout) -> None:
        """Compare outputs for held-out inputs before and after each growth, and print the difference. Collective.

        Raises: UserError on every rank when rounding does not explain it; nothing has been written by then.
        """
        device = process_device()
        for number, (before, after) in enumerate(self._growths):
            numbers = torch.zeros(2, device=device)
            compare = partial(compare_logits, before, after, [x.to(device) for x in inputs], layout)
            found = compare() if layout.rank and layout.data.rank == layout.pipeline.rank == 0 else None
            # The whole model is read twice: ranks that take no part wait where there is no limit of time.
            found = first_rank_does(compare, layout) or found
            if found is not None:
                numbers = torch.tensor([found.largest, found.scale], device=device)
            if layout.world_size > 1:
                dist.all_reduce(numbers, op=dist.ReduceOp.MAX)
            difference = Difference(*numbers.tolist())
            get_logger().info(
                "growth: logits of a held-out batch differ by %.2e (largest logit %.2e)",
                difference.largest, difference.scale,
            )  # fmt: skip
            difference.check(describe(before.model_config, after.model_config))
            entry = self.state.lineage[len(self.state.lineage) - len(self._growths) + number]
            entry["logit_difference"] = difference.largest
        self._growths.clear()  # the models before need not be kept


def find_start(task: Task[Any], layout: Layout, update: UpdateSize) -> Start:
    """What the run that learns `task` starts with; growths that are due are made, but not proven yet.

    Raises: UserError for a checkpoint that is damaged or does not fit, and for an impossible growth.
    """
    config = task.config
    resumption = open_for_resume(config, layout)
    check_save_folder(config.checkpoint, resumption is not None)
    if resumption is not None:
        start = _from_checkpoint(config, resumption)
    elif config.checkpoint.pretrain_partial_init:
        start = _from_smaller_model(task, config.checkpoint.pretrain_partial_init, layout)
    else:
        start = Start(config, TrainState())
    tensor_ranks, done = config.parallel.model_parallel_size, growths_done(start.state.lineage)
    check_schedule(start.config.model, config.scaling, config.optimization, tensor_ranks, already=done)
    now = Progress(start.state.iteration, start.state.consumed_tokens)
    check_times(config.scaling.growth, config.training.train_iters, start.state.lineage, now, update.tokens)
    _grow_as_scheduled(config, start)
    return start


def _from_checkpoint(config: RunConfig, resumption: Resumption) -> Start:
    checkpoint = resumption.checkpoint
    state, saved = TrainState(), checkpoint.model_config
    if config.checkpoint.finetune:
        state.lineage = past_growths(checkpoint.train_state.get("lineage", []))
    else:
        state.load_state_dict(checkpoint.train_state)
        state.rollbacks = resumption.rollbacks
    check_same_task(config.model, saved, checkpoint.folder)
    grown = grown_as_saved(config.model, config.scaling, saved, state.lineage)
    config = config.replaced(model=grown.model, scaling=grown.scaling)
    check_same_model(config.model, saved, checkpoint.folder)
    checkpoint = _configured(checkpoint, config.model, "load")
    return Start(config, state, checkpoint, resumed=not config.checkpoint.finetune)


def _configured(checkpoint: Checkpoint, model: ModelSection, key: str) -> Checkpoint:
    """The checkpoint as this model: lengths and dropout may be others than it was trained with. Raises UserError."""
    check_fit(described_model(model), checkpoint.tensors, f"{key}: {checkpoint.folder}")
    return replace(checkpoint, model_config=model)


def _from_smaller_model(task: Task[Any], path: str, layout: Layout) -> Start:
    config, key = task.config, "pretrain_partial_init"
    base = open_checkpoint(path, config, key=key)
    if isinstance(base.tensors, CheckpointReader):
        first_rank_does(partial(require_sound, base.tensors), layout)
    slots = {f"{kind}_slot_num": getattr(config.model, f"{kind}_slot_num") for kind in KINDS}
    same = base.model_config.replaced(**slots, token_segments=None)
    check_same_model(config.model, same, base.folder)
    # Everything but the tokens is as configured.
    tokens = {name: getattr(base.model_config, name) for name in (*slots, "token_segments")}
    base = _configured(base, type(config.model)(**{**config.model.model_dump(), **tokens}), key)
    qkv, proj, ffn = (slots[f"{kind}_slot_num"] for kind in KINDS)
    counts = TokenCounts(qkv, proj, ffn, new_keys=config.scaling.new_keys)
    after = config.replaced(model=grown_config(base.model_config, counts))
    state = TrainState()
    if base.iteration is not None:
        _carry_over(state, task, base)
    start = Start(config.replaced(model=base.model_config), state, base)
    start.grow(after, scheduled=False)
    return start


def _carry_over(state: TrainState, task: Task[Any], base: Checkpoint) -> None:
    """Take over what a smaller model's run has reached: tokens, place in the data, lineage and, if asked for, time."""
    config = task.config
    if config.checkpoint.finetune:
        state.lineage = past_growths(base.train_state.get("lineage", []))
        return
    state.load_state_dict(base.train_state)
    state.lineage, state.rollbacks = past_growths(state.lineage), []
    if config.scaling.partial_init_policy == "restart":
        state.iteration = state.skipped_iterations = 0
    elif state.iteration >= (config.training.train_iters or math.inf):
        raise UserError(
            f"train_iters: {config.training.train_iters} is not more than the {state.iteration} iterations of "
            f"{base.folder}; raise it, or set partial_init_policy: restart"
        )
    changed = data_differences(task, base)
    if changed:
        get_logger().info("data starts anew, it differs from that of %s: %s", base.folder, "; ".join(changed))
        state.consumed_samples, state.epoch_blocks = 0, {}


def _grow_as_scheduled(config: RunConfig, start: Start) -> None:
    """Make the growths whose time has come, with training to follow; `config` is the run's, before any growth."""
    state = start.state
    if state.iteration >= (config.training.train_iters or math.inf):
        return
    growths = config.scaling.growth
    while (growth := next_growth(growths, state.lineage)) and is_due(growth, state.iteration, state.consumed_tokens):
        done = growths_done(state.lineage)
        after = after_growths(start.config.model, config.scaling, done + 1, already=done)
        start.grow(config.replaced(model=after.model, scaling=after.scaling), scheduled=True)
