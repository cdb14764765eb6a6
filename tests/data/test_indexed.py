from __future__ import annotations

import gc
import hashlib
import os
import pickle
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron.data import IndexedDataset, IndexedDatasetBuilder
from megatron.data.check import check_pair
from megatron.data.indexed import best_dtype
from megatron.errors import UserError
from tests.data.counting_corpora import CORPUS, write_corpus


@pytest.fixture
def pair(tmp_path: Path) -> Path:
    write_corpus(tmp_path / "small", [3, 0, 5])
    return tmp_path / "small"


def test_reads_the_official_corpus() -> None:
    corpus = IndexedDataset(CORPUS)
    assert (len(corpus), corpus.num_tokens, corpus.dtype) == (200, 39216, np.uint16)
    assert corpus.document_indices.tolist() == list(range(201))
    assert [len(corpus[i]) for i in range(5)] == [141, 101, 133, 32, 41]


def test_builder_writes_the_official_bytes(tmp_path: Path) -> None:
    corpus = IndexedDataset(CORPUS)
    with IndexedDatasetBuilder(tmp_path / "copy", np.uint16) as builder:
        for number in range(len(corpus)):
            builder.add_document(corpus[number].tolist())
        builder.finalize()
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"copy{suffix}").read_bytes() == CORPUS.with_suffix(suffix).read_bytes()


def test_get_cuts_a_document(pair: Path) -> None:
    corpus = IndexedDataset(pair)
    assert corpus.get(2, 1, 2).tolist() == [4, 5]
    assert corpus.get(2, 3).tolist() == [6, 7]
    assert corpus.get(2, 4, 9).tolist() == [7]
    assert corpus[1].tolist() == []
    with pytest.raises(IndexError):
        corpus.get(2, 6)
    with pytest.raises(IndexError):
        corpus[3]


def test_views_outlive_the_dataset(pair: Path) -> None:
    corpus = IndexedDataset(pair)
    view, sizes = corpus[2], corpus.sizes
    del corpus
    gc.collect()
    assert view.tolist() == [3, 4, 5, 6, 7] and sizes.tolist() == [3, 0, 5]


def test_pickles_without_its_tokens(pair: Path) -> None:
    data = pickle.dumps(IndexedDataset(CORPUS))
    assert len(data) < 500
    assert np.array_equal(pickle.loads(data)[7], IndexedDataset(CORPUS)[7])


def test_merging_keeps_document_boundaries(pair: Path, tmp_path: Path) -> None:
    with IndexedDatasetBuilder(tmp_path / "merged", np.uint16) as builder:
        builder.add_document([9])
        builder.add_index(pair)
        builder.finalize()
    merged = IndexedDataset(tmp_path / "merged")
    assert [merged[i].tolist() for i in range(len(merged))] == [[9], [0, 1, 2], [], [3, 4, 5, 6, 7]]
    assert merged.document_indices.tolist() == [0, 1, 2, 3, 4]


def test_merging_other_dtypes_is_refused(pair: Path, tmp_path: Path) -> None:
    with IndexedDatasetBuilder(tmp_path / "m", np.int32) as builder, pytest.raises(UserError, match="uint16.*int32"):
        builder.add_index(pair)


def test_an_abandoned_builder_leaves_nothing(tmp_path: Path) -> None:
    builder = IndexedDatasetBuilder(tmp_path / "a", np.uint16)
    builder.add_document([1])
    assert not (tmp_path / "a.bin").exists()
    del builder
    gc.collect()
    with pytest.raises(RuntimeError), IndexedDatasetBuilder(tmp_path / "b", np.uint16):
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_an_empty_corpus_can_be_read(tmp_path: Path) -> None:
    assert len(write_corpus(tmp_path / "none", [])) == 0


def test_best_dtype_follows_the_vocabulary() -> None:
    assert best_dtype(65499) is np.uint16 and best_dtype(65500) is np.int32


def test_an_id_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    with IndexedDatasetBuilder(tmp_path / "x", np.uint16) as builder, pytest.raises(UserError, match="70000.*uint16"):
        builder.add_document([70000])


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file/x\.bin cannot be written"):
        IndexedDatasetBuilder(tmp_path / "file" / "x", np.uint16)


def test_a_missing_file_is_named(pair: Path) -> None:
    pair.with_suffix(".bin").unlink()
    with pytest.raises(UserError, match=r"small\.bin: no such file.*without the suffix"):
        IndexedDataset(pair)


@pytest.mark.parametrize(
    ("cut", "message"), [(10, "truncated"), (40, "truncated"), (-1, "truncated"), (0, "truncated")]
)
def test_a_truncated_index_is_refused(pair: Path, cut: int, message: str) -> None:
    idx = pair.with_suffix(".idx")
    idx.write_bytes(idx.read_bytes()[:cut])
    with pytest.raises(UserError, match=rf"small\.idx: {message}.*prepare_data"):
        IndexedDataset(pair)


@pytest.mark.parametrize(
    ("position", "value", "message"),
    [
        (0, 0, "magic"),
        (9, 2, "version 2"),
        (17, 7, "dtype code 7"),
        (18, 200, "truncated"),
        (34, 4, "at sequence 1"),
    ],
)
def test_a_damaged_index_is_refused(pair: Path, position: int, value: int, message: str) -> None:
    idx = pair.with_suffix(".idx")
    content = bytearray(idx.read_bytes())
    content[position] = value
    idx.write_bytes(content)
    with pytest.raises(UserError, match=message):
        IndexedDataset(pair)


def test_an_index_of_another_corpus_is_refused(pair: Path) -> None:
    pair.with_suffix(".bin").write_bytes(b"\0" * 14)
    with pytest.raises(UserError, match=r"small\.bin: 14 bytes, but small\.idx describes 16"):
        IndexedDataset(pair)


HEADER = 34
SIZES, POINTERS, BOUNDARIES = HEADER, HEADER + 12, HEADER + 36  # of three sequences


def overwrite(path: Path, position: int, content: bytes) -> None:
    whole = bytearray(path.read_bytes())
    whole[position : position + len(content)] = content
    path.write_bytes(whole)


@pytest.mark.parametrize("has_checksums", [True, False])
@pytest.mark.parametrize(
    ("position", "content", "message"),
    [
        pytest.param(POINTERS + 8, struct.pack("<q", 4), "at sequence 1 of 3", id="a pointer into the one before"),
        pytest.param(POINTERS + 16, struct.pack("<q", -6), "at sequence 2 of 3", id="a negative pointer"),
        pytest.param(POINTERS, struct.pack("<q", 2), "at sequence 0 of 3", id="a first pointer that is not 0"),
        pytest.param(SIZES, struct.pack("<ii", 4, -1), "at sequence 1 of 3", id="sizes with the right sum"),
        pytest.param(SIZES + 8, struct.pack("<i", 4), "16 bytes, but small.idx describes 14", id="the last size"),
        pytest.param(BOUNDARIES, struct.pack("<q", 1), "document boundaries", id="documents that do not begin at 0"),
        pytest.param(BOUNDARIES + 8, struct.pack("<qq", 2, 1), "document boundaries", id="documents that go back"),
        pytest.param(BOUNDARIES + 24, struct.pack("<q", 2), "document boundaries", id="documents that end early"),
        pytest.param(18, struct.pack("<QQ", 1, 7), "damaged|describes|sequence", id="counts of the right size"),
        pytest.param(17, b"\x01", "at sequence 1 of 3", id="another type of another size"),
    ],
)
def test_what_does_not_follow_from_the_sizes_is_refused(
    pair: Path, position: int, content: bytes, message: str, has_checksums: bool
) -> None:
    if not has_checksums:
        pair.with_suffix(".sha256").unlink()
    overwrite(pair.with_suffix(".idx"), position, content)
    with pytest.raises(UserError, match=message):
        IndexedDataset(pair)


def test_a_type_of_the_same_size_is_told_by_the_checksum(pair: Path) -> None:
    overwrite(pair.with_suffix(".idx"), 17, b"\x03")
    with pytest.raises(UserError, match=r"small\.idx: damaged, its sha256 is not the one in small\.sha256"):
        IndexedDataset(pair)


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_trailing_bytes_are_refused(pair: Path, suffix: str) -> None:
    with pair.with_suffix(suffix).open("ab") as file:
        file.write(b"\0\0")
    with pytest.raises(UserError, match=rf"small\{suffix}: "):
        IndexedDataset(pair)


def test_data_that_gpt_neox_merged_has_a_document_a_sequence(pair: Path) -> None:
    pair.with_suffix(".sha256").unlink()
    idx = pair.with_suffix(".idx")
    idx.write_bytes(idx.read_bytes()[: BOUNDARIES + 8])
    overwrite(idx, 26, struct.pack("<Q", 1))
    assert IndexedDataset(pair).document_indices.tolist() == [0, 1, 2, 3]


def test_checksums_are_those_of_sha256sum(pair: Path) -> None:
    lines = [f"{hashlib.sha256(pair.with_suffix(s).read_bytes()).hexdigest()}  small{s}\n" for s in (".bin", ".idx")]
    assert pair.with_suffix(".sha256").read_text() == "".join(lines)


def test_a_flipped_token_is_found_on_request_and_when_merging(pair: Path, tmp_path: Path) -> None:
    assert check_pair(str(pair)).checksums == "hold"
    overwrite(pair.with_suffix(".bin"), 4, b"\7")
    IndexedDataset(pair)  # opening does not read the tokens
    with pytest.raises(UserError, match=r"small\.bin: damaged, its sha256"):
        check_pair(str(pair))
    with (
        IndexedDatasetBuilder(tmp_path / "m", np.uint16) as builder,
        pytest.raises(UserError, match="bin: damaged"),
    ):
        builder.add_index(pair)


def test_a_pair_of_another_tool_needs_no_checksums_and_can_get_them(pair: Path, tmp_path: Path) -> None:
    pair.with_suffix(".sha256").unlink()
    assert IndexedDataset(pair)[0].tolist() == [0, 1, 2] and check_pair(str(pair)).checksums == "not recorded"
    assert check_pair(str(pair), write=True).checksums == "written" and check_pair(str(pair)).checksums == "hold"
    for suffix in (".bin", ".idx", ".sha256"):
        pair.with_suffix(suffix).rename(tmp_path / f"renamed{suffix}")
    facts = check_pair(str(tmp_path / "renamed"))
    assert (facts.num_documents, facts.num_tokens, facts.highest_id, facts.checksums) == (3, 8, 7, "hold")
    write_corpus(pair, [2, 2])
    assert IndexedDataset(pair)[1].tolist() == [2, 3]


def test_another_file_of_that_name_is_named_and_does_not_stop(pair: Path, tmp_path: Path, capsys: Any) -> None:
    pair.with_suffix(".sha256").write_text("notes of mine\n")
    with IndexedDatasetBuilder(tmp_path / "m", np.uint16) as builder:
        builder.add_index(pair)
    assert "small.sha256: does not hold checksums as sha256sum writes them" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"small\.sha256: does not hold checksums"):
        check_pair(str(pair))
    assert pair.with_suffix(".sha256").read_text() == "notes of mine\n"


def test_negative_ids_are_found_on_request(tmp_path: Path) -> None:
    with IndexedDatasetBuilder(tmp_path / "n", np.int32) as builder:
        builder.add_document([3, -1])
        builder.finalize()
    with pytest.raises(UserError, match=r"n\.bin: holds the negative id -1"):
        check_pair(str(tmp_path / "n"))


@pytest.mark.launches
def test_the_check_tool_reads_every_pair_and_exits_2(pair: Path, tmp_path: Path) -> None:
    write_corpus(tmp_path / "bad", [3])
    overwrite(tmp_path / "bad.bin", 0, b"\7")
    command = [sys.executable, "tools/datasets/check_data.py", str(tmp_path / "bad"), str(pair)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert result.returncode == 2 and result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert result.stdout == f"{pair}: 3 documents, 8 tokens, ids 0 to 7 in uint16; checksums hold\n"


def test_a_file_without_permission_is_named(pair: Path) -> None:
    pair.with_suffix(".idx").chmod(0)
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)  # root reads everything
    try:
        with pytest.raises(UserError, match=r"small\.idx: cannot be read \(Permission denied\)"):
            IndexedDataset(pair)
    finally:
        os.seteuid(user)
