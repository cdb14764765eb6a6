"""Files over HTTP: resumed after an interruption, verified, and under their final name only when complete.

While a file comes in, `NAME.part` holds its bytes and `NAME.part.version` the server's ETag (or date) of it, so that a
later call asks only for the rest, and only of the same version.
"""

from __future__ import annotations

import hashlib
import http.client
import os
import re
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from megatron.errors import UserError
from megatron.files import find_regular_output, is_regular

_CHUNK = 1 << 20
_WAITING_STATUS = {408, 425, 429, 500, 502, 503, 504}


@dataclass(frozen=True)
class Patience:
    """How long a transfer is tried: attempts in a row without a new byte, the first pause, the socket's timeout."""

    attempts: int = 6
    pause: float = 1.0
    """Seconds; doubled after every further failure."""
    timeout: float = 60.0


def download(
    url: str,
    path: Path,
    checksum: str | None = None,
    force: bool = False,
    patience: Patience | None = None,
    token: str | None = None,
    flag: str = "--input",
) -> Path:
    """Fetch `url` to `path`, unless that file exists already and `force` is false.

    checksum: "sha256:HEX" or "md5:HEX" of the file; without it, only the length is checked. token: for this server, not
    for one that it redirects to. flag: the command's, for files that are on this disk. Raises UserError if the file
    cannot be had or fails the check; then nothing is left under `path`, and an interrupted transfer is resumed by the
    next call.
    """
    if path.is_file() and not force:
        return path
    target = find_regular_output(path, "--data-dir")
    partial = _Partial(target.with_name(target.name + ".part"))
    if force:
        partial.discard()
    _fetch(url, partial, patience or Patience(), token, flag)
    try:
        verify(partial.path, checksum, url)
    except UserError:
        partial.discard()
        raise
    os.replace(partial.path, target)
    partial.discard()
    return path


def verify(path: Path, checksum: str | None, source: str) -> None:
    """Raise UserError unless the file has this checksum ("algorithm:HEX"; None: anything goes)."""
    if checksum is None:
        return
    algorithm, _, expected = checksum.partition(":")
    with open(path, "rb") as file:
        found = hashlib.file_digest(file, algorithm).hexdigest()
    if found != expected:
        raise UserError(
            f"{source}: wrong checksum, {algorithm} is {found} instead of {expected}; the file was removed, try again"
        )


class _Partial:
    """The bytes received so far and the version of the file that they belong to."""

    def __init__(self, path: Path) -> None:
        self.path, self._version = path, path.with_name(path.name + ".version")
        for own in (self.path, self._version):
            if own.is_symlink():  # not ours: written to, it would change another file
                own.unlink()
            if own.exists() and not is_regular(own):
                raise UserError(f"{own}: is no regular file; move it away, the download needs this name")

    @property
    def size(self) -> int:
        return self.path.stat().st_size if self.path.exists() else 0

    @property
    def headers(self) -> dict[str, str]:
        """Of a request for the missing bytes; empty if there is nothing to resume."""
        if not self.size or not self._version.exists():
            return {}
        return {"Range": f"bytes={self.size}-", "If-Range": self._version.read_text(encoding="latin-1")}

    def start(self, version: str | None) -> None:
        """Forget what is there; new bytes are of this version (None: they cannot be resumed)."""
        self.discard()
        if version:
            self._version.write_text(version, encoding="latin-1")

    def discard(self) -> None:
        """Remove both files."""
        self.path.unlink(missing_ok=True)
        self._version.unlink(missing_ok=True)


def _fetch(url: str, partial: _Partial, patience: Patience, token: str | None, flag: str) -> None:
    """Transfer until complete, with pauses between failures."""
    failures = 0
    while True:
        before = partial.size
        try:
            return _transfer(url, partial, patience.timeout, token)
        except urllib.error.HTTPError as error:
            problem = f"HTTP {error.code} {error.reason}"
            if error.code not in _WAITING_STATUS:
                raise UserError(f"{url}: {problem}; the address may have moved, pass the files with {flag}") from error
        except (OSError, http.client.HTTPException) as error:
            problem = str(getattr(error, "reason", error)) or type(error).__name__
        failures = 1 if partial.size > before else failures + 1
        if failures >= patience.attempts:
            raise UserError(f"{url}: {problem}, {failures} times; check the network, the same command resumes")
        time.sleep(patience.pause * 2 ** (failures - 1))


def _transfer(url: str, partial: _Partial, timeout: float, token: str | None) -> None:
    """Ask for the bytes that are missing, once; raises OSError or HTTPException if they end early."""
    headers = {"User-Agent": "megatron-tokenformer", "Accept-Encoding": "identity", **partial.headers}
    request = urllib.request.Request(url, headers=headers)
    if token:
        request.add_unredirected_header("Authorization", f"Bearer {token}")
    try:
        response = urllib.request.urlopen(request, timeout=timeout)
    except urllib.error.HTTPError as error:
        if error.code != 416:  # nothing lies beyond what is there: it is complete, or of another version
            raise
        if error.headers.get("Content-Range") == f"bytes */{partial.size}":
            return
        partial.discard()
        raise ConnectionError("the file has changed") from error
    with response:
        total = _total_size(response, partial)
        _save(response, partial.path, total, url)
    if total is not None and partial.size != total:
        raise ConnectionError(f"ended after {partial.size} of {total} bytes")


def _total_size(response: Any, partial: _Partial) -> int | None:
    """The length of the whole file if known; what is there stays only if the response continues it."""
    span = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", response.headers.get("Content-Range", ""))
    if response.status == 206 and span and int(span[1]) == partial.size:
        return int(span[2])
    if response.status == 206:
        partial.discard()
        raise ConnectionError("the server sent another range than was asked for")
    etag = response.headers.get("ETag", "")
    partial.start(etag if etag.startswith('"') else response.headers.get("Last-Modified"))
    length = response.headers.get("Content-Length")
    return int(length) if length else None


def _save(response: Any, path: Path, total: int | None, url: str) -> None:
    """Append the response's body to `path`, with a progress bar."""
    with (
        open(path, "ab") as file,
        tqdm(total=total, initial=file.tell(), unit="B", unit_scale=True, desc=url.rpartition("/")[2]) as bar,
    ):
        while chunk := response.read(_CHUNK):
            try:
                file.write(chunk)
                file.flush()
            except OSError as error:
                raise UserError(f"{path}: cannot be written ({error.strerror}); the same command resumes") from error
            bar.update(len(chunk))
