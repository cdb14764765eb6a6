"""The one exception that means "the user can fix this", and how a command line reports it."""

from __future__ import annotations

import os
import select
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TextIO

from megatron.text import yaml_form

EXIT_FAILURE = 1
EXIT_USER_ERROR = 2
EXIT_LOST_RANK = os.EX_TEMPFAIL  # 75: another process of the run is gone, starting again may help
EXIT_INTERRUPTED = 130  # what shells give a process that SIGINT has ended
EXIT_NO_READER = 141  # the same for SIGPIPE: `--help | head` has read enough

_LATER_SECONDS = 3.0
_LESS_MEMORY = "`deepy.py ... --dry-run --gpus N` names layouts that fit; a smaller micro-batch takes less"
_OUT_OF_MEMORY = (
    "out of memory",
    "can't allocate memory",
    "cannot allocate memory",
    "not enough memory",
    "size calculation overflowed",
)


class UserError(ValueError):
    """A mistake in a file, key, value or command line.

    The message is one line: what is wrong, where (file, key, value), what to do.
    """


class ConfigError(UserError):
    """A mistake in the value of a configuration key: `where: key: reason, got value; advice`."""

    key: str
    """Dotted; "" where the mistake is in no key's value."""
    reason: str
    """What is wrong."""
    advice: str
    """What to do, where the reason does not say it."""
    value: Any
    """What was given, where the reason does not tell it; ... where it does."""
    beside: frozenset[str]
    """Keys whose own mistakes may be behind this one: the value is wrong beside theirs."""
    where: str
    """What gave the key: `file:line`, a flag or `override`; "" where that is not known."""
    spelling: str
    """The key as it was written there."""

    def __init__(
        self,
        key: str,
        reason: str,
        advice: str = "",
        *,
        value: Any = ...,
        beside: Iterable[str] = (),
        where: str = "",
        spelling: str = "",
    ) -> None:
        super().__init__(key, reason, advice)
        self.key, self.reason, self.advice, self.value = key, reason, advice, value
        self.beside, self.where, self.spelling = frozenset(beside), where, spelling or key

    def __str__(self) -> str:
        got = "" if self.value is ... else f", got {yaml_form(self.value)}"
        advice = f"; {self.advice}" if self.advice else ""
        return ": ".join(part for part in (self.where, self.spelling, f"{self.reason}{got}{advice}") if part)


class UserErrors(UserError):
    """Several mistakes that were found together; each has a line of its own."""

    def __init__(self, errors: Sequence[UserError | str]) -> None:
        self.errors = tuple(errors)
        self.lines = tuple(_one_line(str(error)) for error in errors)
        super().__init__("\n".join(self.lines))


class RankError(UserError):
    """A UserError that this process may have met alone, so that it speaks whatever its rank."""


class LostRank(RankError):
    """Another process of the run is gone. Nobody's mistake: the run may be started again as it is."""


class MachineError(Exception):
    """A machine that has gone wrong: no mistake of a user, and the run may go on from its last checkpoint.

    The message is one line, which names the rank and the node; the same on all ranks.
    """

    is_here: bool
    """It is the machine of this process; the others end as those do that have lost another one."""

    def __init__(self, message: str, is_here: bool) -> None:
        super().__init__(message, is_here)
        self.is_here = is_here

    def __str__(self) -> str:
        return str(self.args[0])


def run_command(function: Callable[[], int | None]) -> int:
    """Call `function`; report a UserError as one line a mistake on stderr instead of a traceback.

    Returns the exit code: what `function` returned (None counts as 0), 2 after a UserError, 75 after a LostRank, 1
    or 75 after a MachineError here or elsewhere, 130 after a Ctrl-C, 141 when nobody reads what it prints any more.
    """
    try:
        code = function() or 0
        _flush()
        return code
    except UserError as error:
        if _speaks_for_its_node() or isinstance(error, RankError):
            lines = error.lines if isinstance(error, UserErrors) else [_one_line(str(error))]
            sys.stderr.write("".join(f"error: {line}\n" for line in lines))
            sys.stderr.flush()
        return EXIT_LOST_RANK if isinstance(error, LostRank) else EXIT_USER_ERROR
    except MachineError as error:
        sys.stderr.write(f"error: {_one_line(str(error))}\n" if _speaks_for_its_node() else "")
        sys.stderr.flush()
        if error.is_here:
            return EXIT_FAILURE
        time.sleep(_LATER_SECONDS)  # a launcher blames the first that ends, and kills the others then
        return EXIT_LOST_RANK
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        sys.stderr.write(f"error: out of memory: {_one_line(str(error).split(chr(10))[0])[:200]}; {_LESS_MEMORY}\n")
        sys.stderr.flush()
        return EXIT_USER_ERROR
    except BrokenPipeError:
        if not _has_no_reader(sys.stdout):
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is still in the buffer
        return EXIT_NO_READER
    except KeyboardInterrupt:
        sys.stderr.write("SIGINT: stopped\n")
        return EXIT_INTERRUPTED


def _speaks_for_its_node() -> bool:
    """Ranks share a console: the first of each node speaks for all, in one write."""
    return (os.environ.get("LOCAL_PROCESS") or os.environ.get("LOCAL_RANK", "0")) == "0"


def _flush() -> None:
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except (OSError, ValueError):  # a full disk, or closed: logging has said so
        return


def _has_no_reader(stream: TextIO) -> bool:
    poll = select.poll()
    poll.register(stream.fileno(), 0)
    return any(events & select.POLLERR for _, events in poll.poll(0))


def _is_out_of_memory(error: BaseException) -> bool:
    """Whether it is Python's, torch's or a driver's word for that; torch raises RuntimeErrors of several classes."""
    return isinstance(error, MemoryError) or any(words in str(error).lower() for words in _OUT_OF_MEMORY)


def _one_line(text: str) -> str:
    """`text` on one line; what a terminal would obey or cannot show is spelled out."""
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in " ".join(text.split()))
