from __future__ import annotations

import functools
import hashlib
import random
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron.data.download import Patience, download
from megatron.errors import UserError
from tests.data.http_server import Served, serve

BODY = random.Random(0).randbytes(3_000_000)
SHA = "sha256:" + hashlib.sha256(BODY).hexdigest()
QUICK = Patience(attempts=3, pause=0.01, timeout=5)


@pytest.fixture
def served() -> Iterator[Served]:
    with serve({"/file.bin": BODY}) as served:
        yield served


def get(served: Served, folder: Path, checksum: str | None = SHA, force: bool = False) -> bytes:
    path = download(f"{served.url}/file.bin", folder / "file.bin", checksum, force, QUICK)
    assert [entry.name for entry in folder.iterdir()] == ["file.bin"]
    return path.read_bytes()


def ranges(served: Served) -> list[str | None]:
    return [wanted for _, wanted in served.requests]


def fails(served: Served, folder: Path, message: str, checksum: str | None = SHA) -> None:
    with pytest.raises(UserError, match=message) as caught:
        download(f"{served.url}/file.bin", folder / "file.bin", checksum, False, QUICK)
    assert "\n" not in str(caught.value) and served.url in str(caught.value)
    assert not (folder / "file.bin").exists()


@pytest.mark.parametrize("checksum", [SHA, "md5:" + hashlib.md5(BODY).hexdigest(), None])
def test_a_file_is_fetched_once(served: Served, tmp_path: Path, checksum: str | None) -> None:
    assert get(served, tmp_path / "new", checksum) == BODY
    assert get(served, tmp_path / "new", checksum) == BODY
    assert ranges(served) == [None]


def test_force_fetches_again_and_keeps_the_old_file_until_then(served: Served, tmp_path: Path) -> None:
    (tmp_path / "file.bin").write_bytes(b"old")
    served.failures = [404]
    with pytest.raises(UserError):
        get(served, tmp_path, force=True)
    assert (tmp_path / "file.bin").read_bytes() == b"old"
    assert get(served, tmp_path, force=True) == BODY


def test_an_interruption_is_resumed_within_the_call(served: Served, tmp_path: Path) -> None:
    served.break_after = [1_000_000, 500_000]
    assert get(served, tmp_path) == BODY
    assert ranges(served) == [None, "bytes=1000000-", "bytes=1500000-"]


def test_an_interrupted_call_is_resumed_by_the_next(served: Served, tmp_path: Path) -> None:
    served.break_after = [1_000_000]
    with pytest.raises(UserError, match="ended after 1000000 of 3000000 bytes, 1 times; .* resumes"):
        download(f"{served.url}/file.bin", tmp_path / "file.bin", SHA, patience=Patience(attempts=1))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file.bin.part", "file.bin.part.version"]
    assert get(served, tmp_path) == BODY
    assert ranges(served) == [None, "bytes=1000000-"]


def test_progress_renews_the_patience(served: Served, tmp_path: Path) -> None:
    served.break_after = [1000] * 12
    assert get(served, tmp_path) == BODY


def test_a_complete_part_needs_no_more_bytes(served: Served, tmp_path: Path) -> None:
    (tmp_path / "file.bin.part").write_bytes(BODY)
    (tmp_path / "file.bin.part.version").write_text('"1"')
    assert get(served, tmp_path) == BODY


@pytest.mark.parametrize("there", [BODY[:999], BODY + b"more"])
def test_a_part_of_another_version_is_dropped(served: Served, tmp_path: Path, there: bytes) -> None:
    (tmp_path / "file.bin.part").write_bytes(b"x" * len(there))
    (tmp_path / "file.bin.part.version").write_text('"0"')
    assert get(served, tmp_path, None) == BODY


def test_a_part_longer_than_the_file_is_dropped(served: Served, tmp_path: Path) -> None:
    (tmp_path / "file.bin.part").write_bytes(BODY + b"more")
    (tmp_path / "file.bin.part.version").write_text('"1"')
    assert get(served, tmp_path) == BODY


@pytest.mark.parametrize(("ranges_work", "etag"), [(False, '"1"'), (True, None), (True, 'W/"1"')])
def test_without_ranges_or_a_version_it_starts_anew(
    served: Served, tmp_path: Path, ranges_work: bool, etag: str | None
) -> None:
    served.ranges, served.etag, served.break_after = ranges_work, etag, [1_000_000, 1_500_000]
    assert get(served, tmp_path) == BODY


def test_a_wrong_checksum_leaves_nothing(served: Served, tmp_path: Path) -> None:
    fails(served, tmp_path, "wrong checksum, md5 is .* instead of 00", "md5:00")
    assert not list(tmp_path.iterdir())


def test_a_transfer_that_was_redirected_is_resumed(served: Served, tmp_path: Path) -> None:
    served.files["/real.bin"] = served.files.pop("/file.bin")
    served.redirects["/file.bin"] = ("/real.bin", {})
    served.break_after = [1_000_000]
    assert get(served, tmp_path, None) == BODY
    assert served.requests[-1] == ("/real.bin", "bytes=1000000-")


def test_a_missing_file_is_not_tried_again(served: Served, tmp_path: Path) -> None:
    served.files.clear()
    fails(served, tmp_path, "HTTP 404 Not Found; .* --input")
    assert len(served.requests) == 1


def test_a_busy_server_is_tried_again(served: Served, tmp_path: Path) -> None:
    served.failures = [503, 429]
    assert get(served, tmp_path) == BODY
    (tmp_path / "file.bin").unlink()
    served.failures = [500] * 3
    fails(served, tmp_path, "HTTP 500 .*, 3 times")


def test_a_refused_connection_is_one_line(tmp_path: Path) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}"
    fails(Served(url=url), tmp_path, "Connection refused, 3 times; check the network")


def test_a_full_disk_is_one_line_and_not_tried_again(
    served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = functools.partial(open, "/dev/full")
    monkeypatch.setattr("megatron.data.download.open", lambda path, mode: full(mode), raising=False)
    with pytest.raises(UserError, match=r"file\.bin\.part: cannot be written \(No space left on device\)"):
        get(served, tmp_path)
    assert len(served.requests) == 1


@pytest.mark.parametrize("exists", [True, False])
def test_a_link_is_followed(served: Served, tmp_path: Path, exists: bool) -> None:
    target, link = tmp_path / "disk" / "big", tmp_path / "file.bin"
    target.parent.mkdir()
    if exists:
        target.write_bytes(b"old")
    link.symlink_to("disk/big")
    assert download(f"{served.url}/file.bin", link, SHA, True, QUICK) == link
    assert link.is_symlink() and target.read_bytes() == BODY
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["big", "disk", "file.bin"]


def test_a_link_named_like_a_part_is_not_followed(served: Served, tmp_path: Path) -> None:
    (tmp_path / "mine").write_bytes(b"keep")
    (tmp_path / "file.bin.part").symlink_to("mine")
    (tmp_path / "file.bin.part.version").write_text('"1"')  # what the server has: the transfer would be resumed
    download(f"{served.url}/file.bin", tmp_path / "file.bin", SHA, False, QUICK)
    assert (tmp_path / "mine").read_bytes() == b"keep" and (tmp_path / "file.bin").read_bytes() == BODY


@pytest.mark.parametrize("name", ["file.bin.part", "file.bin.part.version", "file.bin"])
def test_a_folder_in_the_way_is_named_at_once(served: Served, tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    with pytest.raises(UserError, match=rf"{name}(: is no regular file| cannot be written: Is a directory)"):
        download(f"{served.url}/file.bin", tmp_path / "file.bin", SHA, False, QUICK)
    assert not served.requests
