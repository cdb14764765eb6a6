"""A trace of some iterations, and on a GPU a snapshot of its memory, where the key `profile` asks for them.

The first process writes, into log_dir, else save:

    trace_{first}_{last}.json.gz    for https://ui.perfetto.dev or chrome://tracing
    memory_{first}_{last}.pickle    for https://pytorch.org/memory_viz; every allocation with where it was made
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from megatron.config.sections.logging import LoggingConfig
from megatron.log import get_logger

_MEMORY_EVENTS = 200_000
"""Allocations that a snapshot goes back; a step of the published models has some thousands."""


class Profiler:
    """Watches the iterations that `options.profile` names; without it, and on other ranks than the first, nothing.

    What cannot be written is lost, with one line; the run goes on.

    Args:
        options: its log_dir, else `save`, is where files go.
        device: of this process.
        rank: among all processes.
    """

    def __init__(self, options: LoggingConfig, save: str | None, device: torch.device, rank: int) -> None:
        self._asked = options.profile if rank == 0 else None
        self._folder, self._device = Path(options.log_dir or save or "."), device
        self._profile: Any = None
        self._first = self._last = 0

    def before(self, iteration: int) -> None:
        """Begin, when this iteration is the first one that is watched, or the run starts amid them."""
        asked = self._asked
        if asked is None or self._profile is not None or not asked.start <= iteration <= asked.stop:
            return
        kinds = [torch.profiler.ProfilerActivity.CPU]
        if self._device.type == "cuda":
            kinds.append(torch.profiler.ProfilerActivity.CUDA)
            torch.cuda.memory._record_memory_history(max_entries=_MEMORY_EVENTS)
        self._first = iteration
        self._profile = torch.profiler.profile(activities=kinds, record_shapes=True, profile_memory=True)
        self._profile.start()

    def after(self, iteration: int) -> None:
        """End, and write, when this iteration was the last one that is watched."""
        self._last = iteration
        if self._asked is not None and iteration >= self._asked.stop:
            self.close()

    def close(self) -> None:
        """Write what has been watched so far: of a run that ends before its last iteration, those that it had."""
        if self._profile is None:
            return
        profile, self._profile, self._asked = self._profile, None, None
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        profile.stop()
        name = f"{self._first}_{max(self._first, self._last)}"
        trace, snapshot = self._folder / f"trace_{name}.json.gz", self._folder / f"memory_{name}.pickle"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            profile.export_chrome_trace(str(trace))
            written = str(trace)
            if self._device.type == "cuda":
                torch.cuda.memory._dump_snapshot(str(snapshot))
                written += f" and {snapshot}"
            get_logger().info("profile of iterations %s: %s", name.replace("_", " to "), written)
        except (OSError, RuntimeError) as error:
            get_logger().warning("profile: cannot be written to %s: %s; the run goes on without", self._folder, error)
        finally:
            if self._device.type == "cuda":
                torch.cuda.memory._record_memory_history(enabled=None)
