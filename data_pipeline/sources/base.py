"""What all clients for remote files have in common: the answer, the errors, printable URLs."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol
from urllib.parse import urlsplit, urlunsplit

__all__ = [
    "CHUNK",
    "Answer",
    "Changed",
    "Source",
    "TransientFault",
    "printable",
    "redact",
    "refusal",
]

CHUNK = 1 << 18


class TransientFault(Exception):
    """One try failed in a way that may pass: connection, reset, 5xx, 429, time-out, short body.

    Args:
        cause: for people.   retry_after: seconds the server asks to wait, or 0.
    """

    def __init__(self, cause: str, retry_after: float = 0.0) -> None:
        super().__init__(cause)
        self.cause = cause
        self.retry_after = retry_after


class Changed(Exception):
    """The file is not the one that was read before: If-Match or the range was refused."""


@dataclass
class Answer:
    """What a server sends. Close it, read to the end or not.

    Attributes:
        start: position of the first byte in the file; 0 if the server ignored the range.
        total: size of the whole file, None if it is not said.   etag: its entity tag or "".
    """

    start: int
    total: int | None
    etag: str
    chunks: Iterator[bytes]
    close: Callable[[], None]


class Source(Protocol):
    """Files of one remote folder. `get` may be called by several threads at once.

    Attributes:
        ranges: whether a part of a file can be read without the rest.
    """

    ranges: bool

    def url(self, name: str) -> str:
        """Where a file is, without secrets: for messages."""
        ...

    def get(self, name: str, start: int, stop: int | None, etag: str) -> Answer:
        """Bytes start..stop of a file (to its end without stop), if it still has that tag.

        Raises:
            TransientFault: worth another try (also raised by the chunks).
            Changed: the file has another tag or is shorter.
            FileNotFoundError, PermissionError, OSError: not worth another try.
        """
        ...

    def close(self) -> None:
        """Closes idle connections."""
        ...


def printable(url: str) -> str:
    """A URL without user, password and query; of a command only its name."""
    if url.startswith("pipe:"):
        return "pipe:" + (url.removeprefix("pipe:").split() or [""])[0]
    parts = urlsplit(url)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment=""))


def redact(text: str) -> str:
    """A foreign message on one line, without what URLs in it may carry."""
    line = " ".join(text.split())
    return re.sub(r"[a-z][a-z0-9+.-]*://[^\s'\"<>]+", lambda match: printable(match[0]), line)


def refusal(status: int, url: str, retry_after: float) -> Exception:
    """The error for a status that is no success."""
    if status in (408, 425, 429) or status >= 500:
        return TransientFault(f"HTTP status {status}", retry_after)
    if status in (404, 410):
        return FileNotFoundError(f"{url}: no such file on the server (HTTP status {status})")
    if status in (401, 403, 407):
        return PermissionError(f"{url}: access refused (HTTP status {status}); check credentials")
    if status in (412, 416):
        return Changed(f"HTTP status {status}")
    return OSError(f"{url}: HTTP status {status}")
