from __future__ import annotations

import hashlib
import io
import json
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import zstandard

from megatron.config.sections.tokenizer import TokenizerConfig
from megatron.data import IndexedDataset
from megatron.data.corpora import CORPORA, CorpusFile, fetch_corpus
from megatron.data.preprocess import prepare_dataset, preprocess
from megatron.errors import UserError
from tests.data.http_server import Served, serve

BYTES = TokenizerConfig(tokenizer_type="CharLevelTokenizer")
TEXT = b"one wiki"


def zipped(**files: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def jsonl_zst(*texts: str) -> bytes:
    return zstandard.compress("".join(json.dumps({"text": text}) + "\n" for text in texts).encode())


def tarred(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        link = tarfile.TarInfo("link.jsonl.zst")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


SHARDS = {"/00.jsonl.zst": jsonl_zst("zero"), "/01.jsonl.zst": jsonl_zst("one")}
TAR = tarred(
    {"2005.jsonl.zst": jsonl_zst("first", "second"), "README": b"no text", "../../up.jsonl.zst": jsonl_zst("third")}
)


@pytest.fixture
def served() -> Iterator[Served]:
    with serve({"/enwik8.zip": zipped(enwik8=TEXT), "/owt2.jsonl.zst.tar": TAR, **SHARDS}) as served:
        yield served


def corpora(served: Served, md5: str = hashlib.md5(TEXT).hexdigest()) -> dict[str, tuple[CorpusFile, ...]]:
    wiki = CorpusFile(f"{served.url}/enwik8.zip", unpacked="enwik8.txt", unpacked_checksum=f"md5:{md5}")
    shards = tuple(CorpusFile(f"{served.url}{path}") for path in SHARDS)
    return {"enwik8": (wiki,), "openwebtext2": (CorpusFile(f"{served.url}/owt2.jsonl.zst.tar"),), "pile": shards}


def prepared(name: str, folder: Path, served: Served, force: bool = False) -> list[bytes]:
    result = prepare_dataset(name, None, folder, BYTES, force_redownload=force, corpora=corpora(served))
    assert result.prefixes == {"text": f"{folder}/{name}/{name}_text_document"}
    corpus = IndexedDataset(result.prefixes["text"])
    return [bytes(corpus[i].tolist()) for i in range(len(corpus))]


@pytest.mark.parametrize(
    ("name", "documents", "files"),
    [
        ("enwik8", [TEXT], ["enwik8.txt"]),
        ("openwebtext2", [b"first", b"second", b"third"], ["owt2.jsonl.zst.tar"]),
        ("pile", [b"zero", b"one"], ["00.jsonl.zst", "01.jsonl.zst"]),
    ],
)
def test_a_corpus_is_downloaded_once_and_encoded(
    name: str, documents: list[bytes], files: list[str], served: Served, tmp_path: Path
) -> None:
    for requests in (len(files), len(files)):
        assert prepared(name, tmp_path / "data", served) == [document + b"\0" for document in documents]
        assert len(served.requests) == requests
    assert sorted(path.name for path in (tmp_path / "data" / name / "raw").iterdir()) == files
    assert [path.name for path in tmp_path.iterdir()] == ["data"]
    prepared(name, tmp_path / "data", served, force=True)
    assert len(served.requests) == 2 * len(files)


def test_a_finished_shard_is_kept_when_another_fails(served: Served, tmp_path: Path) -> None:
    shard = served.files.pop("/01.jsonl.zst")
    with pytest.raises(UserError, match=r"/01\.jsonl\.zst: HTTP 404"):
        prepared("pile", tmp_path, served)
    served.files["/01.jsonl.zst"] = shard
    assert prepared("pile", tmp_path, served) == [b"zero\0", b"one\0"]
    assert [path for path, _ in served.requests] == ["/00.jsonl.zst", "/01.jsonl.zst", "/01.jsonl.zst"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"no zip", "not a valid zip file"),
        (zipped(a=b"1", b=b"2"), "holds 2 files instead of one"),
        (zipped(enwik8=b"other"), "wrong checksum, md5 is"),
    ],
)
def test_a_bad_zip_is_refused_and_leaves_nothing(content: bytes, message: str, served: Served, tmp_path: Path) -> None:
    served.files["/enwik8.zip"] = content
    with pytest.raises(UserError, match=message):
        prepared("enwik8", tmp_path, served)
    assert not list((tmp_path / "enwik8" / "raw").iterdir())


def test_the_name_in_a_zip_is_not_used(served: Served, tmp_path: Path) -> None:
    served.files["/enwik8.zip"] = zipped(**{"../../up.txt": TEXT})
    fetch_corpus("enwik8", tmp_path / "a" / "b", corpora=corpora(served))
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.txt")] == ["a/b/enwik8.txt"]


def test_a_bad_tokenizer_is_found_before_the_download(served: Served, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="vocab_file: missing"):
        prepare_dataset("pile", None, tmp_path, TokenizerConfig(), corpora=corpora(served))
    assert not served.requests


@pytest.mark.parametrize("cut", [100, 1024 + 20])  # in the first header; in the first text
def test_a_damaged_tar_is_reported(cut: int, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.zst.tar"
    path.write_bytes(TAR[:cut])
    with pytest.raises(UserError, match=r"a\.jsonl\.zst\.tar: cannot be read"):
        preprocess([str(path)], tmp_path / "out", BYTES)


def test_mistakes_in_a_tar_name_the_member(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.zst.tar"
    path.write_bytes(tarred({"x.jsonl.zst": zstandard.compress(b"{}\n[]\n")}))
    with pytest.raises(UserError, match=r"a\.jsonl\.zst\.tar/x\.jsonl\.zst: line 1 has no key 'text'"):
        preprocess([str(path)], tmp_path / "out", BYTES)


def test_the_table_is_sound() -> None:
    assert {"enwik8", "openwebtext2", "pile"} <= set(CORPORA)
    for files in CORPORA.values():
        names = [file.unpacked or file.file_name for file in files]
        assert len(set(names)) == len(names)
        assert all(file.url.startswith(("https://", "hf://datasets/")) for file in files)
        assert all(name.endswith((".txt", ".jsonl.zst", ".tar")) for name in names)
    assert [file.file_name for file in CORPORA["pile"]] == [f"{shard:02}.jsonl.zst" for shard in range(30)]
