"""A web server on 127.0.0.1 that breaks on request: range requests, entity tags, a log of what was
asked for, and scripted faults. For tests and benchmarks of remote data.

    with Loopback({"a.tar": data}) as server:
        server.script("a.tar", Cut(after=1000), Status(429, retry_after="3"))
        ...                                      # the third request of a.tar is answered in full
        assert [request.range for request in server.asked("a.tar")] == [...]
"""

from __future__ import annotations

import os
import re
import socket
import struct
import sys
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

import xxhash

__all__ = ["Cut", "Drip", "Fault", "IgnoreRange", "Loopback", "Request", "Status"]


@dataclass(frozen=True)
class Cut:
    """Ends the connection after `after` bytes of the body: by a reset, or by an orderly close."""

    after: int
    reset: bool = False


@dataclass(frozen=True)
class Status:
    """Answers with an error, or a redirect to `location`."""

    code: int
    retry_after: str = ""
    location: str = ""


@dataclass(frozen=True)
class Drip:
    """Sends `chunk` bytes at a time and calls `between` after each."""

    chunk: int
    between: Callable[[], None]


@dataclass(frozen=True)
class IgnoreRange:
    """Sends the whole file with status 200, whatever range was asked for."""


Fault = Cut | Status | Drip | IgnoreRange


@dataclass(frozen=True)
class Request:
    """One request as it arrived. `range` is (start, stop), stop None when open, or None."""

    name: str
    range: tuple[int, int | None] | None
    headers: Mapping[str, str] = field(repr=False)


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Connections break here all the time; anything else is a mistake worth a traceback."""
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)


class Loopback:
    """Serves `files` (name -> content; names are whole paths without the leading slash).

    Args:
        latency_s: waited before each answer.   bytes_per_s: of one connection; 0 is unlimited.
            Both are for benchmarks; tests leave them alone.

    Attributes:
        files: may be changed while serving; the entity tag is a hash of the content.
        requests: everything asked for, in order of arrival.   connections: how many so far.
        ranges: False answers every request in full.
    """

    def __init__(
        self, files: dict[str, bytes], *, latency_s: float = 0.0, bytes_per_s: float = 0.0
    ) -> None:
        self.files = files
        self.requests: list[Request] = []
        self.connections = 0
        self.ranges = True
        self.latency_s = latency_s
        self.bytes_per_s = bytes_per_s
        self._faults: dict[str, deque[Fault]] = defaultdict(deque)
        self._tags: dict[int, tuple[bytes, str]] = {}
        self._lock = threading.Lock()
        handler = type("Handler", (_Handler,), {"site": self})
        self._server = _Server(("127.0.0.1", 0), handler)
        self._thread = threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True
        )

    @property
    def url(self) -> str:
        """Root of the site, without a slash at the end."""
        return f"http://127.0.0.1:{self._server.server_port}"

    def script(self, name: str, *faults: Fault) -> None:
        """The next requests of a file meet these faults, one each."""
        with self._lock:
            self._faults[name].extend(faults)

    def asked(self, name: str) -> list[Request]:
        """The requests of one file."""
        with self._lock:
            return [request for request in self.requests if request.name == name]

    def tag(self, content: bytes) -> str:
        """The entity tag of a content."""
        known = self._tags.get(id(content))
        if known is None or known[0] is not content:
            known = (content, f'"{xxhash.xxh3_64_hexdigest(content)}"')
            self._tags[id(content)] = known
        return known[1]

    def connected(self) -> None:
        """Counts a connection."""
        with self._lock:
            self.connections += 1

    def arrive(self, request: Request) -> Fault | None:
        """Logs a request and gives the fault it shall meet."""
        with self._lock:
            self.requests.append(request)
            faults = self._faults[request.name]
            return faults.popleft() if faults else None

    def __enter__(self) -> Loopback:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Handler(BaseHTTPRequestHandler):
    site: Loopback
    protocol_version = "HTTP/1.1"
    timeout = 30
    disable_nagle_algorithm = True

    def setup(self) -> None:
        super().setup()
        self.site.connected()

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        asked = None
        if match:
            asked = (int(match[1]), int(match[2]) + 1 if match[2] else None)
        name = unquote(urlsplit(self.path).path).lstrip("/")
        headers = {key.lower(): value for key, value in self.headers.items()}
        fault = self.site.arrive(Request(name, asked, headers))
        if self.site.latency_s:
            time.sleep(self.site.latency_s)
        if isinstance(fault, Status):
            self._error(fault.code, fault)
        elif (content := self.site.files.get(name)) is None:
            self._error(404)
        else:
            self._send(content, asked, fault)

    def _error(self, code: int, fault: Status | None = None) -> None:
        self.send_response(code)
        if fault and fault.retry_after:
            self.send_header("Retry-After", fault.retry_after)
        if fault and fault.location:
            self.send_header("Location", fault.location)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _send(
        self, content: bytes, asked: tuple[int, int | None] | None, fault: Fault | None
    ) -> None:
        etag = self.site.tag(content)
        wanted = self.headers.get("If-Match")
        if wanted not in (None, "*", etag):
            return self._error(412)
        if asked and not isinstance(fault, IgnoreRange) and self.site.ranges:
            start, stop = asked[0], min(asked[1] or len(content), len(content))
            if start >= len(content):
                return self._error(416)
            body = content[start:stop]
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(content)}")
        else:
            body = content
            self.send_response(200)
        self.send_header("ETag", etag)
        self.send_header("Content-Length", str(len(body)))
        # S3 and its kin always send it, and their clients insist.
        self.send_header("Last-Modified", "Thu, 01 Jan 2026 00:00:00 GMT")
        self.end_headers()
        self._body(body, fault)

    def _body(self, body: bytes, fault: Fault | None) -> None:
        try:
            if isinstance(fault, Cut):
                self.wfile.write(body[: fault.after])
                self.close_connection = True
                if fault.reset:  # a close with linger 0 sends RST
                    self.wfile.flush()
                    self.connection.setsockopt(
                        socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)
                    )
                    os.close(self.connection.detach())  # at once: files of it are still open
            elif isinstance(fault, Drip) or self.site.bytes_per_s:
                chunk = fault.chunk if isinstance(fault, Drip) else 1 << 16
                for at in range(0, len(body), chunk):
                    self.wfile.write(body[at : at + chunk])
                    if isinstance(fault, Drip):
                        fault.between()
                    else:
                        time.sleep(chunk / self.site.bytes_per_s)
            else:
                self.wfile.write(body)
        except OSError:
            self.close_connection = True  # the client went away
