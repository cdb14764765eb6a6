"""The benchmark of image decoding is whole at toy size."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from megatron.data.decode import decode
from tools.bench import images


def test_everything_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--images", "2", "--width", "40", "--height", "30", "--size", "16", "--rounds", "1"]
    monkeypatch.setattr(sys, "argv", ["images", *flags, "--json", str(tmp_path / "x.json")])
    assert images.main() == 0
    found = json.loads((tmp_path / "x.json").read_text())["tables"]["measured"]
    assert len(found) == 5 and all(each["facts"]["images_per_second"] > 0 for each in found.values())
    assert "cores for 10,000 a second" in capsys.readouterr().out


def test_its_images_have_the_size_of_photographs() -> None:
    content = images.photograph(1, 500, 375)
    assert decode(content).size == (500, 375) and 90_000 < len(content) < 130_000
