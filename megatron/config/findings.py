"""The mistakes of a configuration, gathered so that all of them are told at once."""

from __future__ import annotations

from megatron.errors import ConfigError, UserErrors

_MOST = 100


class Findings:
    """Mistakes in the order in which they are found."""

    def __init__(self) -> None:
        self.errors: list[ConfigError] = []
        self.bad: set[str] = set()
        """Dotted keys with a mistake: what else follows from their values is not worth a line."""
        self.unread = False
        """Whether a file could not be read, so that keys may be missing that are given there."""
        self._told: set[str] = set()

    def add(self, error: ConfigError) -> None:
        """One more, unless it is known already."""
        if str(error) not in self._told:
            self._told.add(str(error))
            self.errors.append(error)

    def add_unread(self, error: ConfigError) -> None:
        """One more, about a file of which nothing is known."""
        self.add(error)
        self.unread = True

    def covers(self, error: ConfigError) -> bool:
        """Whether a mistake may only follow from those that are told already."""
        return any(told.key == error.key != "" for told in self.errors) or not self.bad.isdisjoint(error.beside)

    def raise_any(self) -> None:
        """Raise a UserError with all of them, in the order of files and their lines, if there are any."""
        files = list(dict.fromkeys(_place(error)[0] for error in self.errors))
        self.errors.sort(key=lambda error: (files.index(_place(error)[0]), _place(error)[1]))
        more = len(self.errors) - _MOST
        if more > 0:
            raise UserErrors([*self.errors[:_MOST], f"and {more} more mistakes"])
        if self.errors:
            raise self.errors[0] if len(self.errors) == 1 else UserErrors(self.errors)


def _place(error: ConfigError) -> tuple[str, int]:
    """File and line of a mistake; what it says and 0 where it is in no file."""
    file, colon, line = error.where.rpartition(":")
    return (file, int(line)) if colon and line.isdecimal() else (str(error), 0)
