"""The table of rows, and the JSON file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron.text import align
from tools.gpu.running import Row, as_json

_MARKS = {"ok": "ok", "failed": "FAILED", "skipped": "skipped"}


def table(rows: Sequence[Row]) -> str:
    """One line a check, aligned."""
    cells = [("part", "check", "", "figure"), *((r.part, r.check, _MARKS[r.status], r.figure) for r in rows)]
    lines = align(cells, range(4))
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def summary(rows: Sequence[Row], seconds: float) -> str:
    """How many checks passed, and which parts have one that failed."""
    failed = sorted({row.part for row in rows if row.status == "failed"})
    counts = {status: sum(row.status == status for row in rows) for status in _MARKS}
    text = ", ".join(f"{count} {_MARKS[status]}" for status, count in counts.items())
    return f"{text} in {seconds:.0f} s" + (f"; look at: {', '.join(failed)}" if failed else "")


def write_json(path: Path, rows: Sequence[Row], settings: dict[str, Any]) -> None:
    """All rows with what was asked for."""
    failed = any(row.status == "failed" for row in rows)
    path.write_text(json.dumps({"ok": not failed, "settings": settings, "rows": as_json(list(rows))}, indent=1) + "\n")
