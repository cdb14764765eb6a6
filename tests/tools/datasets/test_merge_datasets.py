"""The tool that joins pairs, with GPT-NeoX's flags; and the corpus that is prepared where none is named."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron.data import IndexedDataset, IndexedDatasetBuilder, preprocess
from megatron.errors import UserError, run_command
from tools.datasets.merge_datasets import main


def write(prefix: Path, documents: list[list[int]], dtype: str = "uint16") -> str:
    with IndexedDatasetBuilder(prefix, dtype) as builder:
        for document in documents:
            builder.add_document(document)
        builder.finalize()
    return str(prefix)


def contents(prefix: Path) -> list[list[int]]:
    return [document.tolist() for document in IndexedDataset(prefix)]


def test_the_pairs_of_a_folder_are_joined_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "parts").mkdir()
    write(tmp_path / "parts" / "b", [[3, 4]])
    write(tmp_path / "parts" / "a", [[1], [2, 2]])
    main(["--input", str(tmp_path / "parts"), "--output-prefix", str(tmp_path / "all")])
    assert contents(tmp_path / "all") == [[1], [2, 2], [3, 4]]
    assert capsys.readouterr().out == f"wrote 3 documents of 2 pairs to {tmp_path / 'all'}\n"


def test_pairs_are_joined_in_the_order_that_is_given(tmp_path: Path) -> None:
    first, second = write(tmp_path / "b", [[3, 4]]), write(tmp_path / "a", [[1]])
    main(["--input", first, f"{second}.bin", "--output-prefix", str(tmp_path / "all")])
    assert contents(tmp_path / "all") == [[3, 4], [1]]


def test_mistakes_are_one_line_and_leave_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    narrow, wide = write(tmp_path / "narrow", [[1]]), write(tmp_path / "wide", [[1]], "int32")
    for inputs, message in (
        ([str(tmp_path / "empty")], "has no .idx file"),
        ([str(tmp_path / "absent")], "no such file"),
        ([narrow, wide], "holds int32, cannot be merged into uint16 files"),
    ):
        arguments = ["--input", *inputs, "--output-prefix", str(tmp_path / "all")]
        assert run_command(lambda arguments=arguments: main(arguments)) == 2  # type: ignore[misc]
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and message in error
        assert not list(tmp_path.glob("all*"))


def test_without_a_name_enwik8_is_prepared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import prepare_data

    asked: list[str] = []

    def fetch(name: str, *arguments: object) -> list[str]:
        asked.append(name)
        raise UserError("no network here")

    monkeypatch.setattr(preprocess, "fetch_corpus", fetch)
    assert run_command(lambda: prepare_data.main(["-d", str(tmp_path), "-t", "CharLevelTokenizer"])) == 2
    assert asked == ["enwik8"]
