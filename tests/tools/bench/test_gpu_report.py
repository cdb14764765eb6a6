"""tools/bench/gpu_report.py: whole at toy size, so that it runs the first time a GPU is there."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from megatron.planner import read_machine
from tests import forked
from tools.bench import gpu_report
from tools.bench.gpu_report import BENCHES, MFU, Bench, main, mfu_table, run_bench
from tools.gpu.running import Settings

ROOT = Path(__file__).parents[3]


@pytest.mark.launches
@pytest.mark.processes
@pytest.mark.timeout(900)
def test_the_whole_report_runs_on_a_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu_report, "subprocess", forked)  # of starting them, the next test has some
    assert main(["--toy", "--minutes", "14", "--output", str(tmp_path)]) == 0, capsys.readouterr().out
    found = json.loads((tmp_path / "report.json").read_text())
    assert found["ok"] and {row["part"] for row in found["rows"]} == {entry.name for entry in (*BENCHES, *MFU)}
    lines = found["settings"]["mfu"]
    assert len(lines) == 8 and all(line["mfu"] > 0 and line["predicted_mfu"] > 0 for line in lines)
    assert read_machine(str(tmp_path / "machine.yml")).peak_flops > 0
    text = (tmp_path / "report.md").read_text()
    assert "| 1-5B transformer |" in text and all(f"## {bench.name}" in text for bench in BENCHES)
    for bench in BENCHES:
        assert (tmp_path / f"{bench.name}.json").exists() == bench.writes_json


@pytest.mark.launches
def test_what_fails_is_a_row(tmp_path: Path) -> None:
    settings = Settings("cpu", str(tmp_path), toy=True)
    row = run_bench(Bench("measure_nothing", "", "", 5), settings, left=60)
    assert row.status == "failed" and row.figure.startswith("ended with 1: ") and "measure_nothing" in row.figure
    row = run_bench(Bench("machine", "", f"{tmp_path}/machine.yml", 5, writes_json=False), settings, left=0.5)
    assert row.status == "failed" and row.figure.startswith("no end within ")


@pytest.mark.launches
def test_mistakes_are_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [sys.executable, "tools/bench/gpu_report.py", "--only", "stop", "--output", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: --only: unknown 'stop'; choose from machine, mfu_150m")
    monkeypatch.setattr("tools.bench.gpu_report.missing", lambda: ["pydantic"])
    assert main(["--output", str(tmp_path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_the_table_has_measured_and_planned() -> None:
    line: dict[str, float | str] = {"size": "150M", "model": "tokenformer", "samples": 16}
    line |= {"tokens_per_second": 470_000.4, "mfu": 0.4912, "predicted_mfu": 0.5}
    assert mfu_table([line]).splitlines()[-1] == "| 150M tokenformer | 16 | 470,000 | 49.1% | 50.0% |"
