from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import zstandard

from megatron.config.sections.tokenizer import TokenizerConfig
from megatron.data import IndexedDataset
from megatron.data.preprocess import default_workers, encode_all, prepare_dataset, preprocess
from megatron.data.text import RawDocument
from megatron.errors import UserError
from megatron.tokenizer import build_tokenizer
from prepare_data import main as prepare_main
from tools.datasets.preprocess_data import main as preprocess_main

ROOT = Path(__file__).parents[2]
BYTES = TokenizerConfig(tokenizer_type="CharLevelTokenizer")
ONE, TWO = [*b"one", 0], [*b"two", 0]


def jsonl(*documents: object) -> bytes:
    return "".join(json.dumps(document) + "\n" for document in documents).encode()


def encoded(prefix: str) -> list[list[int]]:
    corpus = IndexedDataset(prefix)
    return [corpus[i].tolist() for i in range(len(corpus))]


def run(folder: Path, name: str, content: bytes, **options: object) -> list[list[int]]:
    (folder / name).write_bytes(content)
    result = preprocess([str(folder / name)], folder / "out", BYTES, **options)
    return encoded(result.prefixes["text"])


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_jsonl_is_read_in_every_compression(tmp_path: Path, suffix: str) -> None:
    content = jsonl({"text": "one"}, {"text": "two"})
    pack = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.compress}[suffix]
    assert run(tmp_path, f"a.jsonl{suffix}", pack(content)) == [ONE, TWO]


def test_a_txt_file_is_one_document_or_one_a_line(tmp_path: Path) -> None:
    assert run(tmp_path, "a.txt", b"one\ntwo\n") == [[*b"one\ntwo\n", 0]]
    assert run(tmp_path, "a.txt", b"\xef\xbb\xbfone\r\n\n  \ntwo", txt_documents="lines") == [ONE, TWO]


def test_the_chosen_keys_are_encoded(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(jsonl({"text": "no", "body": "one", "title": "two"}))
    result = preprocess([str(tmp_path / "a.jsonl")], tmp_path / "out", BYTES, keys=["body", "title"])
    assert result.prefixes == {key: f"{tmp_path}/out_{key}_document" for key in ("body", "title")}
    assert [encoded(prefix) for prefix in result.prefixes.values()] == [[ONE], [TWO]]


def test_end_of_document_can_be_left_off(tmp_path: Path) -> None:
    assert run(tmp_path, "a.txt", b"one", append_eod=False) == [[*b"one"]]


def test_empty_documents_are_skipped_and_counted(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(jsonl({"text": ""}, {"text": "one"}, {"text": ""}) + b"\n\n")
    result = preprocess([str(tmp_path / "a.jsonl")], tmp_path / "out", BYTES)
    assert (result.num_documents, result.num_tokens, result.num_empty) == (1, 4, 2)


def test_workers_keep_the_order(tmp_path: Path) -> None:
    content = jsonl(*({"text": f"document {i}"} for i in range(2500)))
    assert run(tmp_path, "a.jsonl", content, num_workers=2) == run(tmp_path, "a.jsonl", content)


def test_files_are_the_same_for_any_number_of_workers(tmp_path: Path, tokenizer_file: Path) -> None:
    sentence = "the parameters of a model "
    lengths = [11_000 if i == 70 else (0, 1, 7, 3)[i % 4] for i in range(200)]  # chunks are full by number, and by size
    content = jsonl(*({"text": f"{i} {sentence * length}" if length else ""} for i, length in enumerate(lengths)))
    (tmp_path / "a.jsonl").write_bytes(content)
    tokenizer = TokenizerConfig(tokenizer_type="HFTokenizer", vocab_file=str(tokenizer_file))
    prefixes = {}
    for number in (None, 0, 1, 2, 3):
        result = preprocess([str(tmp_path / "a.jsonl")], tmp_path / f"by_{number}", tokenizer, num_workers=number)
        prefixes[number] = result.prefixes["text"]
    for suffix in (".bin", ".idx"):
        contents = {Path(f"{prefix}{suffix}").read_bytes() for prefix in prefixes.values()}
        assert len(contents) == 1, suffix
    corpus, built = IndexedDataset(prefixes[2]), build_tokenizer(tokenizer)
    assert corpus[1].tolist() == [*built.encode(f"2 {sentence * 7}"), built.eod_id]


def test_every_core_works_unless_the_input_is_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {1, 3, 5})
    (tmp_path / "a.txt").write_bytes(b"x" * (1 << 20))
    (tmp_path / "b.txt").write_bytes(b"x")
    assert default_workers([str(tmp_path / "a.txt"), str(tmp_path / "b.txt")]) == 3
    assert default_workers([str(tmp_path / "b.txt")]) == 1


def test_a_dead_worker_is_reported() -> None:
    with pytest.raises(UserError, match="--num-workers: a worker process died"):
        document = RawDocument("a.txt", 0, b"x")
        list(encode_all(lambda documents: os._exit(1), [document] * 4, 2))


@pytest.mark.parametrize("num_workers", [1, 2])
@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", jsonl({"text": "one"}) + b'{"text": "\xff"}\n', r"a\.jsonl: line 2 is not UTF-8"),
        ("a.txt", b"one\xfftwo", r"a\.txt: byte 3 is not UTF-8"),
        ("a.jsonl", jsonl({"text": "one"}) + b'\n{"text": \n', r"a\.jsonl: line 3 is not valid JSON"),
        ("a.jsonl", b'["text"]', r"a\.jsonl: line 1 is not a JSON object but list"),
        ("a.jsonl", jsonl({"body": "one"}), r"a\.jsonl: line 1 has no key 'text', only body"),
        ("a.jsonl", jsonl({"text": 3}), r"a\.jsonl: line 1: 'text' is not text but int"),
        ("a.jsonl", jsonl({"text": ""}), "no text under 'text'"),
        ("a.jsonl.gz", gzip.compress(b"x" * 999, mtime=0)[:-9], r"a\.jsonl\.gz: cannot be read"),
        ("a.jsonl.gz", b"plain", r"a\.jsonl\.gz: cannot be read"),
        ("a.jsonl.zst", b"plain", r"a\.jsonl\.zst: cannot be read"),
        ("a.csv", b"", r"--input: .*a\.csv is of an unknown kind.*\.jsonl\.zst"),
    ],
)
def test_bad_input_is_located_and_writes_nothing(
    tmp_path: Path, name: str, content: bytes, message: str, num_workers: int
) -> None:
    with pytest.raises(UserError, match=message):
        run(tmp_path, name, content, num_workers=num_workers)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--input: no such file: .*b.txt"):
        preprocess([str(tmp_path / "b.txt")], tmp_path / "out", BYTES)


def test_prepare_dataset_names_the_output(tmp_path: Path) -> None:
    (tmp_path / "speech.v1.txt").write_text("one")
    for arguments, name in [((None,), "speech"), (("mine",), "mine")]:
        result = prepare_dataset(*arguments, [str(tmp_path / "speech.v1.txt")], tmp_path, BYTES)
        assert encoded(str(tmp_path / name / f"{name}_text_document")) == [ONE]
        assert list(result.prefixes) == ["text"]


def test_what_cannot_be_prepared_is_refused_with_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"'enwik9' cannot be downloaded \(known: enwik8, .*; pass .*--input"):
        prepare_dataset("enwik9", None, tmp_path, BYTES)
    (tmp_path / "a.txt").write_text("one")
    with pytest.raises(UserError, match="--name: 'a/b'"):
        prepare_dataset(None, [str(tmp_path / "a.txt")], tmp_path, BYTES, name="a/b")


def test_without_a_name_enwik8_is_prepared(tmp_path: Path) -> None:
    (tmp_path / "enwik8" / "raw").mkdir(parents=True)
    (tmp_path / "enwik8" / "raw" / "enwik8.txt").write_text("one")
    prepare_main(["-t", "CharLevelTokenizer", "-d", str(tmp_path)])
    assert encoded(str(tmp_path / "enwik8" / "enwik8_text_document")) == [ONE]
    prepare_main(["-t", "CharLevelTokenizer", "-d", str(tmp_path), "--jsonl-keys", "text", "--name", "other"])
    assert encoded(str(tmp_path / "other" / "other_text_document")) == [ONE]


def test_a_tokenizer_of_gpt_neox_that_is_not_here_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--tokenizer: HFGPT2Tokenizer is GPT2BPETokenizer here"):
        prepare_main(["-t", "HFGPT2Tokenizer", "-d", str(tmp_path)])
    with pytest.raises(UserError, match="--tokenizer-type: unknown tokenizer 'Mine'; known are HFTokenizer, "):
        preprocess_main(["--input", "a.txt", "--output-prefix", "o", "--tokenizer-type", "Mine"])


def test_a_number_of_too_many_digits_is_located(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"a\.jsonl: line 1 is not valid JSON"):
        run(tmp_path, "a.jsonl", b'{"text": "a", "n": ' + b"9" * 5000 + b"}")


def command(*arguments: str, folder: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, cwd=folder)


@pytest.mark.launches
def test_prepare_data_writes_the_pair(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one")
    arguments = ("-t", "CharLevelTokenizer", "-d", str(tmp_path), "--input", str(tmp_path / "a.txt"), "--name", "n")
    assert command("prepare_data.py", *arguments).returncode == 0
    assert encoded(str(tmp_path / "n" / "n_text_document")) == [ONE]


@pytest.mark.launches
def test_prepare_data_reports_mistakes_in_one_line(tmp_path: Path) -> None:
    result = command("prepare_data.py", "enwik9", "-d", str(tmp_path))
    assert result.returncode == 2
    assert result.stderr.startswith("error: --input: 'enwik9'") and result.stderr.count("\n") == 1


@pytest.mark.launches
def test_preprocess_data_runs_by_path_and_as_a_module(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "b.txt").write_text("two")
    files = f"{tmp_path}/a.txt,{tmp_path}/b.txt"
    arguments = ("--tokenizer-type", "CharLevelTokenizer", "--append-eod", "--input", files, "--output-prefix")
    by_path = command(str(ROOT / "tools/datasets/preprocess_data.py"), *arguments, "p", folder=tmp_path)
    as_module = command("-m", "tools.datasets.preprocess_data", *arguments, f"{tmp_path}/m")
    assert (by_path.returncode, as_module.returncode) == (0, 0)
    assert encoded(f"{tmp_path}/p_text_document") == encoded(f"{tmp_path}/m_text_document") == [ONE, TWO]
    refused = command("-m", "tools.datasets.preprocess_data", *arguments, "p", "--ftfy")
    assert refused.returncode == 2 and "error: --ftfy: not supported" in refused.stderr
