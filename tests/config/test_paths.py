"""Paths in configurations: ~ and environment variables, and names that no file system takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron.config import load_config, resolve_config
from megatron.config.build import SECTION_OF
from megatron.config.cli import parse_run
from megatron.config.paths import PATH_KEYS
from megatron.errors import UserError

MINIMUM: dict[str, Any] = {"num_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "seq_length": 32}


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("SCRATCH", "/scratch/me")
    monkeypatch.setenv("EMPTY", "")
    monkeypatch.delenv("NOWHERE", raising=False)


def values(key: str, written: str) -> Any:
    """What a path key holds after `written` was given for it."""
    given: Any = [written, written] if key.endswith("_paths") else written
    config = load_config([], {**MINIMUM, key: given})
    return getattr(getattr(config, SECTION_OF[key]), key)


@pytest.mark.parametrize("key", sorted(PATH_KEYS))
def test_home_and_variables_are_replaced(tmp_path: Path, key: str) -> None:
    for written, path in (
        ("~/runs/a", f"{tmp_path}/runs/a"),
        ("~", str(tmp_path)),
        ("$HOME/a", f"{tmp_path}/a"),
        ("${SCRATCH}_b/$SCRATCH", "/scratch/me_b//scratch/me"),
        ("a~/b$", "a~/b$"),
    ):
        assert values(key, written) == ([path, path] if key.endswith("_paths") else path)


@pytest.mark.parametrize("key", ["save", "train_data_paths", "eval_results_prefix"])
@pytest.mark.parametrize(
    ("written", "message"),
    [
        ("$NOWHERE/a", "$NOWHERE in '$NOWHERE/a' is not set in the environment; export it, or write the path"),
        ("$EMPTY/a", "$EMPTY in '$EMPTY/a' is not set in the environment"),
        ("${}/a", "${} in '${}/a' is not set in the environment"),
        ("~nobody_here/a", "~nobody_here in '~nobody_here/a' is no user's home folder here; write the whole path"),
        ("a/" + "n" * 300, "has a name of 300 bytes; file systems take at most 255"),
        ("a/" * 2100, "has 4200 bytes; paths have at most 4095"),
        ("a\0b", "the path has a NUL in it"),
        ("\0", "the path has a NUL in it"),
        ("~\0", "the path has a NUL in it"),
    ],
)
def test_what_no_path_can_be_is_one_line(key: str, written: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        values(key, written)
    assert str(error.value).startswith(f"override: {key}: ") and message in str(error.value)
    assert "\n" not in str(error.value) and "\0" not in str(error.value)


@pytest.mark.parametrize("key", sorted(PATH_KEYS - {"eval_results_prefix"}))
def test_an_empty_path_is_refused(key: str) -> None:
    with pytest.raises(UserError, match=f"{key}: '' is no path; give one, or null for none"):
        values(key, "")


def test_files_flags_and_includes_are_expanded_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "base.yml").write_text("".join(f"{key}: {value}\n" for key, value in MINIMUM.items()))
    (tmp_path / "a.yml").write_text("include: $HOME/base.yml\nsave: ~/runs\n")
    (tmp_path / "b.yml").write_text("include: [~/a.yml]\n")
    resolved = resolve_config(tmp_path / "b.yml")
    assert resolved.config.checkpoint.save == f"{tmp_path}/runs"
    assert resolved.settings["save"].source == f"{tmp_path}/a.yml:2"
    config, _ = parse_run([str(tmp_path / "a.yml"), "--save=~/other", "-i", "$SCRATCH/p.txt"], "eval.py")
    assert (config.checkpoint.save, config.generation.sample_input_file) == (f"{tmp_path}/other", "/scratch/me/p.txt")
    (tmp_path / "c.yml").write_text("include: $NOWHERE/base.yml\n")
    with pytest.raises(UserError, match=r"c\.yml:1: include: \$NOWHERE in"):
        load_config(tmp_path / "c.yml")


def test_names_of_files_that_cannot_be_are_one_line() -> None:
    for name in ("n" * 300, "a\0b", "n" * 5000):
        with pytest.raises(UserError, match="config file '.*' not found"):
            load_config(name)
