"""What tests of prepared data share."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron.errors import run_command
from prepare_data import main
from tests.data.image_files import Prepare


@pytest.fixture
def prepare(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Prepare:
    """Runs prepare_data.py for the data set `x` into tmp_path/out; gives its exit code and what it printed."""

    def run(*flags: str | Path) -> tuple[int, str]:
        words = ["x", "-d", str(tmp_path / "out"), "-t", "CharLevelTokenizer", "--num-workers", "1", *map(str, flags)]
        capsys.readouterr()
        code = run_command(lambda: main(words))
        printed = capsys.readouterr()
        return code, printed.out + printed.err

    return run
