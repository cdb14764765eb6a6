"""Random splits, segments drawn anywhere, a text divided by bytes, OpenWebText's archives."""

from __future__ import annotations

import hashlib
import io
import lzma
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import prepare_data
from megatron.config import load_config
from megatron.config.sections.data import DataConfig
from megatron.data import IndexedDataset
from megatron.data.datasets import build_datasets
from megatron.data.random_split import drawn_documents
from megatron.data.segments import RandomSegments
from megatron.data.text import read_documents
from megatron.errors import UserError
from tests.data.counting_corpora import write_corpus
from tests.growth.grown_runs import MakeConfig, metric, run, tensors

SIZES = [5, 0, 1, 30, 4, 17, 9, 2, 40, 8] * 10


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> IndexedDataset:
    return write_corpus(tmp_path_factory.mktemp("corpus") / "c", SIZES)


def data(corpus: IndexedDataset, **keys: Any) -> DataConfig:
    return DataConfig(**{"data_path": corpus.prefix, "split": "90,5,5", "random_split": True, **keys})


def test_a_random_split_is_disjoint_complete_and_the_same_everywhere(corpus: IndexedDataset, tmp_path: Path) -> None:
    parts = drawn_documents(corpus, "90,5,5", 7, tmp_path)
    assert [len(part) for part in parts] == [90, 5, 5] and all((np.diff(part) > 0).all() for part in parts)
    assert sorted(np.concatenate(parts).tolist()) == list(range(100))
    # The documents that any machine holds out: numpy's frozen generator.
    assert hashlib.sha256(parts[0].astype("<i4").tobytes()).hexdigest()[:16] == EXPECTED
    again = drawn_documents(corpus, "90,5,5", 7, tmp_path)
    assert all(np.array_equal(*pair) for pair in zip(parts, again, strict=True))
    stored = sorted(path.name for path in tmp_path.glob("c_split_*.npy"))
    assert [name.rpartition("_")[2] for name in stored] == ["test.npy", "train.npy", "valid.npy"]
    assert not np.array_equal(parts[1], drawn_documents(corpus, "90,5,5", 8, tmp_path)[1])


EXPECTED = "0e34da0503327913"


def test_each_set_reads_its_own_documents(corpus: IndexedDataset, tmp_path: Path) -> None:
    parts = drawn_documents(corpus, "90,5,5", 1234, tmp_path)
    for order in ("documents", "random_segments"):
        sets = build_datasets(data(corpus, sample_order=order, data_cache_dir=str(tmp_path)), 8, 3, [200, 4, 4])
        for found, documents in zip((sets.train, sets.valid, sets.test), parts, strict=True):
            read = {origin["index"] for k in range(len(found)) for origin in found.origins(k)}
            # Of a document a sample may have no token, and the last token of an epoch is only ever a label.
            assert read <= set(documents.tolist())
    counts = {"documents": {"train/0", "valid/0", "test/0"}, "random_segments": {"valid/0", "test/0"}}
    assert set(sets.epoch_blocks) == counts["random_segments"]


def test_a_segment_begins_anywhere_and_goes_over_documents(corpus: IndexedDataset) -> None:
    segments = RandomSegments(corpus, 8, 3, 3000, documents=np.arange(3, 60))
    text = np.concatenate([corpus[i] for i in range(3, 60)])
    begins = []
    for k in range(len(segments)):
        sample = segments[k]
        read = [corpus.get(o["index"], o["offset"], o["length"]) for o in segments.origins(k)]
        assert sample.shape == (9,) and sample.dtype == np.int64 and np.array_equal(np.concatenate(read), sample)
        begins.append(int(sample[0] - text[0]))
        assert np.array_equal(text[begins[-1] : begins[-1] + 9], sample), "tokens of this corpus count up"
    starts = len(text) - 8
    assert min(begins) == 0 and max(begins) == starts - 1
    counts = np.bincount(np.array(begins) * 10 // starts, minlength=10)
    assert abs(counts - 300).max() < 4 * 300**0.5, "uniform"


def test_a_longer_run_begins_with_the_same_segments(corpus: IndexedDataset) -> None:
    short, long = RandomSegments(corpus, 8, 3, 20), RandomSegments(corpus, 8, 3, 1 << 40)
    assert all(np.array_equal(short[k], long[k]) for k in range(20)) and len(long) == 1 << 40
    other = RandomSegments(corpus, 8, 4, 20), RandomSegments(corpus, 8, 3, 20, part=1)
    assert all(any(not np.array_equal(short[k], o[k]) for k in range(20)) for o in other)
    with pytest.raises(IndexError, match="sample 20 of 20"):
        short[20]
    with pytest.raises(UserError, match="tokens are no segment of seq_length 5000"):
        RandomSegments(corpus, 5000, 3, 1)


@pytest.mark.usefixtures("single_process")
def test_a_run_over_segments_resumes_bit_for_bit_with_any_workers(tiny_config: MakeConfig, tmp_path: Path) -> None:
    keys = {
        "sample_order": "random_segments",
        "random_split": True,
        "train_iters": 6,
        "data_cache_dir": str(tmp_path / "c"),
    }
    run(tiny_config, tmp_path / "whole", **keys)
    run(tiny_config, tmp_path / "parts", **keys, exit_interval=4)
    run(tiny_config, tmp_path / "parts", **keys, num_workers=2)
    assert metric(tmp_path / "parts") == metric(tmp_path / "whole")
    whole, parts = tensors(tmp_path / "whole"), tensors(tmp_path / "parts")
    assert all((whole[name] == parts[name]).all() for name in whole)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            {"random_split": True, "data_path": None, "train_data_paths": ["a"]},
            "random_split: divides the documents of",
        ),
        ({"sample_order": "shuffled"}, "sample_order: .*random_segments"),
        ({"split_seed": -1}, "split_seed"),
    ],
)
def test_mistakes_are_one_line(keys: dict[str, Any], message: str, tokenizer_file: Path) -> None:
    with pytest.raises(UserError, match=message):
        load_config([], {"vocab_file": str(tokenizer_file), "num_layers": 1, "hidden_size": 8, "num_attention_heads": 1,
                         "seq_length": 8, "data_path": "a", **keys})  # fmt: skip


def test_a_text_is_divided_by_bytes_at_characters(tmp_path: Path) -> None:
    text = "aé" * 40  # three bytes each
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    arguments = ["wiki", "--input", str(tmp_path / "text.txt"), "-d", str(tmp_path), "-t", "CharLevelTokenizer"]
    prepare_data.main([*arguments, "--split-bytes", "89", "19", "12"])
    sizes = [
        len(IndexedDataset(tmp_path / f"wiki_{p}/wiki_{p}_text_document")[0]) - 1 for p in ("train", "valid", "test")
    ]
    assert sizes == [88, 20, 12], "byte 89 is within a character, which goes to the next part"
    for given, message in [
        (["100", "100"], "200 bytes are asked for, .*text.txt has 120"),
        (["5"], "give bytes of two or three parts"),
        (["5", "0"], "give bytes of two or three parts"),
        (["1", "1", "1"], "has no whole character in the bytes of valid; give it more"),
    ]:
        with pytest.raises(UserError, match=message):
            prepare_data.main(["mistake", *arguments[1:], "--split-bytes", *given])
    assert not (tmp_path / "mistake").exists()
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n')
    with pytest.raises(UserError, match="--split-bytes: divides one .txt file"):
        prepare_data.main([*arguments[:2], str(tmp_path / "a.jsonl"), *arguments[3:], "--split-bytes", "1", "1"])
    with pytest.raises(UserError, match="--split-bytes: divides one .txt file"):  # before 13 GB are downloaded
        prepare_data.main(["openwebtext", *arguments[3:], "--split-bytes", "1", "1"])
    with pytest.raises(UserError, match="vocab_file"):  # before parts are written
        prepare_data.main(["new", *arguments[1:5], "--split-bytes", "1", "1", "-t", "HFTokenizer"])
    assert not (tmp_path / "new").exists()


def tarred(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def test_openwebtexts_archives_are_read_as_datasets_reads_them(tmp_path: Path) -> None:
    inner = lzma.compress(
        tarred({"0001.txt": b"\n\n one\n\n\n\ntwo\n\nthree \n", "note.md": b"no", "0002.txt": "é".encode()})
    )
    broken = lzma.compress(tarred({"0003.txt": b"\xff"}))
    path = tmp_path / "urlsf_subset00.tar"
    path.write_bytes(tarred({"openwebtext/a_data.xz": inner, "README": b"no", "openwebtext/b_data.xz": broken}))
    documents = list(read_documents([str(path)]))
    assert [d.content for d in documents] == [b"one\n\ntwo\n\nthree", "é".encode(), b"\xff"]
    assert documents[1].path == f"{path}/openwebtext/a_data.xz/0002.txt" and not documents[1].is_json
    path.write_bytes(tarred({"openwebtext/a_data.xz": inner[:-20]}))
    with pytest.raises(UserError, match=r"urlsf_subset00\.tar: cannot be read .* damaged or incomplete"):
        list(read_documents([str(path)]))
