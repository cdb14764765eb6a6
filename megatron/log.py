"""Rank-aware logging: every module logs through here, only rank 0 reaches the console."""

from __future__ import annotations

import logging
import os
import sys

_NAME = "megatron"


class _RankZeroOnly(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        return getattr(record, "all_ranks", False) or int(os.environ.get("RANK", "0")) == 0


def get_logger() -> logging.Logger:
    """The package's logger; INFO from rank 0, everything marked `extra={"all_ranks": True}` from all."""
    logger = logging.getLogger(_NAME)
    if not logger.handlers:
        handler = logging.StreamHandler(sys.stdout)
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
        handler.addFilter(_RankZeroOnly())
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        logger.propagate = False
    return logger
