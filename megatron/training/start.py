"""Where a run starts: from nothing, from its own checkpoint, or from a smaller model; and the growth that is due then.

A growth is always made here, from a checkpoint: a run in which one comes due saves, and starts anew from what it saved.
A run killed around a growth therefore finds itself before it or after it, and does the same as one that was not.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron.checkpoint.store import CheckpointReader, RunFolder
from megatron.config.schema import RunConfig
from megatron.config.sections.optimization import ADAM_FAMILY
from megatron.config.sections.scaling import initial_keys
from megatron.engine.base import Engine
from megatron.errors import UserError
from megatron.exchange import Checkpoint, open_checkpoint
from megatron.failures import failed_attempts, read_failures
from megatron.growth.grow import grown_checkpoint, lineage_entry
from megatron.growth.plan import KINDS, adds_tokens, grown_to, with_tokens_of
from megatron.growth.proof import Difference, compare_logits
from megatron.growth.schedule import GrowthSchedule, growths_done, past_growths
from megatron.log import get_logger
from megatron.model.compatibility import check_same_model, check_same_task
from megatron.mpu import Layout
from megatron.mpu.device import process_device
from megatron.mpu.processes import first_rank_does
from megatron.tasks import Task
from megatron.training.generators import restore_random_states
from megatron.training.resume import Resumption, open_for_resume
from megatron.training.soundness import require_consistent, verify_together
from megatron.training.state import TrainState
from megatron.training.towers import joined_towers, named_towers

# Changing one of these gives the samples another order, in which the consumed ones are not a prefix.
_DATA_KEYS = (
    "seed", "data_path", "train_data_paths", "train_data_weights", "split", "random_split", "split_seed",
    "sample_order", "weight_by_num_documents", "weighted_sampler_alpha",
)  # fmt: skip


class Start:
    """What the run that learns `task` starts with; growths that are due are made, but not proven yet.

    Args:
        schedule: the growths of the run's configuration.

    Raises: UserError for a checkpoint that is damaged or does not fit, and for an impossible growth. Collective.
    """

    config: RunConfig
    """The configuration, with the model and scaling of its latest growth."""
    state: TrainState
    """Progress; that of a new run unless there is a checkpoint."""
    checkpoint: Checkpoint | None
    """Its tensors, growths included, are those of the model and its optimizer; None means the initial values."""
    resumed: bool
    """The run continues from its own checkpoint."""

    def __init__(self, task: Task[Any], layout: Layout, schedule: GrowthSchedule) -> None:
        config = self.config = task.config
        self.state, self.checkpoint, self.resumed = TrainState(), None, False
        self._task, self._layout, self._schedule = task, layout, schedule
        self._growths: list[tuple[Checkpoint, Checkpoint]] = []
        resumption = open_for_resume(config.checkpoint, layout)
        self._check_save_folder(resumption is not None)
        if resumption is not None:
            self._go_on_from(resumption)
        elif config.checkpoint.pretrain_partial_init:
            self._grow_from(config.checkpoint.pretrain_partial_init)
        elif named_towers(config.checkpoint):
            self._join_towers()
        if config.checkpoint.save:
            failed = failed_attempts(read_failures(config.checkpoint.save))
            self.state.restarts = max(self.state.restarts, len(failed))
        schedule.check(self.config.model, config.optimization, config.parallel.model_parallel_size, self.state)
        while schedule.is_due(self.state):
            done = growths_done(self.state.lineage)
            after = schedule.after(self.config.model, done + 1, already=done)
            self._grow(config.replaced(model=after.model, scaling=after.scaling), scheduled=True)

    def _check_save_folder(self, has_checkpoint: bool) -> None:
        """Refuse to mix this run's checkpoints with those of a run it does not continue; `load` has one, or not."""
        options = self._task.config.checkpoint
        if options.save is None or not RunFolder(options.save).iterations():
            return
        continues = has_checkpoint and not options.finetune
        if not (continues and options.load and Path(options.load).resolve() == Path(options.save).resolve()):
            raise UserError(
                f"save: {options.save} has checkpoints of a run that this one does not continue; "
                "set load to the same folder to resume it, or save to another one"
            )

    def _go_on_from(self, resumption: Resumption) -> None:
        config, checkpoint = self._task.config, resumption.checkpoint
        saved, self.resumed = checkpoint.model_config, not config.checkpoint.finetune
        if self.resumed:
            self.state.load_state_dict(checkpoint.train_state)
            self.state.rollbacks = resumption.rollbacks
        else:
            self.state.lineage = past_growths(checkpoint.train_state.get("lineage", []))
        check_same_task(config.model, saved, checkpoint.folder)
        grown = self._schedule.as_saved(config.model, saved, self.state.lineage)
        self.config = config.replaced(model=grown.model, scaling=grown.scaling)
        self.checkpoint = checkpoint.as_model(grown.model)

    def _grow_from(self, path: str) -> None:
        """Start from the smaller model in `path`, with the tokens added that it lacks."""
        config, key = self._task.config, "pretrain_partial_init"
        base = open_checkpoint(path, config, key=key)
        if isinstance(base.tensors, CheckpointReader):
            first_rank_does(partial(require_consistent, base.tensors), self._layout)
            verify_together(partial(CheckpointReader, base.tensors.folder, verify=False, key=key), self._layout)
        slots = [f"{kind}_slot_num" for kind in KINDS]
        check_same_model(config.model, base.model_config, base.folder, free=[*slots, "segment_norms"])
        # Everything but the tokens is as configured.
        base = base.as_model(with_tokens_of(config.model, base.model_config), key)
        scaling = config.scaling
        after = config.replaced(model=grown_to(base.model_config, config.model, scaling.new_keys, scaling.row_norm))
        if base.iteration is not None:
            self._carry_over(base)
        self.config, self.checkpoint = config.replaced(model=base.model_config), base
        self._grow(after, scheduled=False)

    def _join_towers(self) -> None:
        """Start from towers that were trained apart, with the tokens added that they lack."""
        config, scaling = self._task.config, self._task.config.scaling
        base = joined_towers(config, self._layout)
        after = config.replaced(model=grown_to(base.model_config, config.model, scaling.new_keys, scaling.row_norm))
        self.config, self.checkpoint = config.replaced(model=base.model_config), base
        if adds_tokens(after.model):
            self._grow(after, scheduled=False)

    def _carry_over(self, base: Checkpoint) -> None:
        """Take over what a smaller model's run has reached: tokens, place in the data, lineage and maybe time."""
        config, state = self._task.config, self.state
        if config.checkpoint.finetune:
            state.lineage = past_growths(base.train_state.get("lineage", []))
            return
        state.load_state_dict(base.train_state)
        state.lineage, state.rollbacks, state.restarts = past_growths(state.lineage), [], 0
        if config.scaling.partial_init_policy == "restart":
            state.iteration = state.skipped_iterations = state.left_out_iterations = 0
            state.skips = []
        elif state.iteration >= (config.training.train_iters or math.inf):
            raise UserError(
                f"train_iters: {config.training.train_iters} is not more than the {state.iteration} iterations of "
                f"{base.folder}; raise it, or set partial_init_policy: restart"
            )
        changed = _data_differences(self._task, base)
        if changed:
            get_logger().info("data starts anew, it differs from that of %s: %s", base.folder, "; ".join(changed))
            state.consumed_samples, state.epoch_blocks = 0, {}

    def _grow(self, after: RunConfig, scheduled: bool) -> None:
        """Add the tokens that make this model that of `after`, and note it in the lineage."""
        assert self.checkpoint is not None, "only a model that exists grows"
        before, state = self.checkpoint, self.state
        new_keys = initial_keys(after.scaling.new_keys, after.scaling.row_norm)
        grown = grown_checkpoint(before, after.model, after.training.seed, new_keys, after.scaling.new_moments)
        entry = lineage_entry(before, grown, state.state_dict(), new_keys, scheduled=scheduled)
        get_logger().info(
            "growth at iteration %d: %s; %s to %s parameters",
            state.iteration, entry["added"], f"{before.num_parameters:,}", f"{grown.num_parameters:,}",
        )  # fmt: skip
        state.lineage, state.spike_window = [*state.lineage, entry], {}  # new tokens have gradients of another size
        self.config, self.checkpoint, self._growths = after, grown, [*self._growths, (before, grown)]

    def prove(self, inputs: Sequence[Tensor]) -> None:
        """Compare outputs for held-out inputs before and after each growth, and print the difference. Collective.

        Raises: UserError on every rank when rounding does not explain it; nothing has been written by then.
        """
        keeps_average = self.config.training.ema_decay is not None
        for number, (before, after) in enumerate(self._growths):
            entry = self.state.lineage[len(self.state.lineage) - len(self._growths) + number]
            entry["logit_difference"] = self._difference(before, after, inputs, entry)
            if keeps_average and before.has_ema:
                before, after = before.averaged(), after.averaged()
                entry["ema_logit_difference"] = self._difference(before, after, inputs, entry, " with averaged weights")
        self._growths.clear()  # the models before need not be kept

    def _difference(
        self, before: Checkpoint, after: Checkpoint, inputs: Sequence[Tensor], entry: Mapping[str, Any], which: str = ""
    ) -> float:
        """How far apart the logits of two models are, printed; rounding explains it if the growth is exact. Collective.

        Args:
            entry: of the growth in the lineage.
            which: what the message says of the models.
        """
        device, layout = process_device(), self._layout
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
            "growth: logits of a held-out batch%s differ by %.2e (largest logit %.2e)",
            which, difference.largest, difference.scale,
        )  # fmt: skip
        if entry["new_keys"] != "official":
            difference.check(entry["added"] + which)
        return difference.largest

    def restore(self, engine: Engine) -> None:
        """Give an engine whose model has the checkpoint's weights the rest: moments, average, loss scale, generators.

        There is nothing to go on from in a model that was no training checkpoint.
        """
        config, checkpoint = self.config, self.checkpoint
        options = config.checkpoint
        if checkpoint is None or checkpoint.iteration is None:
            return
        if options.finetune:
            get_logger().info("took the weights of %s; everything else starts anew (finetune)", checkpoint.folder)
            return
        if not options.no_load_optim:
            _restore_optimizer(config.optimization.optimizer.type, engine, checkpoint)
        _restore_average(engine, checkpoint)
        engine.loss_scaler = self.state.loss_scaler
        if not options.no_load_rng:
            restore_random_states(config.training.seed, checkpoint, engine.layout)
        if not self.resumed:
            return
        if changed := _data_differences(self._task, checkpoint):
            get_logger().warning("data differs from the checkpoint's, samples may repeat: %s", "; ".join(changed))
        again = f", restart {self.state.restarts} of this run" if self.state.restarts else ""
        get_logger().info("resumed from %s at iteration %d%s", checkpoint.folder, self.state.iteration, again)


def _data_differences(task: Task[Any], checkpoint: Checkpoint) -> list[str]:
    """In which keys the data of a run is another than a checkpoint's: `key old -> new`."""
    now, saved = task.config.flat(), checkpoint.resolved()
    keys = (*task.data_keys, *_DATA_KEYS)
    return [f"{k} {saved.get(k)} -> {now[k]}" for k in keys if saved.get(k) != now[k]]


def _restore_optimizer(now: str, engine: Engine, checkpoint: Checkpoint) -> None:
    """Take over the state of the optimizer that the checkpoint was trained with, if one of type `now` can.

    Parameters that it does not know (new tokens) start without a state. Raises UserError where there is none.
    """
    settings = checkpoint.resolved()
    saved = settings["optimizer"]["type"]
    if saved != now and not (saved in ADAM_FAMILY and now in ADAM_FAMILY):
        raise UserError(
            f"optimizer.type: {now} cannot take over the state of {saved} in {checkpoint.folder}; "
            "keep the optimizer, or set no_load_optim: true to start with a fresh state"
        )
    if settings.get("no_save_optim") and checkpoint.iteration:
        raise UserError(
            f"load: {checkpoint.folder} has no optimizer state; set no_load_optim: true to go on without it"
        )
    engine.state.write_optimizer_state(checkpoint.tensors)


def _restore_average(engine: Engine, checkpoint: Checkpoint) -> None:
    """Take over the average of the weights, where the checkpoint has one and the run keeps one; else say so."""
    keeps, log = engine.state.average is not None, get_logger()
    if keeps and checkpoint.has_ema:
        engine.state.write_average(checkpoint.tensors)
    elif keeps:
        log.info("ema_decay: %s has no average of the weights, it starts as these", checkpoint.folder)
    elif checkpoint.has_ema:
        log.info("ema_decay is not given: the average of the weights in %s is dropped", checkpoint.folder)
