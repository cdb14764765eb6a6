"""Parts that break off, for the test of what runs them."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator

from tools.gpu.running import Settings, Skip


def crashes(settings: Settings) -> Iterator[tuple[str, bool, str]]:
    yield "before", True, "fine"
    os._exit(139)


def hangs(settings: Settings) -> Iterator[tuple[str, bool, str]]:
    yield "before", True, "fine"
    time.sleep(600)


def raises(settings: Settings) -> Iterator[tuple[str, bool, str]]:
    yield "before", False, "too far off"
    raise ValueError("two\nlines")


def cannot(settings: Settings) -> Iterator[tuple[str, bool, str]]:
    if settings.device == "cpu":
        raise Skip("needs a GPU")
    yield "never", True, ""


def one_rank_hangs(settings: Settings) -> Iterator[tuple[str, bool, str]]:
    if os.environ["RANK"] == "1":
        time.sleep(600)
    yield "first rank", True, "done"
