"""Python commands in children of the fork server, which has their imports; stands in for the module subprocess.

For tests of what a command does; how it starts has tests of its own.
"""

from __future__ import annotations

import os
import runpy
import sys
import traceback
from pathlib import Path
from subprocess import TimeoutExpired
from typing import IO, Any

from tests import ranks

__all__ = ["Popen", "TimeoutExpired"]


class Popen:
    """Of subprocess.Popen what runs `python -m MODULE WORDS` or `python FILE WORDS` into files.

    Modules that are imported already are not imported anew; the rest is as in a process of its own.
    """

    def __init__(
        self, command: list[str], *, cwd: Path, env: dict[str, str], stdout: IO[str], stderr: IO[str],
        start_new_session: bool = False,
    ) -> None:  # fmt: skip
        assert command[0] == sys.executable
        outputs = {1: stdout.name, 2: stderr.name}
        arguments = (command[1:], str(cwd), env, outputs, start_new_session)
        self._process = ranks.fork_server().Process(target=_run, args=arguments)
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    def wait(self, timeout: float | None = None) -> int:
        """The exit code. Raises: subprocess.TimeoutExpired."""
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise TimeoutExpired("python", timeout or 0)
        return self._process.exitcode


def _run(words: list[str], cwd: str, env: dict[str, str], outputs: dict[int, str], leads: bool) -> None:
    if leads:
        os.setsid()
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    for number, path in outputs.items():
        os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND), number)
    code: Any = 0
    try:
        if words[0] == "-m":
            sys.argv = words[1:]
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv, sys.path[0] = words, str(Path(words[0]).resolve().parent)
            runpy.run_path(words[0], run_name="__main__")
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else 1)
