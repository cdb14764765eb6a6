"""Between the engine and the store: what a run saves, and how it resumes."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
from functools import partial
from pathlib import Path
from typing import Any

from megatron.checkpoint.state import CanonicalState, folder_name, whole_pieces
from megatron.checkpoint.store import list_iterations, remove_old, save_checkpoint
from megatron.config.schema import RunConfig
from megatron.config.sections.checkpoint import CheckpointConfig
from megatron.engine.base import Engine
from megatron.errors import UserError
from megatron.exchange import Checkpoint
from megatron.log import get_logger
from megatron.mpu.processes import first_rank_does
from megatron.tasks import Task
from megatron.training.generators import random_states, restore_random_states
from megatron.training.state import TrainState

_PACKAGES = ("torch", "deepspeed", "numpy", "tokenizers", "safetensors", "pydantic")


def should_save(config: CheckpointConfig, iteration: int) -> bool:
    """Is there a checkpoint due after `iteration`?"""
    if iteration in (config.extra_save_iters or ()):
        return True
    factor = config.checkpoint_factor
    if factor is None or iteration == 0:
        return False
    if config.checkpoint_scale == "linear":
        return iteration % factor == 0
    power = 1
    while power < iteration and factor > 1:
        power *= factor
    return power == iteration


def save(config: RunConfig, engine: Engine, state: TrainState) -> None:
    """Write a canonical checkpoint and remove those that `keep_last_n_checkpoints` no longer keeps. Collective."""
    options, rank = config.checkpoint, engine.layout.rank
    assert options.save is not None, "the loop saves only where there is a folder"
    state.loss_scaler = engine.loss_scaler
    tensors = {
        "model": engine.model_tensors(),
        "optimizer": () if options.no_save_optim else engine.state.optimizer_state(),
        "rng": random_states(engine.layout, engine.device),
    }
    canonical = CanonicalState(
        state.iteration, state.state_dict(), config.flat(), whole_pieces(tensors), environment() if rank == 0 else {}
    )
    if rank:
        save_checkpoint(options.save, canonical, write=False)
    first_rank_does(lambda: _write(options, canonical), engine.layout)
    get_logger().info("saved checkpoint %s", Path(options.save) / folder_name(state.iteration))


def _write(options: CheckpointConfig, state: CanonicalState) -> None:
    """Write the checkpoint, on the first rank; the others give it their parts, and then wait for it to be done.

    Raises: UserError for a full disk and for values that are not finite, once all parts are taken.
    """
    assert options.save is not None, "the loop saves only where there is a folder"
    try:
        save_checkpoint(options.save, state)
    except UserError:
        save_checkpoint(options.save, state, write=False)  # the others are still gathering
        raise
    if options.keep_last_n_checkpoints:
        try:
            remove_old(options.save, options.keep_last_n_checkpoints, options.extra_save_iters or ())
        except OSError as error:
            get_logger().warning("keep_last_n_checkpoints: %s; an old checkpoint stays", error)


def environment() -> dict[str, str | dict[str, str]]:
    """Git revision, Python and package versions, for the record beside a checkpoint."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        revision = result.stdout.strip() or "unknown"
    except OSError:
        revision = "unknown"
    packages = {name: importlib.metadata.version(name) for name in _PACKAGES}
    return {"git_revision": revision, "python": platform.python_version(), "packages": packages}


def check_save_folder(options: CheckpointConfig, has_checkpoint: bool) -> None:
    """Raise a UserError rather than mix this run's checkpoints with those of a run it does not continue.

    has_checkpoint: `load` has one to start from.
    """
    if options.save is None or not list_iterations(options.save):
        return
    continues = has_checkpoint and not options.finetune
    if not (continues and options.load and Path(options.load).resolve() == Path(options.save).resolve()):
        raise UserError(
            f"save: {options.save} has checkpoints of a run that this one does not continue; "
            "set load to the same folder to resume it, or save to another one"
        )


# Changing one of these gives the samples another order, in which the consumed ones are not a prefix.
_DATA_KEYS = (
    "seed", "data_path", "train_data_paths", "train_data_weights", "split", "weight_by_num_documents",
    "weighted_sampler_alpha",
)  # fmt: skip


def data_differences(task: Task[Any], checkpoint: Checkpoint) -> list[str]:
    """In which keys the data of a run is another than a checkpoint's: `key old -> new`."""
    now, saved = task.config.flat(), checkpoint.resolved()
    keys = (*task.data_keys, *_DATA_KEYS)
    return [f"{k} {saved.get(k)} -> {now[k]}" for k in keys if saved.get(k) != now[k]]


def warn_of_other_data(task: Task[Any], checkpoint: Checkpoint) -> None:
    """Log in which keys the data of a run that goes on differs from before."""
    if changed := data_differences(task, checkpoint):
        get_logger().warning("data differs from the checkpoint's, samples may repeat: %s", "; ".join(changed))


_ADAM_FAMILY = ("Adam", "AdamW", "FusedAdam", "ApexAdam", "CPU_Adam")


def _restore_optimizer(now: str, engine: Engine, checkpoint: Checkpoint) -> None:
    """Take over the state of the optimizer that the checkpoint was trained with, if one of type `now` can."""
    settings, tensors = checkpoint.resolved(), checkpoint.tensors
    saved = settings["optimizer"]["type"]
    if saved != now and not (saved in _ADAM_FAMILY and now in _ADAM_FAMILY):
        raise UserError(
            f"optimizer.type: {now} cannot take over the state of {saved} in {checkpoint.folder}; "
            "keep the optimizer, or set no_load_optim: true to start with a fresh state"
        )
    if settings.get("no_save_optim") and checkpoint.iteration:
        raise UserError(
            f"load: {checkpoint.folder} has no optimizer state; set no_load_optim: true to go on without it"
        )
    engine.state.write_optimizer_state(tensors.names("optimizer"), partial(tensors.tensor, "optimizer"))


def restore(config: RunConfig, engine: Engine, state: TrainState, checkpoint: Checkpoint | None) -> None:
    """Continue from a checkpoint whose weights the engine's model and whose progress `state` already hold.

    Parameters that the checkpoint's optimizer does not know (new tokens) start without a state. There is nothing to go
    on from in a model that was no training checkpoint.
    """
    options = config.checkpoint
    if checkpoint is None or checkpoint.iteration is None:
        return
    if options.finetune:
        get_logger().info("took the weights of %s; everything else starts anew (finetune)", checkpoint.folder)
        return
    if not options.no_load_optim:
        _restore_optimizer(config.optimization.optimizer.type, engine, checkpoint)
    engine.loss_scaler = state.loss_scaler
    if not options.no_load_rng:
        restore_random_states(config.training.seed, checkpoint, engine.layout)
