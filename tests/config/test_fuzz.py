"""Mutated configurations: each is taken or refused in lines, without a traceback and in no time.

SOAK_SEED makes the examples random and SOAK_EXAMPLES their number; `make soak` sets both.
"""

from __future__ import annotations

import json
import os
import signal
import string
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from megatron.config import RunConfig, explain, load_config, resolve_config
from megatron.config.build import SECTION_OF
from megatron.config.checks import find_training_mistakes
from megatron.config.load import known_keys
from megatron.errors import UserError, UserErrors
from megatron.launch.command import check_world
from megatron.launch.hosts import find_hosts
from tests.conftest import TINY

SOAK_SEED = os.environ.get("SOAK_SEED")
EXAMPLES = int(os.environ.get("SOAK_EXAMPLES", "300"))
SECONDS = 20
ROOT = Path(__file__).parents[2]
PUBLISHED = json.loads((ROOT / "tests/fixtures/config/published_yamls.json").read_text())
BASES = [{**TINY, "data_path": "a", "save": "b"}, *(e["values"] for e in PUBLISHED if "with" not in e)]
KEYS = sorted({*known_keys(), *(k for table in ("fp16", "optimizer", "zero_optimization") for k in known_keys(table))})

ODD_TEXT = [
    "010", "1:30", "2026-13-45", "~", "~/a", "$HOME/a", "$NOWHERE", "<<", "=", "&a [*a]", "*a", "!!int x", "!!set {a}",
    "!!python/name:os.system", "[" * 50, "{a: " * 40, "9" * 5000, "1e999", ".nan", "-.inf", "0x", "1_000", "yes", "'",
    '"\\0"', '"\\ud800"', "a" * 300, "- 1", "? a", "%TAG", "\x07", "\ufeff", "---", "...", "|", "{}", "[]", "@", "`",
]  # fmt: skip
ODD_VALUES = [
    None, True, False, 0, -1, 1, 2**31, 2**32, 2**63, -(2**64), 10**30, 10**9, 0.5, -0.5, 1e30, 1e39, 1e-45,
    float("inf"), float("nan"), "", "a", "auto", "all", "0", "1e-3", "a" * 300, "a\0b", "\ud800", "/", ".", "/dev/null",
    "/proc/self/mem", [], [1], [[]], [["a"]], [[["global"], 2]], [[["tokenformer"], "all"]], ["a", "b"], [-1], [0.9, 2],
    {}, {"a": 1}, {"enabled": True}, {"stage": 3}, {"type": "Lion"}, {"params": {"lr": 1}}, {1: 2}, {"device": "cpu"},
    [{"at_iteration": 3, "ffn_slot_num": 80}], [{}], [{1: 2}], b"bytes",
]  # fmt: skip

scalars = st.one_of(
    st.sampled_from(ODD_VALUES), st.integers(), st.floats(), st.text(max_size=20), st.integers(-3, 70), st.booleans()
)
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
)
misspelt = st.builds(
    lambda key, place, letter: key[: place % len(key)] + letter + key[place % len(key) + 1 :],
    st.sampled_from(KEYS), st.integers(0, 40), st.sampled_from(["", "_", "-", ".", *string.ascii_lowercase[:4]]),
)  # fmt: skip
keys = st.one_of(st.sampled_from(KEYS), st.sampled_from(KEYS), misspelt, st.text(max_size=12))
changes = st.lists(st.tuples(keys, values), min_size=1, max_size=4)
edits = st.lists(st.tuples(st.integers(0, 5000), st.integers(0, 30), st.sampled_from(["", *ODD_TEXT])), max_size=3)


def as_yaml(base: dict[str, Any], changed: list[tuple[str, Any]], edited: list[tuple[int, int, str]]) -> str:
    """A base with values put in the place of its own, and then pieces of its text with others."""
    text = yaml.dump({**base, **dict(changed)}, allow_unicode=True)
    for place, length, piece in edited:
        place %= len(text)
        text = text[:place] + piece + text[place + length :]
    return text


@contextmanager
def no_hang() -> Iterator[None]:
    """Fails after SECONDS, wherever Python is."""

    def fail(number: int, frame: Any) -> None:
        raise AssertionError(f"still busy after {SECONDS} s")

    before = signal.signal(signal.SIGALRM, fail)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def fuzzed(*strategies: Any, examples: int = EXAMPLES) -> Callable[[Any], Any]:
    """hypothesis' given(), the same examples every time unless SOAK_SEED asks for others."""

    def decorate(function: Any) -> Any:
        found = given(*strategies)(function)
        found = seed(int(SOAK_SEED))(found) if SOAK_SEED else found
        checks = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.data_too_large]
        return settings(
            max_examples=examples, derandomize=SOAK_SEED is None, deadline=None, database=None,
            suppress_health_check=checks,
        )(found)  # fmt: skip

    return decorate


def check_lines(error: UserError) -> None:
    """The mistakes are lines that a person can read."""
    lines = error.lines if isinstance(error, UserErrors) else [" ".join(str(error).split())]
    for line in lines:
        assert line.strip() and "\n" not in line and len(line) < 1200, line


@pytest.mark.long
@fuzzed(st.sampled_from(BASES), changes, edits)
def test_a_mutated_configuration_is_taken_or_refused_in_lines(
    tmp_path_factory: pytest.TempPathFactory,
    base: dict[str, Any],
    changed: list[tuple[str, Any]],
    edited: list[tuple[int, int, str]],
) -> None:
    file = tmp_path_factory.getbasetemp() / "fuzz.yml"
    file.write_text(as_yaml(base, changed, edited), encoding="utf-8", errors="surrogatepass")
    with no_hang():
        try:
            resolved = resolve_config(file, checks=(find_training_mistakes,))
        except UserError as error:
            check_lines(error)
            return
        use(resolved.config)
        assert explain(resolved).count("\n") >= len(SECTION_OF)
        assert [line for line in resolved.warnings if "\n" in line] == []


def use(config: RunConfig) -> None:
    """What is done with a configuration before a run starts: it is written down, read again, and launched."""
    written = yaml.safe_dump(config.flat())
    assert load_config([], yaml.safe_load(written)).flat() == config.flat()
    for step in (
        lambda: config.with_vocabulary(50257),
        lambda: config.update_size(8),
        lambda: check_world(config, "train.py", len(find_hosts(config.launch, {})) or 1),
    ):
        try:
            step()
        except UserError as error:
            check_lines(error)


words = st.lists(
    st.one_of(
        st.builds(lambda key, value: f"--set={key}={value}", keys, st.one_of(st.sampled_from(ODD_TEXT), st.text())),
        st.builds(
            lambda flag, value: f"--{flag}={value}",
            st.sampled_from(["iteration", "eval_batch_size", "limit", "num_gpus", "load", "gpus", "eval_tasks"]),
            st.one_of(st.sampled_from(ODD_TEXT), st.integers().map(str), st.text()),
        ),
        st.text(),
    ),
    max_size=4,
)


@fuzzed(words, examples=EXAMPLES // 3)
def test_a_mutated_command_line_is_taken_or_refused_in_lines(words: list[str]) -> None:
    from megatron.config.cli import parse_run

    with no_hang():
        try:
            parse_run([str(ROOT / "configs/demo.yml"), *words], "eval.py")
        except UserError as error:
            check_lines(error)
        except SystemExit as stop:
            assert stop.code == 0, "--help and --explain"
