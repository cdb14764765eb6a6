"""How a command line reports mistakes: a line each, and no traceback for what a user can mend."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from megatron.errors import UserError, UserErrors, run_command


def test_each_mistake_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        raise UserErrors(["a: wrong\n  in two ways", "b: wrong \ud800"])

    assert run_command(fail) == 2
    assert capsys.readouterr().err == "error: a: wrong in two ways\nerror: b: wrong \\ud800\n"
    assert str(UserErrors(["a", "b"])) == "a\nb" and isinstance(UserErrors([]), UserError)


@pytest.mark.parametrize(
    "allocate",
    [lambda: torch.empty(2**50), lambda: torch.empty(2**62), lambda: bytearray(2**60), lambda: [0] * 2**60],
    ids=["torch", "torch overflow", "bytes", "list"],
)
def test_memory_that_is_not_there_is_one_line(
    allocate: Callable[[], object], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(lambda: allocate() and 0) == 2  # type: ignore[func-returns-value]
    error = capsys.readouterr().err
    assert error.startswith("error: out of memory: ") and error.count("\n") == 1 and "--dry-run" in error


def test_other_errors_keep_their_traceback() -> None:
    def fail() -> None:
        raise RuntimeError("a fault of the program")

    with pytest.raises(RuntimeError):
        run_command(fail)
