"""What a run saves, and when."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
from pathlib import Path

from megatron.checkpoint.state import CanonicalState, folder_name, whole_pieces
from megatron.checkpoint.store import RunFolder
from megatron.config.schema import RunConfig
from megatron.config.sections.checkpoint import CheckpointConfig
from megatron.engine.base import Engine
from megatron.errors import UserError
from megatron.log import get_logger
from megatron.mpu.processes import first_rank_does
from megatron.training.generators import random_states
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


class Saver:
    """Saves a run where `save` names a folder, and removes what `keep_last_n_checkpoints` no longer keeps."""

    def __init__(self, config: RunConfig, engine: Engine, state: TrainState) -> None:
        self._config, self._engine, self._state = config, engine, state
        self._folder = RunFolder(config.checkpoint.save, "save") if config.checkpoint.save else None
        self._saved: int | None = None

    def is_due(self) -> bool:
        """Is it the time for a checkpoint?"""
        return self._folder is not None and should_save(self._config.checkpoint, self._state.iteration)

    def save_if_due(self, force: bool = False) -> bool:
        """Write a canonical checkpoint, unless this iteration has one. Collective.

        Args:
            force: now, whether it is the time for one or not.

        Returns: one was written. Raises UserError where that failed, and after an update that was not finite.
        """
        iteration = self._state.iteration
        if self._folder is None or self._saved == iteration or not (force or self.is_due()):
            return False
        self._engine.watch.look()
        self._save(self._folder)
        self._saved = iteration
        return True

    def _save(self, folder: RunFolder) -> None:
        engine, state, rank = self._engine, self._state, self._engine.layout.rank
        state.loss_scaler = engine.loss_scaler
        tensors = {
            "model": engine.model_tensors(),
            "optimizer": () if self._config.checkpoint.no_save_optim else engine.state.optimizer_state(),
            "rng": random_states(engine.layout, engine.device),
        }
        flat, record = self._config.flat(), environment() if rank == 0 else {}
        canonical = CanonicalState(state.iteration, state.state_dict(), flat, whole_pieces(tensors), record)
        if rank:
            folder.save(canonical, write=False)
        first_rank_does(lambda: self._write(folder, canonical), engine.layout)
        get_logger().info("saved checkpoint %s", folder.path / folder_name(state.iteration))

    def _write(self, folder: RunFolder, state: CanonicalState) -> None:
        """Write the checkpoint, on the first rank; the others give it their parts, and then wait for it to be done.

        Raises: UserError for a full disk and for values that are not finite, once all parts are taken.
        """
        options = self._config.checkpoint
        try:
            folder.save(state)
        except UserError:
            folder.save(state, write=False)  # the others are still gathering
            raise
        if options.keep_last_n_checkpoints:
            try:
                folder.remove_old(options.keep_last_n_checkpoints, options.extra_save_iters or ())
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
