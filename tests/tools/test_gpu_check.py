"""tools/gpu_check.py: whole on a CPU at toy size, parts that break off, mistakes, packages brought along."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tools.gpu import wheels
from tools.gpu.parts import PARTS, select
from tools.gpu.report import summary, table, write_json
from tools.gpu.running import Part, Row, Settings, run_part
from tools.gpu_check import main

ROOT = Path(__file__).parents[2]
FAULTY = "tests.tools.faulty_parts"
SKIPPED_ON_CPU = {"flash_attention", "memory"}


@pytest.mark.launches
def test_the_whole_check_runs_on_a_cpu(tmp_path: Path) -> None:
    command = [sys.executable, "tools/gpu_check.py", "--device", "cpu", "--json", str(tmp_path / "check.json")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Traceback" not in done.stderr and "0 FAILED" in done.stdout
    found = json.loads((tmp_path / "check.json").read_text())
    assert found["ok"] and found["settings"]["parts"] == [part.name for part in PARTS]
    by_part = {part.name: [row for row in found["rows"] if row["part"] == part.name] for part in PARTS}
    assert all(by_part.values()), "every part reports something"
    assert {name for name, rows in by_part.items() if not any(r["status"] == "ok" for r in rows)} == SKIPPED_ON_CPU
    assert len(by_part["precision"]) == 4 and len(by_part["two_ranks"]) == 4 and len(by_part["resume"]) == 3


@pytest.mark.launches
@pytest.mark.parametrize(
    ("name", "seconds", "world", "expected"),
    [
        ("crashes", 60, 1, [("ok", "fine"), ("failed", "ended with exit code 139")]),
        ("hangs", 3, 1, [("ok", "fine"), ("failed", "no answer within 3 s")]),
        ("raises", 60, 1, [("failed", "too far off"), ("failed", "ValueError: two lines")]),
        ("cannot", 60, 1, [("skipped", "needs a GPU")]),
        ("one_rank_hangs", 3, 2, [("ok", "done"), ("failed", "no answer within 3 s")]),
        ("not_there", 60, 1, [("failed", "AttributeError: module")]),
    ],
)
def test_a_part_that_breaks_off_is_a_row(
    tmp_path: Path, name: str, seconds: float, world: int, expected: list[tuple[str, str]]
) -> None:
    rows = list(run_part(Part(name, FAULTY, seconds, world), Settings("cpu", str(tmp_path), toy=True)))
    assert [row.status for row in rows] == [status for status, _ in expected]
    assert all(row.figure.startswith(text) for row, (_, text) in zip(rows, expected, strict=True)), rows


def test_a_failure_is_the_exit_code_and_the_json_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    parts = (Part("crashes", FAULTY, 60), Part("cannot", FAULTY, 60))
    monkeypatch.setattr("tools.gpu_check.select", lambda names: parts)
    assert main(["--device", "cpu", "--json", str(tmp_path / "check.json")]) == 1
    found = json.loads((tmp_path / "check.json").read_text())
    assert not found["ok"] and [row["status"] for row in found["rows"]] == ["ok", "failed", "skipped"]
    assert "1 ok, 1 FAILED, 1 skipped" in capsys.readouterr().out


def test_parts_are_chosen_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert [part.name for part in select("growth,versions")] == ["growth", "versions"]
    assert main(["--parts", "groth"]) == 2
    assert "--parts: unknown 'groth'" in capsys.readouterr().err


def test_missing_packages_are_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("tools.gpu_check.missing", lambda: ["deepspeed", "hjson"])
    assert main(["--device", "cpu"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: missing: deepspeed, hjson; ") and error.count("\n") == 1 and "--wheels" in error


def test_wheels_bring_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel = tmp_path / "wheels" / "carried_along-1.0-py3-none-any.whl"
    wheel.parent.mkdir()
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("carried_along.py", "VALUE = 3\n")
        info = "carried_along-1.0.dist-info"
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: carried-along\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    monkeypatch.setattr(wheels, "PACKAGES", {"carried-along": "carried_along", "nowhere": "nowhere_to_be_found"})
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("PYTHONPATH", "elsewhere")
    assert wheels.missing() == ["carried-along", "nowhere"]
    assert wheels.bring(wheel.parent, tmp_path / "site") == ["nowhere"]
    assert os.environ["PYTHONPATH"] == f"{tmp_path / 'site'}{os.pathsep}elsewhere"
    import carried_along  # type: ignore[import-not-found]

    assert carried_along.VALUE == 3
    wheel.write_bytes(b"damaged")
    del sys.modules["carried_along"]
    sys.path.remove(str(tmp_path / "site"))
    with pytest.raises(RuntimeError, match="--wheels .*: pip says"):
        wheels.bring(wheel.parent, tmp_path / "other")


def test_pinned_versions_are_those_of_the_requirements() -> None:
    pins = wheels.pinned_versions()
    assert {"deepspeed", "tokenizers", "safetensors", "pydantic"} <= pins.keys() and "torch" in pins


def test_the_table_has_a_line_a_row(tmp_path: Path) -> None:
    rows = [Row("a", "one", "ok", "1"), Row("bb", "", "skipped", "no GPU"), Row("bb", "three", "failed", "3")]
    lines = table(rows).splitlines()
    assert len(lines) == 5 and lines[2].split() == ["a", "one", "ok", "1"] and "FAILED" in lines[4]
    assert summary(rows, 2.0) == "1 ok, 1 FAILED, 1 skipped in 2 s; look at: bb"
    write_json(tmp_path / "x.json", rows[:2], {})
    assert json.loads((tmp_path / "x.json").read_text())["ok"]
