"""How the doctor's processes speak to the one that started them: a line of JSON each on standard output.

Launchers carry standard output without a file system or a port in common, and a line stays one whatever name they put
before it.
"""

from __future__ import annotations

import base64
import json
import os
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple

_MARK = "@doctor "
HELLO, BYE = "hello", "bye"
STARTED, DONE, FAILED, HUNG = "started", "done", "failed", "hung"


class Check(NamedTuple):
    """A function that looks at one thing; `seconds` is how long it may take."""

    name: str
    seconds: float
    look: Callable[[], Any]


def say(name: str, state: str, value: Any = None) -> None:
    """Write a line about a check: what it found when DONE, why it has no value when FAILED or HUNG."""
    frame = {"check": name, "state": state, "value": value, "time": time.time()}
    sys.stdout.flush()
    os.write(1, f"{_MARK}{json.dumps(frame)}\n".encode())


def heard(line: str) -> dict[str, Any] | None:
    """The frame in a line of output; None where there is none."""
    _, mark, text = line.partition(_MARK)
    try:
        frame = json.loads(text) if mark else None
    except ValueError:
        return None
    return frame if isinstance(frame, dict) and {"check", "state", "value", "time"} <= frame.keys() else None


def pack(request: Any) -> str:
    """`request` as one word of a command line that no shell reads anything into."""
    return base64.urlsafe_b64encode(json.dumps(request).encode()).decode()


def unpack(word: str) -> Any:
    """What `pack` made a word of."""
    return json.loads(base64.urlsafe_b64decode(word))


def run_checks(checks: list[Check]) -> None:
    """Run them in this order and say what each found; one that fails or hangs is left behind."""
    for check in checks:
        say(check.name, STARTED, check.seconds)
        thread = threading.Thread(target=_run, args=(check,), daemon=True)
        thread.start()
        thread.join(check.seconds)
        if thread.is_alive():
            say(check.name, HUNG, f"no answer within {check.seconds:g} s")


def _run(check: Check) -> None:
    try:
        say(check.name, DONE, check.look())
    except Exception as error:
        text = " ".join(str(error).split())
        say(check.name, FAILED, f"{type(error).__name__}: {text}"[:400])
