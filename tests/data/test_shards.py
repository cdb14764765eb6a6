"""Pairs that are published in parts: fetched, checked, joined to the byte, and gone on with after any interruption."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import prepare_data
from megatron.data import IndexedDataset, IndexedDatasetBuilder
from megatron.data import shards as shards_module
from megatron.data.checksum import read_checksums
from megatron.data.download import Patience
from megatron.data.hub import HUB
from megatron.data.shards import SHARDED, ShardedPair, fetch_and_join, join_local
from megatron.errors import UserError
from tests.data.http_server import Served, serve

QUICK = Patience(attempts=1, pause=0.01, timeout=5)
PAIR = ShardedPair(f"{HUB}owner/name", "some_text_document", 4)
CORPORA = {"some": PAIR}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pair as it was before it was divided; its prefix."""
    prefix = tmp_path_factory.mktemp("whole") / "some_text_document"
    builder = IndexedDatasetBuilder(str(prefix), np.uint16)
    for number in range(50):
        builder.add_document([number % 7 + 1] * (number % 11 + 3))
    builder.finalize()
    return prefix


@pytest.fixture
def parts(whole: Path, tmp_path: Path) -> dict[str, bytes]:
    """The published files: parts of one size, of which the last is shorter."""
    content = Path(f"{whole}.bin").read_bytes()
    size = -(-len(content) // 4) // 2 * 2 + 1  # parts end within an id
    cut = {name: content[size * number : size * (number + 1)] for number, name in enumerate(PAIR.parts)}
    return {**cut, "some_text_document.idx": Path(f"{whole}.idx").read_bytes()}


@pytest.fixture
def hub(parts: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> Iterator[Served]:
    with serve({f"/stored/{name}": content for name, content in parts.items()}) as served:
        for name, content in parts.items():
            headers = {"X-Linked-Etag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Linked-Size": f"{len(content)}"}
            target = f"{served.url.replace('127.0.0.1', 'localhost')}/stored/{name}"
            served.redirects[f"/datasets/owner/name/resolve/main/{name}"] = (target, headers)
        template = f"{served.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
        yield served


def is_whole(prefix: str | Path, whole: Path) -> bool:
    same = all(Path(f"{prefix}{end}").read_bytes() == Path(f"{whole}{end}").read_bytes() for end in (".bin", ".idx"))
    expected = {end: hashlib.sha256(Path(f"{whole}{end}").read_bytes()).hexdigest() for end in (".bin", ".idx")}
    return same and read_checksums(str(prefix)) == expected and len(IndexedDataset(prefix)) == 50


def join(folder: Path, force: bool = False) -> str:
    return fetch_and_join("some", folder, force, CORPORA, QUICK)


def test_the_published_pair_has_the_names_of_the_hub() -> None:
    pair = SHARDED["pile_deduped_pythia"]
    assert (len(pair.parts), pair.parts[0]) == (83, "pile_0.87_deduped_text_document-00000-of-00082.bin")
    assert pair.parts[-1] == "pile_0.87_deduped_text_document-00082-of-00082.bin"


def test_parts_are_joined_and_let_go_of(hub: Served, whole: Path, tmp_path: Path) -> None:
    prefix = join(tmp_path)
    assert prefix == str(tmp_path / "some/some_text_document") and is_whole(prefix, whole)
    left = {path.name for path in (tmp_path / "some").rglob("*") if path.is_file()}
    assert left == {f"some_text_document{end}" for end in (".bin", ".idx", ".sha256", ".idx")} | {
        "some_text_document.idx"
    }
    asked = len(hub.requests)
    assert join(tmp_path) == prefix and len(hub.requests) == asked, "it is there"


def test_parts_that_cannot_be_had_are_asked_for_by_the_flag_that_takes_them(
    hub: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = PAIR.parts[0]
    hub.redirects.pop(f"/datasets/owner/name/resolve/main/{name}")
    hub.refusals[f"/datasets/owner/name/resolve/main/{name}"] = (404, {})
    with pytest.raises(UserError, match=f"{name}: .*; .* pass the files with --join"):
        join(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=f"{name}: HF_HUB_OFFLINE is set; unset it, or pass the files with --join"):
        join(tmp_path)


@pytest.mark.parametrize("broken", range(5))
def test_an_interrupted_call_is_gone_on_with(
    broken: int, hub: Served, whole: Path, parts: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parts that are joined are not fetched again, and half a part that was appended is cut off."""
    name = list(parts)[broken]
    kept = hub.redirects.pop(f"/datasets/owner/name/resolve/main/{name}")
    hub.refusals[f"/datasets/owner/name/resolve/main/{name}"] = (404, {})
    with pytest.raises(UserError, match=f"{name}.*") as error:
        join(tmp_path)
    assert "\n" not in str(error.value) and not Path(tmp_path / "some/some_text_document.bin").exists()
    hub.refusals.clear()
    hub.redirects[f"/datasets/owner/name/resolve/main/{name}"] = kept
    with (tmp_path / "some/some_text_document.joining.bin").open("ab") as file:
        file.write(b"half")
    hub.requests.clear()
    assert is_whole(join(tmp_path), whole)
    fetched = {path.rpartition("/")[2] for path, _ in hub.requests}
    assert fetched == set(list(parts)[broken:])


def test_a_damaged_part_is_named(hub: Served, parts: dict[str, bytes], tmp_path: Path) -> None:
    name = PAIR.parts[1]
    hub.files[f"/stored/{name}"] = bytes(len(parts[name]))
    with pytest.raises(UserError, match=rf"{name}.*(checksum|sha256)"):
        join(tmp_path)


def written(parts: dict[str, bytes], folder: Path) -> list[str]:
    folder.mkdir(exist_ok=True)
    for name, content in parts.items():
        (folder / name).write_bytes(content)
    return [str(folder / name) for name in parts]


def test_local_parts_are_joined_in_any_order_and_stay(parts: dict[str, bytes], whole: Path, tmp_path: Path) -> None:
    files = written(parts, tmp_path / "parts")
    prepare_data.main(["some", "--join", *reversed(files), "-d", str(tmp_path)])
    assert is_whole(tmp_path / "some/some_text_document", whole) and all(map(os.path.exists, files))


def test_what_is_wrong_with_local_parts_is_named(parts: dict[str, bytes], tmp_path: Path) -> None:
    files, prefix = written(parts, tmp_path / "parts"), tmp_path / "out"
    cases = [
        ([files[0], *files[2:]], "some_text_document-00001-of-00003.bin missing of 5 files"),
        (files[:-1], r"some_text_document\.idx missing of 5 files"),
        (
            [*files, str(tmp_path / "other-00000-of-00003.bin")],
            "other-00000-of-00003.bin is no part of some_text_document",
        ),
        ([str(tmp_path / "a.txt")], "^--join: no parts of a .bin"),
        ([*files[:-1], str(tmp_path / "some_text_document.idx")], r"^--join: .*\.idx cannot be read: No such file"),
    ]
    for given, message in cases:
        with pytest.raises(UserError, match=message):
            join_local(given, prefix)
    assert os.listdir(tmp_path) == ["parts"], "nothing is written before all parts are found"
    (tmp_path / "parts" / PAIR.parts[1]).write_bytes(parts[PAIR.parts[1]][:-1])
    with pytest.raises(
        UserError, match=r"00001-of-00003\.bin: \d+ bytes, where the parts before have \d+; it is damaged"
    ):
        join_local(files, prefix)
    (tmp_path / "parts" / PAIR.parts[1]).write_bytes(parts[PAIR.parts[1]])
    (tmp_path / "parts" / PAIR.parts[3]).write_bytes(parts[PAIR.parts[3]][:-2])
    with pytest.raises(UserError, match=r"describes \d+; .* a part or the \.idx is not of this pair: remove"):
        join_local(files, prefix)
    assert not Path(f"{prefix}.bin").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["x", "--join", "PARTS", "--input", "a.txt"], "--input: --join has tokens already and no text; leave it off"),
        (["pile_deduped_pythia", "--split-bytes", "1", "2"], "--split-bytes: pile_deduped_pythia has tokens already"),
        (["../x", "--join", "PARTS"], r"--name: '\.\./x' is not a plain folder name"),
    ],
)
def test_what_does_not_go_with_parts_is_named(
    parts: dict[str, bytes], tmp_path: Path, arguments: list[str], message: str
) -> None:
    files = written(parts, tmp_path / "parts")
    words = [word for argument in arguments for word in (files if argument == "PARTS" else [argument])]
    with pytest.raises(UserError, match=f"^{message}"):
        prepare_data.main([*words, "-d", str(tmp_path / "data")])
    assert not (tmp_path / "data").exists()


def test_what_has_a_published_name_has_the_published_checksum(
    parts: dict[str, bytes], whole: Path, tmp_path: Path
) -> None:
    files, digest = written(parts, tmp_path / "parts"), hashlib.sha256(Path(f"{whole}.bin").read_bytes()).hexdigest()
    right, wrong = ({"some": replace(PAIR, sha256=known)} for known in (digest, "0" * 64))
    with pytest.raises(UserError, match=rf"out\.joining\.bin: its sha256 is {digest}, the published one 0+; a part is"):
        join_local(files, tmp_path / "out", sharded=wrong)
    assert not (tmp_path / "out.bin").exists()
    assert is_whole(join_local(files, tmp_path / "out", sharded=right), whole)


def test_a_full_disk_is_one_line_and_gone_on_with(
    parts: dict[str, bytes], whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files, calls = written(parts, tmp_path / "parts"), [0]
    copy = shards_module.shutil.copyfileobj

    def full(source: object, target: object, length: int) -> None:
        calls[0] += 1
        if calls[0] == 3:
            target.write(b"part of it")  # type: ignore[attr-defined]
            raise OSError(28, "No space left on device")
        copy(source, target, length)  # type: ignore[arg-type]

    monkeypatch.setattr(shards_module.shutil, "copyfileobj", full)
    with pytest.raises(UserError, match="No space left on device; free some space; the same command goes on"):
        join_local(files, tmp_path / "out")
    assert is_whole(join_local(files, tmp_path / "out"), whole) and calls[0] == 5, "two parts are not copied again"
