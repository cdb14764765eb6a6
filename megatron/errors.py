"""The one exception that means "the user can fix this", and how a command line reports it."""

from __future__ import annotations

import sys
from collections.abc import Callable

EXIT_USER_ERROR = 2


class UserError(ValueError):
    """A mistake in a file, key, value or command line.

    The message is one line: what is wrong, where (file, key, value), what to do.
    """


def run_command(function: Callable[[], int | None]) -> int:
    """Call `function`; report a UserError as one line on stderr instead of a traceback.

    Returns the exit code: what `function` returned (None counts as 0), or 2 after a UserError.
    """
    try:
        return function() or 0
    except UserError as error:
        message = " ".join(str(error).split())
        print(f"error: {message}", file=sys.stderr, flush=True)
        return EXIT_USER_ERROR
