"""Text for people."""

from __future__ import annotations

from megatron.text import align, nearest, shortened, suggestion


def test_a_value_is_cut_and_spelled_out() -> None:
    assert shortened("a" * 61) == "a" * 60 + "..."
    assert shortened([1, "\x1b"]) == "[1, '\\x1b']"


def test_the_name_that_was_meant_is_found_and_no_time_is_lost_on_what_is_no_name() -> None:
    known = ["seed", "seq_length", "save"]
    assert nearest("sead", known) == ["seed"] and nearest("s" * 10_000, known) == []
    assert suggestion("seq_lenght", known) == "did you mean seq_length?"
    assert suggestion("xyzzy", known, "known: seed") == "known: seed"
    assert suggestion("sed", known, likeness=0.4, most=2).count(",") == 1


def test_rows_become_columns() -> None:
    rows = [("name", "size", "note"), ("a", "10", ""), ("long name", "3", "x")]
    assert align(rows, (0, 2)) == ["name       size  note", "a            10", "long name     3  x"]
