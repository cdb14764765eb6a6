"""failures.jsonl: lines of several writers, torn ones among them."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from megatron.failures import (
    FILE_NAME,
    Failure,
    failed_attempts,
    node_name,
    read_failures,
    record_failure,
    unreliable_nodes,
)


def test_what_is_recorded_is_read(tmp_path: Path) -> None:
    told = [
        Failure("node2", 5, "no sign of life for 60 s in update", 40),
        Failure(None, None, "killed by signal 9", None, exit_code=137, progress=False, job="17"),
    ]
    assert read_failures(tmp_path / "out") == []
    for failure in told:
        record_failure(tmp_path / "out", failure)
    assert read_failures(tmp_path / "out") == told
    assert failed_attempts(told) == told[1:]
    first = (tmp_path / "out" / FILE_NAME).read_text().splitlines()[0]
    assert first.startswith('{"time": "20') and "exit_code" not in first


@pytest.mark.parametrize(
    "torn", [b'{"time": "2026-01-01", "rea', b"\xff\n", b"[1]\n", b"[" * 9000 + b"\n", b'{"reason": 1}\n', b"null"]
)
def test_a_line_that_cannot_be_read_takes_no_other_with_it(tmp_path: Path, torn: bytes) -> None:
    before, after = Failure("a", 0, "before", 1), Failure("b", 1, "after", 2)
    record_failure(tmp_path, before)
    with (tmp_path / FILE_NAME).open("ab") as file:
        file.write(torn)
    record_failure(tmp_path, after)
    assert read_failures(tmp_path) == [before, after]


def test_lines_of_several_writers_stay_whole(tmp_path: Path) -> None:
    told = [Failure(f"node{n}", n, "lost " * 100, n) for n in range(40)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda failure: record_failure(tmp_path, failure), told))
    assert sorted(read_failures(tmp_path), key=lambda failure: failure.rank or 0) == told


def test_a_record_that_cannot_be_written_is_a_warning(tmp_path: Path, package_log: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").touch()
    record_failure(tmp_path / "file", Failure("a", 0, "lost", 1))
    assert f"{tmp_path / 'file' / FILE_NAME} cannot be written" in package_log.text


def test_nodes_are_unreliable_after_two_failed_attempts() -> None:
    def failed(node: str | None, code: int | None = 137) -> Failure:
        return Failure(node, None, "killed", None, exit_code=code)

    told = [failed("b"), failed("a"), failed("a", None), failed(None), failed(None), failed("c"), failed("c")]
    assert unreliable_nodes(told) == ["c"], "two lines about one attempt are one failure"
    assert unreliable_nodes([*told, failed("b")]) == ["b", "c"]


def test_a_node_is_called_what_slurm_calls_it() -> None:
    assert node_name({"SLURMD_NODENAME": "node7"}) == "node7"
    assert node_name({})
