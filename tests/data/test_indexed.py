from __future__ import annotations

import gc
import pickle
from pathlib import Path

import numpy as np
import pytest
from data_helpers import CORPUS, write_corpus

from megatron.data import IndexedDataset, IndexedDatasetBuilder
from megatron.data.indexed import best_dtype
from megatron.errors import UserError


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
    with pytest.raises(UserError, match=r"file/x\.bin: cannot be written"):
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
    [(0, 0, "magic"), (9, 2, "version 2"), (17, 7, "dtype code 7"), (18, 200, "truncated"), (34, 4, "describes")],
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
