from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from megatron.data import GPTDataset, IndexedDataset
from megatron.data import index_cache as cache
from megatron.data.samples import count_samples, extend_epoch_blocks, split_documents
from megatron.errors import UserError
from tests.data.counting_corpora import CORPUS, FIXTURES, write_corpus

GOLDEN = np.load(FIXTURES / "data_golden.npz", allow_pickle=False)


@pytest.fixture
def log(package_log: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    return package_log


@pytest.mark.parametrize(("num_samples", "epochs"), [(500, 1), (2500, 5)])
def test_order_equals_the_official_one(num_samples: int, epochs: int) -> None:
    dataset = GPTDataset(IndexedDataset(CORPUS), 64, 1234, num_samples)
    for name in ("doc_idx", "sample_idx", "shuffle_idx"):
        expected = GOLDEN[f"seed1234_ns{num_samples}.{name}"]
        assert getattr(dataset, name).dtype == expected.dtype
        assert np.array_equal(getattr(dataset, name), expected)
    samples = GOLDEN[f"seed1234_ns{num_samples}.samples"]
    assert np.array_equal([dataset[i] for i in range(len(samples))], samples)
    assert dataset.epoch_blocks == [epochs]


def test_every_sample_can_be_read_and_has_its_length() -> None:
    dataset = GPTDataset(IndexedDataset(CORPUS), 64, 1234, 600)
    assert len(dataset) == 612
    assert all(dataset[i].shape == (65,) and dataset[i].dtype == np.int64 for i in range(612))
    with pytest.raises(IndexError):
        dataset[612]


def test_one_epoch_covers_every_token_once(tmp_path: Path) -> None:
    dataset = GPTDataset(write_corpus(tmp_path / "c", [5, 0, 1, 30, 5]), 4, 7, 1)
    inputs = np.concatenate([dataset[i][:-1] for i in range(len(dataset))])
    assert len(dataset) == 10 and len(set(inputs.tolist())) == 40


def test_origins_of_a_sample_are_its_tokens(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "c", [5, 0, 1, 30, 4, 5])
    dataset = GPTDataset(corpus, 4, 7, 20, epoch_blocks=[1])
    for number in range(len(dataset)):
        parts = dataset.origins(number)
        read = [corpus.get(part["index"], part["offset"], part["length"]) for part in parts]
        assert np.concatenate(read).tolist() == dataset[number].tolist()
        assert all(part["length"] > 0 and part["set"] == str(tmp_path / "c") for part in parts)
    assert {len(dataset.origins(number)) for number in range(len(dataset))} >= {1, 2, 3}


def test_an_extended_run_keeps_its_prefix() -> None:
    short = GPTDataset(IndexedDataset(CORPUS), 64, 1234, 500)
    longer = GPTDataset(IndexedDataset(CORPUS), 64, 1234, 1500, epoch_blocks=short.epoch_blocks)
    assert longer.epoch_blocks == [1, 2] and len(longer) == 612 + 1225
    assert all(np.array_equal(longer[i], short[i]) for i in range(len(short)))
    block = GPTDataset(IndexedDataset(CORPUS), 64, 1235, 1, epoch_blocks=[2])
    assert all(np.array_equal(longer[612 + i], block[i]) for i in range(len(block)))


def test_a_run_with_the_highest_seed_can_be_extended() -> None:
    dataset = GPTDataset(IndexedDataset(CORPUS), 64, 2**32 - 1, 700, epoch_blocks=[1])
    assert len(dataset[612]) == 65


def test_a_shorter_rest_appends_nothing() -> None:
    dataset = GPTDataset(IndexedDataset(CORPUS), 64, 1234, 600, epoch_blocks=[5])
    assert dataset.epoch_blocks == [5] and len(dataset) == 3063


def test_joined_indices_describe_the_samples() -> None:
    dataset = GPTDataset(IndexedDataset(CORPUS), 64, 1234, 700, epoch_blocks=[1])
    doc_idx, sample_idx, shuffle_idx = dataset.doc_idx, dataset.sample_idx, dataset.shuffle_idx
    assert len(shuffle_idx) == len(dataset) and len(doc_idx) == 400
    for i in (0, 611, 612, 1000):
        position, offset = sample_idx[shuffle_idx[i]]
        assert dataset.indexed[doc_idx[position]][offset] == dataset[i][0]


@pytest.mark.parametrize("missing", [1, 9, 10, 11, 100])
def test_a_block_has_as_few_epochs_as_suffice(missing: int) -> None:
    [epochs] = extend_epoch_blocks([], 41, 4, missing)
    assert count_samples(epochs, 41, 4) >= missing
    assert epochs == 1 or count_samples(epochs - 1, 41, 4) < missing


def test_too_few_tokens_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="hold 1 tokens, too few"):
        GPTDataset(write_corpus(tmp_path / "c", [1]), 4, 0, 1)


def cached(prefix: Path, **options: object) -> GPTDataset:
    return GPTDataset(IndexedDataset(prefix), 4, 7, 1, cache_min_samples=1, **options)


def test_cached_order_is_the_same_and_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_corpus(tmp_path / "c", [5, 9, 30])
    first = cached(tmp_path / "c")
    assert len(list(tmp_path.glob("c_*.npy"))) == 3 and not list(tmp_path.glob("*.part"))
    monkeypatch.setattr("megatron.data.samples.build_order", None)
    assert np.array_equal(cached(tmp_path / "c").sample_idx, first.sample_idx)
    assert np.array_equal(np.asarray(first.shuffle_idx), cached(tmp_path / "c").shuffle_idx)


@pytest.mark.parametrize("limit", [cache.WHOLE_FILE_LIMIT, 1])
def test_a_changed_corpus_does_not_use_a_stale_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    monkeypatch.setattr(cache, "WHOLE_FILE_LIMIT", limit)
    monkeypatch.setattr(cache, "_PROBE_BYTES", 8)
    write_corpus(tmp_path / "c", [5, 9, 30])
    cached(tmp_path / "c", cache_dir=tmp_path / "cache")
    write_corpus(tmp_path / "c", [30, 9, 5])
    fresh = GPTDataset(IndexedDataset(tmp_path / "c"), 4, 7, 1)
    again = cached(tmp_path / "c", cache_dir=tmp_path / "cache")
    assert np.array_equal(again.sample_idx, fresh.sample_idx)
    assert len(list((tmp_path / "cache").glob("*.npy"))) == 6


def test_a_damaged_cache_is_built_again_with_one_warning(tmp_path: Path, log: pytest.LogCaptureFixture) -> None:
    write_corpus(tmp_path / "c", [5, 9, 30])
    expected = np.array(cached(tmp_path / "c").shuffle_idx)
    [path] = tmp_path.glob("c_*_shuffle_idx.npy")
    path.write_bytes(path.read_bytes()[:-4])
    assert np.array_equal(cached(tmp_path / "c").shuffle_idx, expected)
    warnings = [record for record in log.records if record.levelno == logging.WARNING]
    assert len(warnings) == 1 and "damaged" in warnings[0].message
    assert np.array_equal(np.load(path), expected)


def test_an_unwritable_cache_is_not_used_with_one_warning(tmp_path: Path, log: pytest.LogCaptureFixture) -> None:
    write_corpus(tmp_path / "c", [5, 9, 30])
    (tmp_path / "file").write_text("")
    dataset = cached(tmp_path / "c", cache_dir=tmp_path / "file" / "cache")
    assert len(dataset) == 10
    assert [record.message.startswith("sample order kept in memory") for record in log.records] == [True]


def order_of(prefix: Path) -> list[list[int]]:
    dataset = cached(prefix)
    return [dataset[i].tolist() for i in range(len(dataset))]


def test_an_order_of_another_run_under_this_ones_names_is_not_used(tmp_path: Path) -> None:
    write_corpus(tmp_path / "c", [5, 9, 30])
    expected = order_of(tmp_path / "c")
    mine = sorted(tmp_path.glob("c_*"))
    other = tmp_path / "other"
    GPTDataset(IndexedDataset(tmp_path / "c"), 4, 8, 1, cache_min_samples=1, cache_dir=other)
    for path, source in zip(mine, sorted(other.iterdir()), strict=True):
        path.write_bytes(source.read_bytes())
    assert order_of(tmp_path / "c") == expected


@pytest.mark.parametrize("suffix", ["_doc_idx.npy", ".json", ".lock"])
@pytest.mark.parametrize("kind", ["link", "folder", "fifo"])
def test_something_else_named_like_an_order_file_is_not_followed_and_not_fatal(
    tmp_path: Path, kind: str, suffix: str
) -> None:
    write_corpus(tmp_path / "c", [5, 9, 30])
    expected = order_of(tmp_path / "c")
    [description] = tmp_path.glob("c_*.json")
    for path in tmp_path.glob("c_*"):
        path.unlink()
    path = description.with_name(description.stem + suffix)
    (tmp_path / "mine").write_text("keep")
    {"link": lambda: path.symlink_to("mine"), "folder": path.mkdir, "fifo": lambda: os.mkfifo(path)}[kind]()
    assert order_of(tmp_path / "c") == expected
    assert (tmp_path / "mine").read_text() == "keep" and (kind != "folder" or path.is_dir())


BUILD = """
import sys, time
from pathlib import Path
from megatron.data import GPTDataset, IndexedDataset
import megatron.data.index_cache as cache
save = cache.np.save
def slow(file, *rest, **options):
    save(file, *rest, **options); file.flush(); print("half", flush=True); time.sleep(60)
cache.np.save = slow
GPTDataset(IndexedDataset(sys.argv[1]), 4, 7, 1, cache_min_samples=1)
"""


@pytest.mark.launches
def test_builds_leave_no_locks_and_no_parts_even_where_one_was_killed(tmp_path: Path) -> None:
    write_corpus(tmp_path / "c", [5, 9, 30])
    process = subprocess.Popen(
        [sys.executable, "-c", BUILD, str(tmp_path / "c")], stdout=subprocess.PIPE, cwd=Path(__file__).parents[2]
    )
    assert process.stdout is not None and process.stdout.readline() == b"half\n"
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert [path for path in tmp_path.iterdir() if path.suffix in (".part", ".lock")]
    cached(tmp_path / "c")
    names = sorted(path.name.rpartition("_")[0] or path.name for path in tmp_path.iterdir() if path.suffix != ".npy")
    assert len(names) == 4 and not [path for path in tmp_path.iterdir() if path.suffix in (".part", ".lock")]


def test_order_files_can_be_read_by_others(tmp_path: Path) -> None:
    write_corpus(tmp_path / "c", [5, 9, 30])
    umask = os.umask(0o022)
    try:
        cached(tmp_path / "c")
    finally:
        os.umask(umask)
    assert {path.stat().st_mode & 0o777 for path in tmp_path.glob("c_*")} == {0o644}


def later(num_samples: int, **options: object) -> GPTDataset:
    return GPTDataset(IndexedDataset(CORPUS), 64, 1234, num_samples, **options)


def test_up_to_the_limit_the_order_is_gpt_neoxs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron.data.samples.WHOLE_ORDER_SAMPLES", 2500)
    dataset = later(2500)
    assert (dataset.epoch_blocks, dataset.later_block) == ([5], 0)
    assert np.array_equal(dataset.shuffle_idx, GOLDEN["seed1234_ns2500.shuffle_idx"])


def test_beyond_it_blocks_are_built_when_they_are_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron.data.samples.WHOLE_ORDER_SAMPLES", 2500)
    monkeypatch.setattr("megatron.data.samples._LATER_SAMPLES", 1300)
    built: list[int] = []
    build = GPTDataset._build
    monkeypatch.setattr(GPTDataset, "_build", lambda self, number: built.append(number) or build(self, number))
    dataset = later(2501)
    assert (dataset.epoch_blocks, dataset.later_block, built) == ([2], 2, []) and len(dataset) == 3 * 1225
    for block in range(3):
        whole = GPTDataset(IndexedDataset(CORPUS), 64, 1234 + block, 1, epoch_blocks=[2])
        assert all(np.array_equal(dataset[1225 * block + i], whole[i]) for i in range(0, 1225, 7))
    assert sorted(set(built)) == [0, 1, 2]


def test_a_very_long_order_is_the_same_whatever_its_length_and_where_it_is_resumed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    short = later(1500)
    monkeypatch.setattr("megatron.data.samples.WHOLE_ORDER_SAMPLES", 2500)
    monkeypatch.setattr("megatron.data.samples._LATER_SAMPLES", 1300)
    longer = later(4000, epoch_blocks=short.epoch_blocks)
    assert (longer.epoch_blocks, longer.later_block) == (short.epoch_blocks, 2)
    assert all(np.array_equal(longer[i], short[i]) for i in range(0, len(short), 11))
    again = later(9000, epoch_blocks=longer.epoch_blocks, later_block=longer.later_block)
    less = later(2000, epoch_blocks=longer.epoch_blocks, later_block=longer.later_block)
    assert (again.epoch_blocks, again.later_block) == (less.epoch_blocks, less.later_block) == ([3], 2)
    assert all(np.array_equal(longer[i], again[i]) for i in range(len(longer) - 1, 0, -101))
    assert len(less) >= 2000 and np.array_equal(less[1999], again[1999])


def test_an_order_of_a_million_million_samples_starts_at_once(tmp_path: Path) -> None:
    start = time.monotonic()
    dataset = later(10**12)
    assert len(dataset) >= 10**12 and dataset[10**12 - 1].shape == (65,)
    tiny = GPTDataset(write_corpus(tmp_path / "t", [2]), 64, 7, 10**12)
    assert tiny[10**12 - 1].shape == (65,)
    assert time.monotonic() - start < 20


def test_an_order_that_does_not_fit_in_memory_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object) -> None:
        raise MemoryError

    monkeypatch.setattr("megatron.data.samples.build_order", fail)
    with pytest.raises(UserError, match=r"the order of 612 samples \(1 epochs\) does not fit in memory"):
        later(600)


@pytest.mark.parametrize(
    ("split", "count", "expected"),
    [
        ("949,50,1", 1000, [(0, 949), (949, 999), (999, 1000)]),
        ("969, 30, 1", 200, [(0, 194), (194, 200), (200, 200)]),
        ("1/1/1", 10, [(0, 4), (4, 7), (7, 10)]),
        ("5", 7, [(0, 7), (7, 7), (7, 7)]),
        ("1,1", 3, [(0, 1), (1, 3), (3, 3)]),
    ],
)
def test_split_rounds_like_gpt_neox(split: str, count: int, expected: list[tuple[int, int]]) -> None:
    assert split_documents(split, count) == expected


@pytest.mark.parametrize("split", ["", "a,b", "0,0,0", "-1,2,3", "nan,1,1"])
def test_a_malformed_split_is_refused(split: str) -> None:
    with pytest.raises(UserError, match="split: .*949,50,1"):
        split_documents(split, 10)
