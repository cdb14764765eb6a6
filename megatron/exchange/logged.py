"""What the run of a checkpoint has logged until then."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron.exchange.checkpoint import Checkpoint
from megatron.metrics import METRICS_FILE


def logged(checkpoint: Checkpoint) -> Iterator[dict[str, Any]]:
    """The entries of a run's metrics.jsonl up to the checkpoint's iteration, oldest first.

    The file is that of log_dir, else the one beside the checkpoint. A model that comes from elsewhere has none. A line
    that is no entry, such as the last one of a run that was killed, is passed over.
    """
    log_dir = (checkpoint.settings or {}).get("log_dir")
    places = [*([Path(log_dir)] if log_dir else []), checkpoint.folder.parent]
    file = next((place / METRICS_FILE for place in places if (place / METRICS_FILE).is_file()), None)
    for line in file.open("rb") if file else ():
        try:
            entry = json.loads(line)
            iteration = int(entry["iteration"])
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
            continue
        if iteration <= (checkpoint.iteration or 0):
            yield {**entry, "iteration": iteration}
