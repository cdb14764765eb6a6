from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron.errors import UserError
from megatron.tokenizer import HFTokenizer, SPMTokenizer
from megatron.tokenizer.training import train_sentencepiece, train_tokenizer

ROOT = Path(__file__).parents[2]
TEXTS = [
    "The people of the United States\n\tof America",
    "Gr\u00fc\u00dfe, \u4f60\u597d! " * 3,
    "of the people, by the people",
] * 9


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "tools/datasets/train_tokenizer.py"), *arguments], capture_output=True, text=True
    )


def test_bpe_holds_end_of_text_and_all_bytes(tmp_path: Path) -> None:
    train_tokenizer(TEXTS, 300, tmp_path / "t.json")
    tokenizer = HFTokenizer(str(tmp_path / "t.json"))
    assert (tokenizer.vocab_size, tokenizer.eod_id) == (300, 0)
    assert tokenizer.decode(tokenizer.encode("\U0001f600 unseen\n")) == "\U0001f600 unseen\n"


def test_sentencepiece_keeps_text_as_it_is_and_repeats_itself(tmp_path: Path) -> None:
    pytest.importorskip("sentencepiece")
    for name in ("a", "b"):
        train_sentencepiece(iter(TEXTS), 330, tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    tokenizer = SPMTokenizer(str(tmp_path / "a"))
    assert (tokenizer.vocab_size, tokenizer.eod_id) == (330, 1)
    assert tokenizer.decode(tokenizer.encode("  \U0001f600\n\n x ")) == "  \U0001f600\n\n x "


def test_long_texts_are_learnt_from(tmp_path: Path) -> None:
    pytest.importorskip("sentencepiece")
    train_sentencepiece(["".join(TEXTS) * 50], 330, tmp_path / "a")
    assert len(SPMTokenizer(str(tmp_path / "a")).encode("people")) < len("people")


@pytest.mark.parametrize("train", [train_tokenizer, train_sentencepiece])
def test_mistakes_in_the_texts_come_through(train: object, tmp_path: Path) -> None:
    def texts() -> Iterator[str]:
        yield "some text"
        raise UserError("a.jsonl: line 7 is not valid JSON")

    pytest.importorskip("sentencepiece")
    with pytest.raises(UserError, match="line 7"):
        train(texts(), 300, tmp_path / "t")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("train", "size", "message"),
    [
        (train_tokenizer, 256, "--vocab-size: 256 is too small; a byte-level BPE has 257"),
        (train_sentencepiece, 100, "cannot learn 100 pieces: Vocabulary size is smaller"),
        (train_sentencepiece, 9000, "cannot learn 9000 pieces: Vocabulary size too high"),
    ],
)
def test_impossible_sizes_are_explained(train: object, size: int, message: str, tmp_path: Path) -> None:
    pytest.importorskip("sentencepiece")
    with pytest.raises(UserError, match=message):
        train(TEXTS, size, tmp_path / "t")


@pytest.mark.launches
@pytest.mark.parametrize(("kind", "tokenizer"), [("bpe", HFTokenizer), ("spm", SPMTokenizer)])
def test_the_command_trains_on_files(kind: str, tokenizer: type, tmp_path: Path) -> None:
    pytest.importorskip("sentencepiece")
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    output = str(tmp_path / "out" / "tokenizer")
    done = run("--input", str(tmp_path / "a.jsonl"), "--vocab-size", "300", "--output", output, "--type", kind)
    assert done.returncode == 0, done.stderr
    assert "27doc" in done.stderr
    assert tokenizer(output).vocab_size == 300


@pytest.mark.launches
def test_the_command_reports_mistakes_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("")
    for path, message in (("b.txt", "no such file"), ("a.txt", "no text in")):
        done = run("--input", str(tmp_path / path), "--vocab-size", "300", "--output", str(tmp_path / "t"))
        assert done.returncode == 2 and f"error: --input: {message}" in done.stderr
        assert "Traceback" not in done.stderr and not (tmp_path / "t").exists()
