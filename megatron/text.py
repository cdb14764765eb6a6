"""Text for people: a value cut to fit a message, the name that was meant, rows as a table."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable, Sequence
from typing import Any

_LONGEST_NAME = 80  # difflib takes milliseconds for longer ones


def shortened(value: Any, length: int = 60) -> str:
    """The value as text for a message, cut where it is long, with escapes for what has no picture."""
    text = str(value)
    text = text if len(text) <= length else f"{text[:length]}..."
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)


def yaml_form(value: Any) -> str:
    """A value for a message as a YAML file has it: true for True, text in quotes."""
    if isinstance(value, bool):
        return str(value).lower()
    return f"'{shortened(value)}'" if isinstance(value, str) else shortened(value)


def nearest(name: str, known: Iterable[str], likeness: float = 0.6, most: int = 1) -> list[str]:
    """The known names most like `name`, the nearest first; likeness 1 means equal."""
    return difflib.get_close_matches(name, list(known), most, likeness) if len(name) < _LONGEST_NAME else []


def suggestion(name: str, known: Iterable[str], otherwise: str = "", likeness: float = 0.6, most: int = 1) -> str:
    """`did you mean seed?` for a mistyped name, or `otherwise` where no known name is near."""
    near = nearest(name, known, likeness, most)
    return f"did you mean {', '.join(near)}?" if near else otherwise


def align(rows: Sequence[Sequence[str]], left: Collection[int]) -> list[str]:
    """The rows as lines, in columns of equal width: those numbered in `left` to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = zip(row, widths, range(len(widths)), strict=True)
        lines.append("  ".join(c.ljust(width) if i in left else c.rjust(width) for c, width, i in cells).rstrip())
    return lines
