"""Files in an object store (s3, gs, az), read with obstore.

obstore's runtime does not survive a fork: a child that inherits one waits for ever. So it is
started where it is first used, and a process that finds its parent's says so instead of hanging.
"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

from data_pipeline.sources.base import (
    Answer,
    Changed,
    TransientFault,
    printable,
    redact,
    refusal,
)

__all__ = ["CloudSource"]

# obstore's runtime is one per process, and dropping a store in a child of that process may hang:
# stores live as long as the process.
_stores: dict[tuple[str, float], Any] = {}
_stores_pid = 0
_stores_lock = threading.Lock()


class CloudSource:
    """A folder in an object store, read with obstore. Its own retries are off: they would start
    over where ours go on, and cannot be seen.
    """

    ranges = True

    def __init__(self, location: str, timeout_s: float) -> None:
        try:
            import obstore  # noqa: F401
        except ImportError:
            raise ValueError(
                f"{printable(location)}: this kind of data folder needs obstore; "
                "run: pip install 'espalier[remote]'"
            ) from None
        self._location = location.rstrip("/")
        self._timeout_s = timeout_s

    def url(self, name: str) -> str:
        return printable(f"{self._location}/{name}")

    def _store(self) -> Any:
        global _stores_pid
        with _stores_lock:
            if _stores and _stores_pid != os.getpid():
                raise RuntimeError(
                    f"{printable(self._location)}: the process that this one was forked from has "
                    "used obstore already, which does not survive a fork; start data workers with "
                    "multiprocessing_context='forkserver' or 'spawn'"
                )
            _stores_pid = os.getpid()
            key = (self._location, self._timeout_s)
            if key not in _stores:
                _stores[key] = self._make_store()
            return _stores[key]

    def _make_store(self) -> Any:
        from obstore.store import from_url

        plain = any(
            os.environ.get(f"{cloud}_ALLOW_HTTP", "").lower() in ("1", "true")
            for cloud in ("AWS", "AZURE", "GOOGLE")
        )
        wait = timedelta(seconds=self._timeout_s)
        try:
            return from_url(
                self._location,
                # `timeout` is of a whole answer; each of its parts is watched by read_timeout.
                client_options={
                    "allow_http": plain,
                    "connect_timeout": wait,
                    "read_timeout": wait,
                    "timeout": timedelta(days=1),
                },
                retry_config={"max_retries": 0},
            )
        except Exception as error:
            raise ValueError(
                f"{printable(self._location)}: {redact(str(error).split('Debug source')[0])}"
            ) from None

    def get(self, name: str, start: int, stop: int | None, etag: str) -> Answer:
        import obstore

        options: dict[str, Any] = {}
        if stop is not None:
            options["range"] = (start, stop)
        elif start:
            options["range"] = {"offset": start}
        if etag and not etag.startswith("W/"):
            options["if_match"] = etag
        store = self._store()
        try:
            result = obstore.get(store, name, options=options)  # pyright: ignore
        except Exception as error:
            raise self._translate(name, error) from None
        # What arrived is handed on at once: a fault later on would take what is held back with it.
        stream = iter(result.stream(min_chunk_size=1))

        def chunks() -> Iterator[bytes]:
            while True:
                try:
                    chunk = next(stream, None)
                except Exception as error:
                    raise self._translate(name, error) from None
                if chunk is None:
                    return
                yield bytes(chunk)

        meta = result.meta
        return Answer(
            result.range[0], meta["size"], meta["e_tag"] or "", chunks(), lambda: None
        )  # fmt: skip

    def _translate(self, name: str, error: Exception) -> Exception:
        """Our error for obstore's. It gives no status but in its text, and no Retry-After."""
        from obstore import exceptions

        url = self.url(name)
        text = redact(str(error).split("Debug source")[0])
        if isinstance(error, FileNotFoundError):
            return FileNotFoundError(f"{url}: no such object")
        refused = (exceptions.PermissionDeniedError, exceptions.UnauthenticatedError)
        if isinstance(error, (PermissionError, *refused)):
            return PermissionError(f"{url}: access refused; check credentials ({text})")
        if isinstance(error, exceptions.PreconditionError):
            return Changed(text)
        if not isinstance(error, exceptions.GenericError):
            return OSError(f"{url}: {text}")
        status = re.search(r"status code: (\d{3})", text)
        if status is None:
            return TransientFault(text)
        translated = refusal(int(status[1]), url, 0.0)
        return TransientFault(text) if isinstance(translated, TransientFault) else translated

    def close(self) -> None:
        pass  # see _stores
