"""The mistakes of a configuration, gathered so that all of them are told at once."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from megatron.errors import UserError, UserErrors

_MOST = 100
_PLACE = re.compile(r"(.{1,4096}?):(\d{1,9}): ")


class WrongTypes(ValueError):
    """What a validator raises that has found values of a wrong type: `lines`, each `key: what is wrong`."""

    def __init__(self, lines: list[str]) -> None:
        super().__init__("; ".join(lines))
        self.lines = lines


class Findings:
    """Mistakes in the order in which they are found, a line each."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.bad: set[str] = set()
        """Dotted keys with a mistake: what else follows from their values is not worth a line."""
        self.unread = False
        """Whether a file could not be read, so that keys may be missing that are given there."""

    def add(self, line: str) -> None:
        """One more, unless it is known already."""
        if line not in self.lines:
            self.lines.append(line)

    def add_unread(self, line: str) -> None:
        """One more, about a file of which nothing is known."""
        self.add(line)
        self.unread = True

    @contextmanager
    def collected(self) -> Iterator[None]:
        """Takes in the mistakes that the block raises, and goes on after it."""
        try:
            yield
        except UserError as error:
            for line in error.lines if isinstance(error, UserErrors) else [str(error)]:
                self.add(line)

    def raise_any(self) -> None:
        """Raise a UserError with all of them, in the order of files and their lines, if there are any."""
        files = list(dict.fromkeys(_place(line)[0] for line in self.lines))
        self.lines.sort(key=lambda line: (files.index(_place(line)[0]), _place(line)[1]))
        if len(self.lines) == 1:
            raise UserError(self.lines[0])
        if len(self.lines) > _MOST:
            raise UserErrors([*self.lines[:_MOST], f"and {len(self.lines) - _MOST} more mistakes"])
        if self.lines:
            raise UserErrors(self.lines)


def _place(line: str) -> tuple[str, int]:
    """File and line number that a message begins with; as it is and 0 without them."""
    match = _PLACE.match(line)
    return (match[1], int(match[2])) if match else (line, 0)
