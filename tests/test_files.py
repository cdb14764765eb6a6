"""What is written under a name that a user chose: whole or not at all, and nothing else is lost by it."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import threading
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest

from megatron.errors import UserError
from megatron.files import find_output, find_regular_output, lock, open_own, part_file, write_output

NULL, FULL = os.makedev(1, 3), os.makedev(1, 7)


def node(path: Path, kind: int, device: int) -> Path:
    """A device node of our own; the real ones are never opened."""
    try:
        os.mknod(path, kind | 0o666, device)
        path.open("ab").close() if kind == stat.S_IFCHR else None
    except PermissionError:
        pytest.skip("device nodes need root and a file system that allows them")
    return path


def read_in_thread(path: Path, found: list[bytes]) -> threading.Thread:
    thread = threading.Thread(target=lambda: found.append(path.read_bytes()), daemon=True)
    thread.start()
    return thread


def test_a_file_is_replaced_whole_and_keeps_its_mode(tmp_path: Path) -> None:
    path, umask = tmp_path / "deep" / "out", os.umask(0o026)
    try:
        write_output(path, "one", "-o")
    finally:
        os.umask(umask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    path.chmod(0o604)
    with pytest.raises(RuntimeError), find_output(path, "-o").open() as file:
        file.write(b"half")
        raise RuntimeError
    assert path.read_bytes() == b"one" and os.listdir(path.parent) == ["out"]
    before = path.stat().st_ino
    write_output(path, "two", "-o")
    assert path.read_bytes() == b"two" and path.stat().st_ino != before
    assert stat.S_IMODE(path.stat().st_mode) == 0o604 and os.listdir(path.parent) == ["out"]


@pytest.mark.parametrize("exists", [True, False])
def test_a_link_is_followed(tmp_path: Path, exists: bool) -> None:
    target, link = tmp_path / "there" / "target", tmp_path / "link"
    if exists:
        target.parent.mkdir()
        target.write_text("old")
    (tmp_path / "middle").symlink_to("there/target")
    link.symlink_to(tmp_path / "middle")
    write_output(link, "new", "-o")
    assert link.is_symlink() and target.read_text() == "new" and not target.is_symlink()


def test_a_fifo_and_a_device_are_written_to(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "link").symlink_to("fifo")
    for name in ("fifo", "link"):
        found: list[bytes] = []
        reader = read_in_thread(tmp_path / "fifo", found)
        write_output(tmp_path / name, "text", "-o")
        reader.join(10)
        assert found == [b"text"] and stat.S_ISFIFO((tmp_path / "fifo").stat().st_mode)
    null = node(tmp_path / "null", stat.S_IFCHR, NULL)
    write_output(null, "text", "-o")
    assert stat.S_ISCHR(null.stat().st_mode) and sorted(os.listdir(tmp_path)) == ["fifo", "link", "null"]


def test_what_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    full = node(tmp_path / "full", stat.S_IFCHR, FULL)
    disk = node(tmp_path / "disk", stat.S_IFBLK, os.makedev(7, 250))
    (tmp_path / "file").write_text("")
    (tmp_path / "loop").symlink_to("loop")
    cases = {
        full: "full cannot be written: No space left",
        disk: "disk is a block device",
        tmp_path: "cannot be written: Is a directory",
        tmp_path / "file" / "out": "cannot be written: (Not a directory|File exists)",
        tmp_path / "loop": "cannot be written: Too many levels",
        Path("/proc/self/fd/none"): "cannot be written: No such file",
        tmp_path / "nul\0": "has a NUL in it",
        tmp_path / ("x" * 300): "cannot be written: File name too long",
    }
    for path, message in cases.items():
        with pytest.raises(UserError, match=f"-o: .*{message}"):
            write_output(path, "text", "-o")
        with pytest.raises(UserError) if path != full else nullcontext():
            find_output(path, "-o")  # all but a full device is found before the work
    assert sorted(os.listdir(tmp_path)) == ["disk", "file", "full", "loop"]


@pytest.mark.parametrize("name", ["/proc/self/fd/{}", "/dev/fd/{}", "link"])
def test_an_open_file_of_this_process_is_written_on(tmp_path: Path, name: str) -> None:
    path = tmp_path / "log"
    with path.open("wb", buffering=0) as file:
        file.write(b"before\n")
        (tmp_path / "link").symlink_to(f"/dev/fd/{file.fileno()}")
        write_output(tmp_path / name.format(file.fileno()), "output\n", "-o")
        file.write(b"after\n")
    assert path.read_bytes() == b"before\noutput\nafter\n"


def same(folder: Path) -> Path:
    return folder / "in"


def other_spelling(folder: Path) -> Path:
    return folder / "sub" / ".." / "in"


def symbolic(folder: Path) -> Path:
    (folder / "out").symlink_to("in")
    return folder / "out"


def hard(folder: Path) -> Path:
    os.link(folder / "in", folder / "out")
    return folder / "out"


@pytest.mark.parametrize("name", [same, other_spelling, symbolic, hard], ids=lambda f: f.__name__)
def test_an_input_is_never_replaced(tmp_path: Path, name: Callable[[Path], Path]) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "in").write_text("prompts")
    with pytest.raises(UserError, match="-o: .* is the input .*in, which would be lost"):
        write_output(name(tmp_path), "text", "-o", [None, tmp_path / "absent", tmp_path / "in"])
    assert (tmp_path / "in").read_text() == "prompts"


def test_a_fifo_is_not_read_and_written(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(UserError, match="is the input"):
        find_output(tmp_path / "fifo", "-o", [tmp_path / "fifo"])
    with pytest.raises(UserError, match="is a stream or a device"):
        find_regular_output(tmp_path / "fifo", "-o")


def test_parts_of_killed_processes_are_removed_and_those_of_living_ones_kept(tmp_path: Path) -> None:
    abandoned, living = tmp_path / ".out-00000000.part", tmp_path / ".out-11111111.part"
    strange, others = tmp_path / ".out-22222222.part", tmp_path / ".out-mine.part"
    for path in (abandoned, living, others):
        path.write_text("x")
    strange.symlink_to(others)
    with living.open("rb") as owner:
        fcntl.flock(owner, fcntl.LOCK_EX)
        file, part = part_file(tmp_path / "out")
        file.close()
    part.unlink()
    assert sorted(os.listdir(tmp_path)) == sorted([living.name, strange.name, others.name])
    assert others.read_text() == "x"


def test_a_lock_is_one_process_at_a_time_and_asks_for_nothing_where_there_are_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "lock"
    with path.open("w") as first, path.open("w") as second:
        assert lock(first)
        with pytest.raises(BlockingIOError):
            lock(second)
        first.close()
        assert lock(second, wait=True)

    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with path.open("w") as file:
        assert not lock(file) and not lock(file, wait=True)


def test_a_link_or_folder_named_like_ours_is_not_opened(tmp_path: Path) -> None:
    (tmp_path / "target").write_text("keep")
    (tmp_path / "link").symlink_to("target")
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "fifo")
    assert [open_own(tmp_path / name) for name in ("link", "folder", "fifo")] == [None, None, None]
    file = open_own(tmp_path / "new")
    assert file is not None
    file.close()
