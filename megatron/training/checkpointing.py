"""What a run saves, and when."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
from concurrent.futures import Future, wait
from functools import cache, partial
from itertools import chain
from pathlib import Path
from typing import Any

from megatron.checkpoint.pieces import whole_pieces
from megatron.checkpoint.snapshot import HostBuffers
from megatron.checkpoint.state import CanonicalState
from megatron.checkpoint.store import RunFolder
from megatron.config.schema import RunConfig
from megatron.config.sections.checkpoint import CheckpointConfig
from megatron.engine.base import Engine
from megatron.errors import UserError
from megatron.log import get_logger
from megatron.training.generators import random_states
from megatron.training.saving import SaveResult, in_thread, save_together
from megatron.training.state import TrainState

_PATIENCE_SECONDS = 600.0
"""How long a run that ends with an error waits for a save."""
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
    """Saves a run where `save` names a folder, and removes what `keep_last_n_checkpoints` no longer keeps.

    Every rank writes what it holds. Training waits for a copy of that in the host's memory only; a thread of each rank
    writes it, and one of the first rank's publishes the checkpoint once all have. There is one save at a time.
    """

    def __init__(self, config: RunConfig, engine: Engine, state: TrainState) -> None:
        self._config, self._engine, self._state = config, engine, state
        self._folder = RunFolder(config.checkpoint.save, "save") if config.checkpoint.save else None
        self._buffers, self._saved = HostBuffers(), -1
        self._in_flight: Future[SaveResult] | None = None
        self._failure: UserError | None = None
        self.has_published = False
        """Has it written a checkpoint, as far as was waited for?"""
        self._record: dict[str, Any] | None = None

    @property
    def stops(self) -> bool:
        """Has a save failed that the run is not to go on without?"""
        if self._in_flight is not None and self._in_flight.done():
            self._settle()
        return self._failure is not None

    def is_due(self) -> bool:
        """Is it the time for a checkpoint?"""
        return self._folder is not None and (self._is_kept() or self._is_transient())

    def _is_kept(self) -> bool:
        return should_save(self._config.checkpoint, self._state.iteration)

    def _is_transient(self) -> bool:
        interval, iteration = self._config.checkpoint.non_persistent_save_interval, self._state.iteration
        return interval is not None and iteration > 0 and iteration % interval == 0

    def save_if_due(self, force: bool = False) -> bool:
        """Begin to write a canonical checkpoint, unless this iteration has one. Collective.

        Args:
            force: now, whether it is the time for one or not; and have it written before going on.

        Returns: it was time for one. Raises: UserError where a forced save failed, or an earlier one that the run is
            not to go on without, and after an update that was not finite.
        """
        if self._folder is None or not (force or self.is_due()):
            return False
        self.finish()
        if self._saved == self._state.iteration:
            return False
        self._engine.watch.look()
        self._save(self._folder, transient=not (force or self._is_kept()), waits=force)
        return True

    def finish(self) -> None:
        """Wait for the save that is being written. Raises: UserError for one that the run is not to go on without."""
        self._settle()
        if self._failure is not None:
            raise self._failure

    def close(self) -> None:
        """Wait for the save that is being written, whatever becomes of it; for a run that ends with an error."""
        if self._in_flight is not None:
            wait([self._in_flight], timeout=_PATIENCE_SECONDS)
        self._buffers = HostBuffers()  # the next start of the run has a saver of its own

    def _save(self, folder: RunFolder, transient: bool, waits: bool) -> None:
        layout, state, options = self._engine.layout, self._state, self._config.checkpoint
        state.loss_scaler = self._engine.loss_scaler
        if self._record is None:
            self._record = environment() if layout.rank == 0 else {}
        pieces = chain(
            self._engine.state.pieces(with_optimizer=not options.no_save_optim),
            whole_pieces({"rng": random_states(layout.rank)}),
        )
        in_background = options.async_save and not waits
        canonical = CanonicalState(
            state.iteration, state.state_dict(), self._config.flat(),
            self._buffers.copies(pieces) if in_background else pieces, self._record,
        )  # fmt: skip
        write = partial(save_together, folder, canonical, layout, transient, options)
        self._saved = state.iteration
        if in_background:
            self._in_flight = in_thread(write)
        else:
            self._take_in(write(), forced=waits)
            self.finish()

    def _settle(self) -> None:
        """Wait for the save that is being written, if there is one, and take in what became of it."""
        if self._in_flight is not None:
            result, self._in_flight = self._in_flight.result(), None
            self._take_in(result)

    def _take_in(self, result: SaveResult, forced: bool = False) -> None:
        """Learn what became of a save, the same on all ranks.

        Args:
            forced: there is no later one that could make up for it.
        """
        if result.failure is None:
            self.has_published = True
            return
        self._saved = -1
        if forced or result.is_fatal or self._config.checkpoint.on_save_failure == "stop":
            self._failure = UserError(result.failure)
        else:
            get_logger().warning("%s; training goes on (on_save_failure: continue)", result.failure)


@cache
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
