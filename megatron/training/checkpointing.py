"""Between the engine and the store: what a run saves, and how it resumes."""

from __future__ import annotations

import hashlib
import importlib.metadata
import platform
import random
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megatron.checkpoint.state import CanonicalState, folder_name
from megatron.checkpoint.store import (
    CheckpointReader,
    find_checkpoint,
    list_iterations,
    remove_old,
    save_checkpoint,
)
from megatron.config.schema import CheckpointConfig, RunConfig
from megatron.errors import UserError
from megatron.log import get_logger
from megatron.mpu import Layout
from megatron.mpu.device import uses_gpu
from megatron.mpu.processes import first_rank_does
from megatron.training.engine import Engine
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
    tensors = {"model": engine.model_tensors(), "rng": _random_states(engine)}
    if not options.no_save_optim:
        tensors["optimizer"] = engine.state.optimizer_state()
    canonical = CanonicalState(
        state.iteration, state.state_dict(), config.flat(), tensors, environment() if rank == 0 else {}
    )
    first_rank_does(_written(options, canonical, rank), engine.layout)
    get_logger().info("saved checkpoint %s", Path(options.save) / folder_name(state.iteration))


def _written(options: CheckpointConfig, state: CanonicalState, rank: int) -> Callable[[], None]:
    """Write the checkpoint, and what it came to: nothing, or the UserError of a full disk."""
    assert options.save is not None, "the loop saves only where there is a folder"
    failure: UserError | None = None
    try:
        save_checkpoint(options.save, state, write=rank == 0)
        if rank == 0 and options.keep_last_n_checkpoints:
            remove_old(options.save, options.keep_last_n_checkpoints, options.extra_save_iters or ())
    except UserError as error:
        failure = error
        save_checkpoint(options.save, state, write=False)  # the other ranks are still gathering

    def outcome() -> None:
        if failure is not None:
            raise failure

    return outcome


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


def _random_states(engine: Engine) -> Iterator[tuple[str, Tensor]]:
    """Generator states of every rank, `rank{r}/{generator}`. Collective."""
    for kind, state in _local_random_states().items():
        mine = state.to(engine.device)
        everyone = [torch.empty_like(mine) for _ in range(engine.layout.world_size)]
        if engine.layout.world_size > 1:
            dist.all_gather(everyone, mine)
        else:
            everyone = [mine]
        yield from ((f"rank{rank}/{kind}", tensor) for rank, tensor in enumerate(everyone))


def _local_random_states() -> dict[str, Tensor]:
    _, python_state, _ = random.getstate()
    numpy_state: Any = np.random.get_state(legacy=True)
    keys, position = numpy_state[1:3]
    states = {
        "torch": torch.get_rng_state(),
        "python": torch.tensor(python_state, dtype=torch.int64),
        "numpy": torch.tensor([*map(int, keys), position], dtype=torch.int64),
    }
    if uses_gpu():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def seed_generators(seed: int, layout: Layout, iteration: int = 0) -> None:
    """Seed this process's generators; the tensor ranks of one place of the grid draw the same numbers.

    Dropout that has to differ between tensor ranks derives its own streams (megatron.mpu.random).
    """
    place = layout.rank // layout.tensor_size
    if iteration:
        digest = hashlib.blake2b(f"{seed}/{iteration}/{place}".encode(), digest_size=4).digest()
        seed, place = int.from_bytes(digest, "little"), 0
    torch.manual_seed(seed + place)
    random.seed(seed + place)
    np.random.seed((seed + place) % 2**32)


def restore_random_states(config: RunConfig, reader: CheckpointReader, layout: Layout) -> None:
    """Set this rank's generators as saved; seed them afresh when the run that saved had another grid."""
    keys = ("model_parallel_size", "pipe_parallel_size")
    now = config.flat()
    saved_ranks = {name.partition("/")[0] for name in reader.names("rng")}
    same_axes = all(max(1, reader.config.get(key) or 1) == max(1, now[key]) for key in keys)
    if not same_axes or len(saved_ranks) != layout.world_size:
        seed_generators(config.training.seed, layout, reader.iteration)
        get_logger().info(
            "%s has no random-number states of this process grid: going on from a new seed", reader.folder
        )
        return
    prefix = f"rank{layout.rank}/"
    values = {n.removeprefix(prefix): reader.tensor("rng", n) for n in reader.names("rng") if n.startswith(prefix)}
    torch.set_rng_state(values["torch"])
    random.setstate((3, tuple(values["python"].tolist()), None))
    *keys_of_numpy, position = values["numpy"].tolist()
    np.random.set_state(("MT19937", np.array(keys_of_numpy, dtype=np.uint32), position, 0, 0.0))
    if "cuda" in values and uses_gpu():
        torch.cuda.set_rng_state(values["cuda"])


def open_for_resume(config: RunConfig, layout: Layout) -> CheckpointReader | None:
    """The checkpoint a run continues from; None when `load` is unset, missing or empty: it then starts from scratch.

    Rank 0 compares the checksums. Collective. Raises: UserError for a damaged one, on every rank.
    """
    load = config.checkpoint.load
    if load is None:
        return None
    if Path(load).exists() and not Path(load).is_dir():
        raise UserError(f"load: {load} is a file; give the folder of the run's checkpoints")
    folder = find_checkpoint(load, config.checkpoint.iteration)
    if folder is None:
        if Path(load).is_dir() and any(Path(load).glob("global_step*")):
            raise UserError(f"load: {load} has global_step folders but no `latest` file; name one with `iteration`")
        base = config.checkpoint.pretrain_partial_init
        get_logger().info("no checkpoint in %s: starting from %s", load, base or "scratch")
        return None
    reader = CheckpointReader(folder, verify=False)
    first_rank_does(reader.verify, layout)
    return reader


def check_save_folder(config: RunConfig, reader: CheckpointReader | None) -> None:
    """Raise a UserError rather than mix this run's checkpoints with those of a run it does not continue."""
    options = config.checkpoint
    if options.save is None or not list_iterations(options.save):
        return
    continues = reader is not None and not options.finetune
    if not (continues and options.load and Path(options.load).resolve() == Path(options.save).resolve()):
        raise UserError(
            f"save: {options.save} has checkpoints of a run that this one does not continue; "
            "set load to the same folder to resume it, or save to another one"
        )


# Changing one of these gives the samples another order, in which the consumed ones are not a prefix.
_DATA_KEYS = (
    "seed", "seq_length", "data_path", "train_data_paths", "train_data_weights", "split", "weight_by_num_documents",
    "weighted_sampler_alpha",
)  # fmt: skip


def data_differences(config: RunConfig, reader: CheckpointReader) -> list[str]:
    """In which keys the data of a run is another than that of a checkpoint, `key old -> new`."""
    now = config.flat()
    return [f"{k} {reader.config.get(k)} -> {now[k]}" for k in _DATA_KEYS if reader.config.get(k) != now[k]]


def warn_of_other_data(config: RunConfig, reader: CheckpointReader) -> None:
    if changed := data_differences(config, reader):
        get_logger().warning("data differs from the checkpoint's, samples may repeat: %s", "; ".join(changed))


_ADAM_FAMILY = ("Adam", "AdamW", "FusedAdam", "ApexAdam", "CPU_Adam")


def _restore_optimizer(config: RunConfig, engine: Engine, reader: CheckpointReader) -> None:
    saved, now = reader.config["optimizer"]["type"], config.optimization.optimizer.type
    if saved != now and not (saved in _ADAM_FAMILY and now in _ADAM_FAMILY):
        raise UserError(
            f"optimizer.type: {now} cannot take over the state of {saved} in {reader.folder}; "
            "keep the optimizer, or set no_load_optim: true to start with a fresh state"
        )
    if reader.config.get("no_save_optim") and reader.iteration > 0:
        raise UserError(f"load: {reader.folder} has no optimizer state; set no_load_optim: true to go on without it")
    names = reader.names("optimizer")
    engine.state.write_optimizer_state(names, lambda name: reader.tensor("optimizer", name))


def restore(config: RunConfig, engine: Engine, state: TrainState, reader: CheckpointReader) -> None:
    """Continue from a checkpoint whose weights the engine's model and whose progress `state` already hold.

    Parameters that the checkpoint's optimizer does not know (new tokens) start without a state.
    """
    options = config.checkpoint
    if options.finetune:
        get_logger().info("took the weights of %s; everything else starts anew (finetune)", reader.folder)
        return
    if not options.no_load_optim:
        _restore_optimizer(config, engine, reader)
    engine.loss_scaler = state.loss_scaler
    if not options.no_load_rng:
        restore_random_states(config, reader, engine.layout)
