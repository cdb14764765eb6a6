"""Results of many runs in one JSON file, which is written after every run: a later call goes on from it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron.errors import UserError
from megatron.files import write_output

Results = dict[str, dict[str, Any]]
"""By the name of a run."""


def known_results(path: Path) -> Results:
    """What a file of results has; nothing where there is none. UserError for another file."""
    if not path.exists():
        return {}
    try:
        return dict(json.loads(path.read_text(encoding="utf-8"))["results"])
    except (OSError, ValueError, TypeError, KeyError):
        raise UserError(f"FILE: {path} is no file of results; name another one") from None


def write_results(path: Path, results: Results) -> None:
    """Write all of them. Raises UserError where the file cannot be written."""
    write_output(path, json.dumps({"results": results}, indent=1) + "\n", "FILE")
