"""Files on a web server, read with http.client: nothing to install, and safe to fork."""

from __future__ import annotations

import base64
import http.client
import re
import ssl
import threading
import urllib.request
from collections.abc import Iterator
from email.utils import parsedate_to_datetime
from time import time
from urllib.parse import quote, unquote, urljoin, urlsplit, urlunsplit

from data_pipeline.sources.base import (
    CHUNK,
    Answer,
    TransientFault,
    printable,
    redact,
    refusal,
)

__all__ = ["HttpSource"]

_REDIRECTS = (301, 302, 303, 307, 308)
_MAX_REDIRECTS = 5


def _retry_after(value: str | None) -> float:
    """Seconds of a Retry-After header: a number or a date."""
    if not value:
        return 0.0
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time())
    except ValueError:
        return 0.0


def _describe(error: Exception) -> str:
    if isinstance(error, TimeoutError):
        return "time-out"
    return redact(f"{type(error).__name__}: {error}".rstrip(": "))


class HttpSource:
    """A folder on a web server. Connections are kept and shared by the threads of the process."""

    ranges = True

    def __init__(self, location: str, timeout_s: float) -> None:
        parts = urlsplit(location)
        if not parts.hostname:
            raise ValueError(f"{printable(location)}: the URL has no host")
        user, _, host = parts.netloc.rpartition("@")
        self._parts = parts._replace(netloc=host, fragment="")
        self._headers = {"Accept-Encoding": "identity", "User-Agent": "espalier"}
        if user:
            token = base64.b64encode(unquote(user).encode()).decode()
            self._headers["Authorization"] = f"Basic {token}"
        self._timeout_s = timeout_s
        self._idle: dict[tuple[str, str], list[http.client.HTTPConnection]] = {}
        self._lock = threading.Lock()

    def url(self, name: str) -> str:
        return printable(self._address(name))

    def _address(self, name: str) -> str:
        path = f"{self._parts.path.rstrip('/')}/{quote(name)}"
        return urlunsplit(self._parts._replace(path=path))

    def get(self, name: str, start: int, stop: int | None, etag: str) -> Answer:
        headers = dict(self._headers)
        if start or stop is not None:
            headers["Range"] = f"bytes={start}-{'' if stop is None else stop - 1}"
        if etag and not etag.startswith("W/"):  # a weak tag never matches: RFC 9110, 13.1.1
            headers["If-Match"] = etag
        address = self._address(name)
        for _ in range(_MAX_REDIRECTS + 1):
            place, connection, response = self._exchange(address, headers)
            if response.status not in _REDIRECTS:
                return self._answer(name, start, place, connection, response)
            target = urljoin(address, response.headers.get("Location", ""))
            response.close()
            connection.close()
            before, after = urlsplit(address), urlsplit(target)
            if after.scheme not in ("https", before.scheme):
                raise OSError(f"{self.url(name)}: redirected to {printable(target)}: not followed")
            if after.netloc != before.netloc:
                headers.pop("Authorization", None)
            address = target
        raise OSError(f"{self.url(name)}: more than {_MAX_REDIRECTS} redirects")

    def _exchange(
        self, address: str, headers: dict[str, str]
    ) -> tuple[tuple[str, str], http.client.HTTPConnection, http.client.HTTPResponse]:
        """Sends a request and reads the head of the response."""
        parts = urlsplit(address)
        place = (parts.scheme, parts.netloc)
        target = urlunsplit(("", "", parts.path or "/", parts.query, ""))
        while True:
            with self._lock:
                kept = self._idle.get(place)
                connection = kept.pop() if kept else None
            reused = connection is not None
            try:
                if connection is None:
                    connection = self._connect(*place)
                proxied = getattr(connection, "absolute_targets", False)
                connection.request("GET", address if proxied else target, headers=headers)
                return place, connection, connection.getresponse()
            except (http.client.HTTPException, OSError) as error:
                if connection is not None:
                    connection.close()
                if reused and isinstance(error, (ConnectionError, http.client.BadStatusLine)):
                    continue  # the server had closed a kept connection: no fault
                if isinstance(error, ssl.SSLCertVerificationError):
                    raise OSError(
                        f"{printable(address)}: certificate not trusted ({error.verify_message}); "
                        "set SSL_CERT_FILE to the certificates of your site"
                    ) from None
                raise TransientFault(_describe(error)) from None

    def _connect(self, scheme: str, netloc: str) -> http.client.HTTPConnection:
        """A new connection, through the environment's proxy if there is one for this host."""
        host = urlsplit(f"//{netloc}").hostname or ""
        proxy = urllib.request.getproxies().get(scheme)
        if proxy and urllib.request.proxy_bypass(host):
            proxy = None
        via = urlsplit(proxy if "://" in proxy else f"//{proxy}") if proxy else None
        to = netloc if via is None else via.netloc.rpartition("@")[2]
        if scheme == "https":
            connection = http.client.HTTPSConnection(to, timeout=self._timeout_s)
        else:
            connection = http.client.HTTPConnection(to, timeout=self._timeout_s)
        if via is not None and scheme == "https":
            user = via.netloc.rpartition("@")[0]
            token = base64.b64encode(unquote(user).encode()).decode()
            connection.set_tunnel(
                netloc, headers={"Proxy-Authorization": f"Basic {token}"} if user else None
            )
        connection.absolute_targets = via is not None and scheme == "http"  # pyright: ignore
        return connection

    def _answer(
        self, name: str, start: int, place: tuple[str, str],
        connection: http.client.HTTPConnection, response: http.client.HTTPResponse,
    ) -> Answer:  # fmt: skip
        """Checks the head of a response; the answer closes or keeps the connection."""
        first, total, length = 0, response.length, response.length
        finished = length == 0

        def close() -> None:
            keep = finished and not response.will_close
            response.close()
            if not keep:
                return connection.close()
            with self._lock:
                self._idle.setdefault(place, []).append(connection)

        def chunks() -> Iterator[bytes]:
            nonlocal finished
            left = length
            try:
                while left is None or left > 0:
                    # Not read(): it would wait for the whole amount, however slowly that comes.
                    chunk = response.read1(CHUNK if left is None else min(CHUNK, left))
                    left = None if left is None else left - len(chunk)
                    # Known before the last bytes are handed on: who has them may not come back.
                    finished = left == 0 or (left is None and not chunk)
                    if not chunk:
                        break
                    yield chunk
            except (http.client.HTTPException, OSError) as error:
                raise TransientFault(_describe(error)) from None

        try:
            if response.status not in (200, 206):
                wait = _retry_after(response.headers.get("Retry-After"))
                raise refusal(response.status, self.url(name), wait)
            if response.headers.get("Content-Encoding", "identity") != "identity":
                raise OSError(f"{self.url(name)}: the server sends it compressed; turn that off")
            if response.status == 206:
                said = response.headers.get("Content-Range", "")
                match = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", said)
                if match is None or int(match[1]) != start:
                    raise TransientFault(f"a wrong range in the answer ('{said}')")
                first, total = start, None if match[2] == "*" else int(match[2])
        except BaseException:
            close()
            raise
        return Answer(first, total, response.headers.get("ETag", ""), chunks(), close)

    def close(self) -> None:
        with self._lock:
            kept = [connection for place in self._idle.values() for connection in place]
            self._idle.clear()
        for connection in kept:
            connection.close()
