"""A file server on loopback that can break off, refuse ranges, redirect and fail on demand."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class Served:
    """What the server does; tests change it between requests."""

    files: dict[str, bytes] = field(default_factory=dict)
    etag: str | None = '"1"'
    ranges: bool = True
    break_after: list[int] = field(default_factory=list)
    """Bytes of the body after which each of the next responses breaks off."""
    failures: list[int] = field(default_factory=list)
    """Status codes of the next responses."""
    redirects: dict[str, tuple[str, dict[str, str]]] = field(default_factory=dict)
    refusals: dict[str, tuple[int, dict[str, str]]] = field(default_factory=dict)
    """By path, the status and the headers of every response."""
    requests: list[tuple[str, str | None]] = field(default_factory=list)
    """Path and Range header of every request with GET."""
    tokens: list[tuple[str, str | None]] = field(default_factory=list)
    """Path and Authorization header of every request."""
    url: str = ""


@contextmanager
def serve(files: dict[str, bytes]) -> Iterator[Served]:
    """Serve `files` (by path) on a free port until the block ends."""
    served = Served(files)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            respond(self, served)

        do_HEAD = do_GET

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    served.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield served
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def respond(handler: BaseHTTPRequestHandler, served: Served) -> None:
    wanted = handler.headers.get("Range")
    served.tokens.append((handler.path, handler.headers.get("Authorization")))
    if handler.command == "GET":
        served.requests.append((handler.path, wanted))
    if served.failures:
        return handler.send_error(served.failures.pop(0))
    if handler.path in served.refusals:
        status, headers = served.refusals[handler.path]
        return head(handler, status, {"Content-Length": "0", **headers})
    if handler.path in served.redirects:
        target, headers = served.redirects[handler.path]
        return head(handler, 302, {"Location": target, "Content-Length": "0", **headers})
    if handler.path not in served.files:
        return handler.send_error(404)
    body, start = served.files[handler.path], 0
    headers = {"ETag": served.etag} if served.etag else {}
    same = handler.headers.get("If-Range") in (None, served.etag)
    if wanted and served.ranges and same:
        start = int(re.fullmatch(r"bytes=(\d+)-", wanted)[1])
        if start >= len(body):
            return head(handler, 416, {"Content-Range": f"bytes */{len(body)}", "Content-Length": "0"})
        headers["Content-Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
    head(handler, 206 if "Content-Range" in headers else 200, {**headers, "Content-Length": str(len(body) - start)})
    if handler.command == "HEAD":
        return None
    end = start + served.break_after.pop(0) if served.break_after else None
    handler.wfile.write(body[start:end])
    handler.close_connection = True
    return None


def head(handler: BaseHTTPRequestHandler, status: int, headers: dict[str, str]) -> None:
    handler.send_response(status)
    for name, value in headers.items():
        handler.send_header(name, value)
    handler.end_headers()
