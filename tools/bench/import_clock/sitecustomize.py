"""Notes how long some imports take: Python runs this file first where its folder is on PYTHONPATH.

IMPORT_CLOCK_FILE gets a line `process name begin end processor` for each import of a module that IMPORT_CLOCK_NAMES
lists: seconds of the system's monotonic clock, and of processor time that it took. A process that knows neither is left
alone.
"""

from __future__ import annotations

import os
import sys
import time
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any


class _Clock:
    """A finder that finds what Python would, and times how long it runs."""

    def __init__(self, names: set[str], file: str) -> None:
        self._names, self._file = names, file

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        """The spec of a module that is timed; None for all others."""
        spec = PathFinder.find_spec(name, path, target) if name in self._names else None
        if spec is None or spec.loader is None:
            return None
        execute, loader = spec.loader.exec_module, spec.loader

        def timed(module: ModuleType) -> None:
            begin, used = time.monotonic(), time.process_time()
            try:
                execute(module)
            finally:
                line = f"{os.getpid()} {name} {begin:.6f} {time.monotonic():.6f} {time.process_time() - used:.6f}\n"
                with open(self._file, "a", encoding="ascii") as file:
                    file.write(line)

        loader.exec_module = timed  # type: ignore[method-assign]
        return spec


if "IMPORT_CLOCK_FILE" in os.environ:
    _names = set(os.environ.get("IMPORT_CLOCK_NAMES", "").split(","))
    sys.meta_path.insert(0, _Clock(_names, os.environ["IMPORT_CLOCK_FILE"]))
