"""Rank-aware logging: every module logs through here, only rank 0 reaches the console."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from typing import TextIO

_NAME = "megatron"
_FORMAT = logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S")


class _RankZeroOnly(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        return getattr(record, "all_ranks", False) or int(os.environ.get("RANK", "0")) == 0


class _Console(logging.StreamHandler[TextIO]):
    """Writes to whatever sys.stdout is now: it may be redirected, and the first one closed, during a process."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:  # type: ignore[override]
        return sys.stdout


def get_logger() -> logging.Logger:
    """The package's logger; INFO from rank 0, everything marked `extra={"all_ranks": True}` from all."""
    logger = logging.getLogger(_NAME)
    if not logger.handlers:
        handler = _Console()
        handler.setFormatter(_FORMAT)
        handler.addFilter(_RankZeroOnly())
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        logger.propagate = False
    return logger


def log_to_file(path: Path) -> None:
    """Append everything that reaches the console to `path` too, and no longer to the file named before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    logger = get_logger()
    for known in [handler for handler in logger.handlers if isinstance(handler, logging.FileHandler)]:
        if known.baseFilename == str(path.absolute()):
            return
        logger.removeHandler(known)
        known.close()
    handler = logging.FileHandler(path, encoding="utf-8", delay=True)
    handler.setFormatter(_FORMAT)
    handler.addFilter(_RankZeroOnly())
    logger.addHandler(handler)
