"""Text that users give; files that are written: what these may replace, and that they appear complete or not at all.

A regular file appears by rename. A link is followed: it stays, and the file it points to is replaced. FIFOs, terminals
and character devices, and what /proc names (/dev/stdout), are written to and stay what they are.
"""

from __future__ import annotations

import codecs
import contextlib
import errno
import fcntl
import json
import os
import secrets
import stat
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, BinaryIO

from megatron.errors import UserError

_MAX_LINKS = 40
_PART = ".part"


def read_text(
    path: str | os.PathLike[str], key: str = "", advice: str = "give a text file", limit: int | None = None
) -> str:
    """All of a text file of a user; lines end in \\n whatever they end in there, a byte order mark is left out.

    Args:
        key: the flag or key that named the file, for messages.
        limit: most bytes the file may have.

    Raises: UserError when it cannot be read, is longer, or is not UTF-8.
    """
    where = f"{key}: {path}" if key else str(path)
    try:
        with open(path, "rb") as file:
            content = file.read(-1 if limit is None else limit + 1)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{where} cannot be read: {reason}; {advice}") from None
    if limit is not None and len(content) > limit:
        raise UserError(f"{where} cannot be read: it has more than {limit:,} bytes; {advice}")
    return decode_text(content, where, advice).replace("\r\n", "\n").replace("\r", "\n")


def read_json(path: str | os.PathLike[str], advice: str) -> dict[str, Any]:
    """The JSON object in a file. Raises UserError, which ends in the advice, when there is none."""
    try:
        content = json.loads(read_text(path, advice=advice))
    except UserError:
        raise
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not a readable JSON file ({error}); {advice}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: not a JSON object; {advice}")
    return content


def decode_text(content: bytes, where: str, advice: str = "give a text file") -> str:
    """The text of these bytes, without a byte order mark; UserError about `where` when they are not UTF-8."""
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise UserError(f"{where} cannot be read: it is not UTF-8 text but UTF-16; save it as UTF-8")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(f"{where} cannot be read: it is not UTF-8 text (line {line}); {advice}") from None


@contextmanager
def write_errors(where: str, advice: str = "name another file") -> Iterator[None]:
    """Turns what a failed write raises into a UserError: `where` cannot be written, for what reason, and the advice."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{where} cannot be written: {error.strerror or error}; {advice}") from error


@contextmanager
def read_errors(where: str) -> Iterator[None]:
    """Turns what looking for a file raises (a name that is too long, no permission) into a UserError about `where`."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"{where} cannot be read: {reason}; check its name and permissions") from error


@dataclass(frozen=True)
class Output:
    """A file that a user named for output; find_output() has checked it."""

    key: str
    """The flag or key that named it, for messages."""
    path: Path
    """As the user wrote it."""
    target: Path
    """The file itself, links followed."""
    is_stream: bool
    """It is written to, not replaced, and what was written before is not read again."""

    @contextmanager
    def open(self) -> Iterator[BinaryIO]:
        """The bytes to be; a regular file has them under its name once the block ends without an error.

        Raises UserError when they cannot be written; a regular file is then as it was.
        """
        opened = _appended if self.is_stream else replaced_file
        with write_errors(f"{self.key}: {self.path}"), opened(self.target) as file:
            yield file


def find_output(path: str | os.PathLike[str], key: str, inputs: Sequence[str | os.PathLike[str] | None] = ()) -> Output:
    """Where output to `path` goes, found before the work for it is done; its folder is made, an old file stays.

    inputs: files that must not be lost by it, None for those that are not given.

    Raises: UserError when it cannot be written: a folder, a disk, a place without permission, or one of the inputs.
    """
    path = Path(path)
    if "\0" in str(path):
        raise UserError(f"{key}: the file's name has a NUL in it; name another file")
    with write_errors(f"{key}: {path}"):
        target = _followed(path)
        mode = _mode(target)
        refuse_inputs(path, key, inputs)
        if mode is not None and stat.S_ISDIR(mode):
            raise OSError(errno.EISDIR, os.strerror(errno.EISDIR))
        if mode is not None and stat.S_ISBLK(mode):
            raise UserError(f"{key}: {path} is a block device, whose content would be lost; name another file")
        is_stream = (mode is not None and not stat.S_ISREG(mode)) or _is_process_link(target)
        if is_stream and mode is None:
            raise OSError(errno.ENOENT, os.strerror(errno.ENOENT))
        if not is_stream:
            target.parent.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=target.parent).close()
        if mode is not None and not os.access(target, os.W_OK):
            raise OSError(errno.EACCES, os.strerror(errno.EACCES))
    return Output(key, path, target, is_stream)


def find_regular_output(
    path: str | os.PathLike[str], key: str, inputs: Sequence[str | os.PathLike[str] | None] = ()
) -> Path:
    """The file that output to `path` replaces, links followed, where only a regular file will do. Raises UserError."""
    output = find_output(path, key, inputs)
    if output.is_stream:
        raise UserError(f"{key}: {path} is a stream or a device; a regular file is needed there, name another one")
    return output.target


def write_output(
    path: str | os.PathLike[str],
    content: bytes | str,
    key: str,
    inputs: Sequence[str | os.PathLike[str] | None] = (),
) -> None:
    """Write all of an output at once, text as UTF-8. Raises UserError as find_output() and Output.open() do."""
    with find_output(path, key, inputs).open() as file:
        file.write(content.encode("utf-8", errors="replace") if isinstance(content, str) else content)


def refuse_inputs(path: str | os.PathLike[str], key: str, inputs: Sequence[str | os.PathLike[str] | None]) -> None:
    """Raise UserError where output to `path` would replace one of these files, under whatever name."""
    with contextlib.suppress(OSError, ValueError):
        if stat.S_ISCHR(os.stat(path).st_mode):  # a terminal is read and written
            return
    for given in inputs:
        if given is not None and _is_same_file(path, given):
            raise UserError(f"{key}: {path} is the input {given}, which would be lost; name another file")


@contextmanager
def replaced_file(path: Path) -> Iterator[BinaryIO]:
    """A new file that replaces `path` at the end, on disk and with its mode; removed when the block fails."""
    file, part = part_file(path)
    try:
        with file:
            yield file
            settle(file, path)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def settle(file: BinaryIO, path: Path) -> None:
    """Get a part file onto the disk, with the mode of the file at `path` that it will replace."""
    file.flush()
    with contextlib.suppress(FileNotFoundError):
        os.fchmod(file.fileno(), stat.S_IMODE(os.stat(path).st_mode))
    os.fsync(file.fileno())


def part_file(path: Path) -> tuple[BinaryIO, Path]:
    """A new file beside `path` for what will replace it, and its name; parts of killed processes are removed first.

    Nothing that exists is opened, not even a link of that name. A part is locked as long as its process lives.
    """
    prefix = f".{path.name[:100]}-"
    _remove_abandoned(path.parent, prefix)
    while True:
        part = path.parent / f"{prefix}{secrets.token_hex(4)}{_PART}"
        try:
            file = os.fdopen(os.open(part, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666), "w+b")
        except FileExistsError:
            continue
        with contextlib.suppress(BlockingIOError):
            if not lock(file) or os.fstat(file.fileno()).st_nlink > 0:
                return file, part
        file.close()  # another process took it for abandoned, before it was locked


def lock(file: IO[Any], wait: bool = False) -> bool:
    """Lock an open file until it is closed or the process ends, however it does; false on a file system without locks.

    Raises: BlockingIOError when another process has it, unless this one is to wait for that.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if isinstance(error, BlockingIOError) and not wait:
            raise
        return False
    return True


def open_own(path: Path) -> BinaryIO | None:
    """Open a file of ours that is read, written and kept, made if missing; None where something else has its name.

    A link is not followed, a FIFO not waited for.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        descriptor = os.open(path, flags, 0o666)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EISDIR, errno.ENXIO):
            return None
        raise
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
        return os.fdopen(descriptor, "r+b")
    os.close(descriptor)
    return None


def is_regular(path: Path) -> bool:
    """Is this a regular file, and no link to one?"""
    try:
        return stat.S_ISREG(os.lstat(path).st_mode)
    except (OSError, ValueError):
        return False


def _remove_abandoned(folder: Path, prefix: str) -> None:
    names = [name for name in os.listdir(folder) if name.startswith(prefix) and name.endswith(_PART)]
    for part in (folder / name for name in names if len(name) == len(prefix) + 8 + len(_PART)):
        if not is_regular(part):
            continue
        with contextlib.suppress(OSError), part.open("rb") as file:
            if lock(file):
                part.unlink()


def _followed(path: Path) -> Path:
    """The file at the end of a chain of links; links that name open files of a process stay as they are."""
    for _ in range(_MAX_LINKS):
        if _is_process_link(path) or not path.is_symlink():
            return path
        path = path.parent / os.readlink(path)
    raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))


def _is_process_link(path: Path) -> bool:
    return os.path.realpath(path.parent).startswith("/proc/")


def _mode(path: Path) -> int | None:
    try:
        return os.stat(path).st_mode
    except FileNotFoundError:
        return None


def _is_same_file(one: str | os.PathLike[str], other: str | os.PathLike[str]) -> bool:
    try:
        return os.path.samefile(one, other)
    except (OSError, ValueError):
        return False


def _appended(path: Path) -> AbstractContextManager[BinaryIO]:
    if os.path.realpath(path.parent) == f"/proc/{os.getpid()}/fd" and path.name.isdecimal():
        # Opened anew, a redirected stdout would have a position of its own, and both would write over each other.
        return os.fdopen(os.dup(int(path.name)), "wb")
    return os.fdopen(os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC), "wb")
