"""Whom the others wait for, from what ranks say of themselves."""

from __future__ import annotations

import os
from dataclasses import replace

from megatron.mpu.blame import Report, Verdict, behind, judge
from megatron.mpu.neighbours import GONE, STOPPED, THERE, Neighbour
from megatron.mpu.progress import IDLE, Limits, Progress


def report(rank: int, *, waits: bool = True, count: int = 10, collectives: dict[str, int] | None = None) -> Report:
    return Report(rank, f"n{rank}", "update", 3, count, 5.0, waits, "loop.py:1 step", collectives or {})


def names(reports: list[Report]) -> list[int]:
    return [report.rank for report in reports]


def test_who_waits_for_nobody_while_others_wait_is_to_blame() -> None:
    assert names(behind([report(0), report(1, waits=False), report(2)])) == [1]
    assert names(behind([report(0), report(1, waits=False), report(2, waits=False, count=9)])) == [2]


def test_of_ranks_that_all_wait_it_is_the_one_that_waits_for_none_behind_it() -> None:
    """Tensor ranks 0, 1 and 2, 3; rank 1 hangs in a call that looks like a wait, and rank 0 waits for it alone."""
    all_of_them = [
        report(0, collectives={"tensor01": 8, "data02": 4}), report(1, collectives={"tensor01": 7, "data13": 4}),
        report(2, collectives={"tensor23": 8, "data02": 5}), report(3, collectives={"tensor23": 8, "data13": 5}),
    ]  # fmt: skip
    assert names(behind(all_of_them)) == [1]


def test_else_it_is_the_slowest_and_nobody_where_all_are_equally_far() -> None:
    assert names(behind([report(0), report(1, count=9)])) == [1]
    assert names(behind([report(0, waits=False), report(1, waits=False, count=9)])) == [1]
    assert behind([report(0), report(1)]) == []
    verdict = judge("the limit of update is 3 s", [report(0), report(1)], {})
    assert verdict is not None and verdict.missing == ()
    assert verdict.line.startswith("no rank is behind the others, the limit of update is 3 s: rank 0 in update")


def test_the_line_names_rank_node_place_and_limit() -> None:
    verdict = judge("the limit of update is 3 s", [report(0), report(1, waits=False), report(2)], {})
    assert verdict == Verdict(
        "rank 1 on n1 hangs in update of iteration 3 for 5 s, at loop.py:1 step; 2 others wait for it; "
        "the limit of update is 3 s", (1,), "n1",
    )  # fmt: skip
    assert judge("", [report(0), report(1)], {}) is None, "a connection was lost, and all answer"
    assert Report.parse(str(report(1, collectives={"0": 3}))) == report(1, collectives={"0": 3})


def test_silent_ranks_are_named_first_those_that_are_gone() -> None:
    seen = replace(report(0), neighbours={"2": STOPPED, "3": GONE})
    silent = {rank: (f"n{rank}", "in save of iteration 2") for rank in (1, 2, 3)}
    verdict = judge("", [seen], silent)
    assert verdict is not None and verdict.missing == verdict.silent == (3, 2, 1) and verdict.host == "n3"
    assert verdict.line == (
        "rank 3 on n3 has been killed or has crashed (last seen in save of iteration 2); "
        "rank 2 on n2 is stopped, by a SIGSTOP or a debugger (last seen in save of iteration 2); "
        "rank 1 on n1 does not answer (last seen in save of iteration 2)"
    )


def test_a_limit_follows_from_how_long_a_phase_took() -> None:
    limits = Limits({"save": 7.0}, frozenset({"batch", "update"}), factor=20, minimum=10, most=100)
    progress = Progress()
    assert limits.of("save", progress.durations("save")) == 7.0, "given: from the first time on"
    batches = progress.durations("batch")
    for seconds in (90.0, 1.0, 1.0, 1.0):
        batches.append(seconds)
    assert limits.of("batch", batches) is None, "too few to tell"
    batches.append(1.0)
    assert limits.of("batch", batches) == 100.0, "twice the longest is above what collectives wait"
    batches.popleft()
    batches.append(1.0)
    assert limits.of("batch", batches) == 20.0
    batches.extend([0.1] * 10)
    assert limits.of("batch", batches) == 10.0
    assert limits.of("startup", batches) is None and limits.of(IDLE, batches) is None


def test_phases_are_timed_and_counted() -> None:
    progress = Progress()
    progress.enter("batch", 4)
    progress.enter("update")
    progress.enter("update")
    assert (progress.phase, progress.iteration, progress.count) == ("update", 4, 3)
    assert [len(progress.durations(phase)) for phase in ("batch", "update", "save")] == [1, 1, 0]
    progress.forget()
    assert len(progress.durations("update")) == 0


def test_a_later_process_with_the_same_id_is_another_one() -> None:
    own = Neighbour.this(3)
    assert Neighbour.parse(f"{own}\n{own}\n") == [own, own] and own.pid == os.getpid()
    assert own.state == THERE
    assert replace(own, started=own.started - 1).state == GONE
    replace(own, started=own.started - 1).kill()  # nobody
    assert Neighbour(0, own.pid, 0).state == THERE, "where the kernel tells nothing"
