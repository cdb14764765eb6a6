"""Damaged data files: never a traceback, never another content in silence where a structure or a checksum can tell."""

from __future__ import annotations

import gzip
import io
import json
import logging
import os
import random
import tarfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard

from megatron.config.sections.tokenizer import TokenizerConfig
from megatron.data import GPTDataset, IndexedDataset
from megatron.data.check import check_pair
from megatron.data.preprocess import preprocess
from megatron.errors import UserError
from megatron.log import get_logger
from megatron.tokenizer import build_tokenizer
from tests.damage import damaged
from tests.data.counting_corpora import write_corpus

SEED = int(os.environ.get("SOAK_SEED", "1"))
ROUNDS = int(os.environ.get("SOAK_ROUNDS", "1"))
SIZES = [5, 9, 0, 30, 17, 260, 3]
SECONDS_A_FILE = 20.0


def of_each(kind: str, count: int) -> list[random.Random]:
    """A generator for each of the files, the same ones in every run."""
    return [random.Random(f"{SEED}/{kind}/{number}") for number in range(count * ROUNDS)]


def outcome(work: Callable[[], object]) -> object:
    """What the work came to: its result, or None after a UserError. Other errors and hangs fail the test."""
    start = time.monotonic()
    try:
        return work()
    except UserError as error:
        assert str(error)
        return None
    finally:
        assert time.monotonic() - start < SECONDS_A_FILE


def tokens(prefix: Path) -> list[list[int]]:
    corpus = IndexedDataset(prefix)
    return [corpus[i].tolist() for i in range(len(corpus))]


@pytest.fixture
def pair(tmp_path: Path) -> Path:
    write_corpus(tmp_path / "c", SIZES)
    return tmp_path / "c"


@pytest.mark.parametrize("has_checksums", [True, False])
def test_a_damaged_index_is_refused(pair: Path, has_checksums: bool) -> None:
    idx = pair.with_suffix(".idx")
    expected, content = tokens(pair), idx.read_bytes()
    if not has_checksums:
        pair.with_suffix(".sha256").unlink()
    for draw in of_each("idx", 10):
        idx.write_bytes(damaged(content, draw))
        found = outcome(lambda: tokens(pair))
        assert found is None or (found == expected and not has_checksums)


def test_a_damaged_bin_is_refused_or_found_by_its_checksum(pair: Path) -> None:
    bin_file = pair.with_suffix(".bin")
    content = bin_file.read_bytes()
    for draw in of_each("bin", 10):
        bin_file.write_bytes(changed := damaged(content, draw))
        assert outcome(lambda: check_pair(str(pair))) is None
        assert len(changed) == len(content) or outcome(lambda: tokens(pair)) is None


def test_damaged_checksums_refuse_a_pair_or_are_named(pair: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = pair.with_suffix(".sha256")
    expected, content = tokens(pair), path.read_bytes()
    for draw in of_each("sha256", 8):
        path.write_bytes(damaged(content, draw))
        assert outcome(lambda: tokens(pair)) in (None, expected)
        outcome(lambda: check_pair(str(pair)))


def test_a_damaged_sample_order_is_built_again_with_one_line(pair: Path, caplog: pytest.LogCaptureFixture) -> None:
    def order() -> list[list[int]]:
        dataset = GPTDataset(IndexedDataset(pair), 4, 7, 200, cache_min_samples=1)
        return [dataset[i].tolist() for i in range(len(dataset))]

    expected, logger = order(), get_logger()
    files = sorted(pair.parent.glob("c_*"))
    assert len(files) == 4
    logger.addHandler(caplog.handler)
    try:
        for number, draw in enumerate(of_each("order", 20)):
            whole = {path: path.read_bytes() for path in files}
            path = files[number % 4]
            path.write_bytes(damaged(whole[path], draw))
            caplog.clear()
            assert outcome(order) == expected
            warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
            assert len(warnings) == 1 and "damaged" in warnings[0]
            assert {path: path.read_bytes() for path in files} == whole
    finally:
        logger.removeHandler(caplog.handler)
    assert sorted(pair.parent.glob("c_*")) == files


def text_files() -> dict[str, bytes]:
    """A file of each kind that preprocessing reads."""
    lines = "".join(json.dumps({"text": f"document {i} " * 5}) + "\n" for i in range(20)).encode()
    packed = zstandard.ZstdCompressor(write_checksum=True).compress(lines)
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        member = tarfile.TarInfo("a.jsonl.zst")
        member.size = len(packed)
        archive.addfile(member, io.BytesIO(packed))
    return {
        "a.jsonl": lines,
        "a.jsonl.gz": gzip.compress(lines, mtime=0),
        "a.jsonl.zst": packed,
        "a.jsonl.zst.tar": buffer.getvalue(),
    }


def test_damaged_text_is_refused_or_read(tmp_path: Path) -> None:
    files = text_files()
    for number, draw in enumerate(of_each("text", 12)):
        name = sorted(files)[number % 4]
        source = tmp_path / name
        source.write_bytes(damaged(files[name], draw))
        config = TokenizerConfig(tokenizer_type="CharLevelTokenizer")
        result = outcome(lambda source=source, config=config: preprocess([str(source)], tmp_path / "out", config))
        written = sorted(path.name for path in tmp_path.iterdir() if path != source)
        source.unlink()
        assert len(written) == (3 if result else 0)
        for path in tmp_path.iterdir():
            path.unlink()


@pytest.fixture
def tokenizer_files(tokenizer_file: Path, tmp_path: Path) -> dict[str, TokenizerConfig]:
    """A copy of each kind of tokenizer file, with the settings that read it."""
    import base64

    from megatron.tokenizer.training import train_sentencepiece

    whole = json.loads(tokenizer_file.read_text(encoding="utf-8"))
    (tmp_path / "tokenizer.json").write_bytes(tokenizer_file.read_bytes())
    (tmp_path / "vocab.json").write_text(json.dumps(whole["model"]["vocab"]), encoding="utf-8")
    merges = [" ".join(merge) for merge in whole["model"]["merges"]]
    (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n", encoding="utf-8")
    train_sentencepiece(["the people of the states and the congress " * 50], 280, tmp_path / "s.model")
    ranks = [bytes([i]) for i in range(256)] + [b"th", b"the", b" the"]
    lines = (f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(ranks))
    (tmp_path / "r.tiktoken").write_text("".join(lines), encoding="ascii")
    pair = {"vocab_file": str(tmp_path / "vocab.json"), "merge_file": str(tmp_path / "merges.txt")}
    return {
        "tokenizer.json": TokenizerConfig(tokenizer_type="HFTokenizer", vocab_file=str(tmp_path / "tokenizer.json")),
        "vocab.json": TokenizerConfig(tokenizer_type="GPT2BPETokenizer", **pair),
        "merges.txt": TokenizerConfig(tokenizer_type="GPT2BPETokenizer", **pair),
        "s.model": TokenizerConfig(tokenizer_type="SPMTokenizer", vocab_file=str(tmp_path / "s.model")),
        "r.tiktoken": TokenizerConfig(tokenizer_type="TiktokenTokenizer", vocab_file=str(tmp_path / "r.tiktoken")),
    }


def test_a_damaged_tokenizer_is_refused_or_encodes(tokenizer_files: dict[str, TokenizerConfig], tmp_path: Path) -> None:
    def use(config: TokenizerConfig) -> list[int]:
        tokenizer = build_tokenizer(config)
        ids = tokenizer.encode("the people \u00e9\U0001f600\n")
        assert all(0 <= token < tokenizer.vocab_size for token in ids) and isinstance(tokenizer.decode(ids), str)
        return ids

    for number, draw in enumerate(of_each("tokenizer", 15)):
        name = sorted(tokenizer_files)[number % 5]
        content = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(damaged(content, draw))
        outcome(lambda name=name: use(tokenizer_files[name]))
        (tmp_path / name).write_bytes(content)
    assert all(use(config) for config in tokenizer_files.values())
