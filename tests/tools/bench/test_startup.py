"""What a start imports, and how its seconds are told apart."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tools.bench import startup
from tools.bench.startup import ROOT, Start, clock_environment, write_run

# torch's compiler, and what else takes a second of a start that has no use for it.
UNUSED = ("torch._dynamo", "torch._inductor", "sympy", "setuptools", "transformers", "lm_eval")


@pytest.mark.launches
def test_a_run_that_compiles_nothing_imports_no_compiler(tmp_path: Path) -> None:
    run, clock = write_run(tmp_path), tmp_path / "imports.txt"
    environment = clock_environment(clock, ["torch", "deepspeed", *UNUSED])
    command = [sys.executable, "train.py", str(run)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "iteration 1/1" in done.stdout, done.stdout + done.stderr
    assert {line.split()[1] for line in clock.read_text().splitlines()} == {"torch", "deepspeed"}


def test_the_rest_is_what_imports_leave() -> None:
    imports = [
        startup._Import("1", "torch", 1.5, 3.5, 1.0),
        startup._Import("1", "deepspeed", 1.0, 4.0, 1.25),  # torch is imported inside
        startup._Import("2", "torch", 2.0, 3.0, 0.5),
    ]
    found = startup._parts(imports, 10.0, lambda i: i.end - i.begin)
    assert found == {"torch": 3.0, "deepspeed": 1.0, "rest": 6.0, "total": 10.0}
    assert startup._parts(imports, 4.0, lambda i: i.processor)["deepspeed"] == 0.25


def test_checkouts_are_compared_part_by_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def start(checkout: Path, words: tuple[str, ...], run: Path) -> Start:
        rest = 1.0 if checkout == ROOT else 4.0
        parts: dict[str, Any] = {"torch": 2.0, "deepspeed": 1.0, "rest": rest, "total": 3.0 + rest}
        return Start(parts, {name: value / 2 for name, value in parts.items()})

    (tmp_path / "train.py").touch()
    monkeypatch.setattr(startup, "start", start)
    arguments = ["--against", str(tmp_path), "--rounds", "2", "--json", str(tmp_path / "x.json")]
    monkeypatch.setattr(sys, "argv", ["startup", *arguments])
    assert startup.main() == 0
    found = json.loads((tmp_path / "x.json").read_text())["tables"]
    assert found["train.py, rest, elapsed"]["here"]["ratio"] == 0.25
    assert found["deepy.py, total, processor"]["there"]["seconds"] == [3.5, 3.5]
    assert capsys.readouterr().out.count("rest ") == 2
