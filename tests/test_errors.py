"""How a command line reports mistakes: a line each, and no traceback for what a user can mend."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megatron.errors import EXIT_LOST_RANK, LostRank, MachineError, UserError, UserErrors, run_command


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


def test_a_lost_rank_is_a_line_on_every_rank_and_no_mistake(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> None:
        raise LostRank("the first rank is gone")

    monkeypatch.setenv("LOCAL_RANK", "3")
    assert run_command(fail) == EXIT_LOST_RANK == 75
    assert capsys.readouterr().err == "error: the first rank is gone\n"


@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_machine_that_goes_wrong_is_one_line_and_no_mistake(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, rank: str
) -> None:
    def fail() -> None:
        raise MachineError("rank 3 (node1):\nwrong", is_here=rank == "1")

    waited: list[float] = []
    monkeypatch.setattr("time.sleep", waited.append)
    monkeypatch.setenv("LOCAL_RANK", rank)
    assert run_command(fail) == (1 if rank == "1" else EXIT_LOST_RANK)
    assert capsys.readouterr().err == ("error: rank 3 (node1): wrong\n" if rank == "0" else "")
    assert bool(waited) == (rank == "0"), "the one whose machine it is ends first"


def test_other_errors_keep_their_traceback() -> None:
    def fail() -> None:
        raise RuntimeError("a fault of the program")

    with pytest.raises(RuntimeError):
        run_command(fail)


@pytest.mark.launches
def test_a_reader_that_has_read_enough_is_no_error() -> None:
    code = (
        "import sys; from megatron.errors import run_command; sys.exit(run_command(lambda: print('line\\n' * 10**6)))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=Path(__file__).parents[1],
    )  # fmt: skip
    assert process.stdout and process.stderr
    process.stdout.readline()
    process.stdout.close()
    assert (process.stderr.read(), process.wait(20)) == (b"", 141)
    process.stderr.close()
