"""A folder on a file system that is really slow: FUSE, served from a thread, so many bytes a second and no more."""

from __future__ import annotations

import ctypes
import errno
import os
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_ROOT = 1
_MAX_WRITE = 128 << 10
_DETACH = 2
# Operations of the kernel's fuse.h; all others are answered with "not implemented".
_LOOKUP, _FORGET, _GETATTR, _SETATTR, _UNLINK, _OPEN, _WRITE, _STATFS = 1, 2, 3, 4, 10, 14, 16, 17
_RELEASE, _FSYNC, _FLUSH, _INIT, _CREATE, _INTERRUPT, _BATCH_FORGET = 18, 20, 25, 26, 35, 36, 42


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


class _Server:
    """Files of which only the size is kept."""

    def __init__(self, device: int, rate: float) -> None:
        self._device, self._rate = device, rate
        self._names: dict[bytes, int] = {}
        self._sizes: dict[int, int] = {}

    def serve(self) -> None:
        """Answer the kernel until the file system is unmounted."""
        while True:
            try:
                request = os.read(self._device, _MAX_WRITE + 4096)
            except OSError:
                return
            _, operation, number, node = struct.unpack_from("<IIQQ", request)
            if operation in (_FORGET, _BATCH_FORGET, _INTERRUPT):
                continue
            try:
                answer, code = self._answer(operation, node, request[40:]), 0
            except OSError as error:
                answer, code = b"", -(error.errno or errno.EIO)
            try:
                os.write(self._device, struct.pack("<IiQ", 16 + len(answer), code, number) + answer)
            except OSError:  # the one who asked has gone
                continue

    def _answer(self, operation: int, node: int, body: bytes) -> bytes:
        if operation == _INIT:
            return struct.pack("<IIIIHHIIHHII", 7, 31, 0, 0, 1, 1, _MAX_WRITE, 1, 32, 0, 0, 0).ljust(64, b"\0")
        if operation == _WRITE:
            _, offset, size = struct.unpack_from("<QQI", body)
            time.sleep(size / self._rate)
            self._sizes[node] = max(self._sizes[node], offset + size)
            return struct.pack("<II", size, 0)
        if operation == _CREATE:
            name = body[16:].rstrip(b"\0")
            self._names[name] = node = len(self._sizes) + 2
            self._sizes[node] = 0
            return self._entry(node) + bytes(16)
        if operation == _LOOKUP:
            return self._entry(self._find(body))
        if operation == _UNLINK:
            del self._names[body.rstrip(b"\0")]
            return b""
        if operation in (_GETATTR, _SETATTR):
            return struct.pack("<QII", 0, 0, 0) + self._attributes(node)
        if operation == _STATFS:
            return struct.pack("<QQQQQIIII", *[10**7] * 5, 4096, 255, 4096, 0).ljust(80, b"\0")
        if operation in (_OPEN, _RELEASE, _FSYNC, _FLUSH):
            return bytes(16) if operation == _OPEN else b""
        raise OSError(errno.ENOSYS, "")

    def _find(self, body: bytes) -> int:
        if (node := self._names.get(body.rstrip(b"\0"))) is None:
            raise OSError(errno.ENOENT, "")
        return node

    def _entry(self, node: int) -> bytes:
        return struct.pack("<QQQQII", node, 0, 0, 0, 0, 0) + self._attributes(node)

    def _attributes(self, node: int) -> bytes:
        mode, size = (0o40777, 0) if node == _ROOT else (0o100600, self._sizes[node])
        return struct.pack("<6Q10I", node, size, size // 512, 0, 0, 0, 0, 0, 0, mode, 1, os.getuid(), 0, 0, 4096, 0)


@contextmanager
def slow_disk(folder: Path, rate: float) -> Iterator[None]:
    """Inside, `folder` takes `rate` bytes a second. Raises OSError where FUSE or the right to mount is missing."""
    device = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    try:
        options = f"fd={device},rootmode=40000,user_id={os.getuid()},group_id={os.getgid()},allow_other"
        if _libc().mount(b"slow", os.fsencode(folder), b"fuse", 0, options.encode()):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(folder))
        threading.Thread(target=_Server(device, rate).serve, daemon=True).start()
        try:
            yield
        finally:
            _libc().umount2(os.fsencode(folder), _DETACH)
    finally:
        os.close(device)
