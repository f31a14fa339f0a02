"""Large JSON files, one element at a time: memory is that of one element and one chunk of text.

region_descriptions.json of Visual Genome is 700 MB, and five times that as Python objects.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

__all__ = ["read_list", "read_lists"]

_CHUNK = 1 << 20
_SPACE = " \t\r\n"
_AFTER = frozenset(" \t\r\n,:]}")


class _Reader:
    """The tokens of one file. Errors are ValueErrors that name file and position."""

    def __init__(self, file: TextIO, path: Path) -> None:
        self._file = file
        self._path = path
        self._text = ""
        self._at = 0
        self._before = 0  # characters that were dropped from the front of the text
        self._decode = json.JSONDecoder().raw_decode

    def _more(self, size: int = 0) -> bool:
        chunk = self._file.read(size or _CHUNK)
        if chunk:
            self._before += self._at
            self._text, self._at = self._text[self._at :] + chunk, 0
        return bool(chunk)

    def error(self, what: str) -> ValueError:
        """The error at this position."""
        place = self._before + self._at
        return ValueError(f"{self._path}: not valid JSON at character {place}: {what}")

    def peek(self) -> str:
        """The next character that is no space; "" at the end."""
        while True:
            while self._at < len(self._text):
                if self._text[self._at] not in _SPACE:
                    return self._text[self._at]
                self._at += 1
            if not self._more():
                return ""

    def take(self, expected: str) -> str:
        """The next character, which must be one of `expected`."""
        found = self.peek()
        if not found or found not in expected:
            raise self.error(f"expected one of {' '.join(expected)}, found {found or 'the end'}")
        self._at += 1
        return found

    def value(self) -> Any:
        """The next value, whole."""
        self.peek()
        size = _CHUNK
        while True:
            try:
                value, end = self._decode(self._text, self._at)
            except json.JSONDecodeError as error:
                if not self._more(size):
                    raise self.error(error.msg) from None
            except RecursionError:
                raise self.error("nested too deeply") from None
            else:
                # A number whose end is not seen may go on in the next chunk ("1" of "1.5").
                if self._text[end : end + 1] in _AFTER or not self._more(size):
                    self._at = end
                    return value
            size *= 2  # a value of many chunks is tried a few times only

    def elements(self) -> Iterator[Any]:
        """The elements of the list that begins here."""
        self.take("[")
        if self.peek() == "]":
            self.take("]")
            return
        while True:
            yield self.value()
            if self.take(",]") == "]":
                return

    def names(self) -> Iterator[str]:
        """The names of the object that begins here; its values must be read in between."""
        self.take("{")
        if self.peek() == "}":
            self.take("}")
            return
        while True:
            if self.peek() != '"':
                raise self.error("expected a name in double quotes")
            name = self.value()
            self.take(":")
            yield name
            if self.take(",}") == "}":
                return

    def end(self) -> None:
        """Nothing may follow."""
        if self.peek():
            raise self.error("something follows the end")


@contextmanager
def _open(path: Path) -> Iterator[_Reader]:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    with path.open(encoding="utf-8-sig") as file:
        try:
            yield _Reader(file, path)
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: not UTF-8 text: {error}") from None


def read_list(path: Path) -> Iterator[Any]:
    """The elements of a file that holds one list, in order.

    Raises: FileNotFoundError, or ValueError where it is not valid JSON or not a list.
    """
    with _open(path) as reader:
        if reader.peek() != "[":
            raise ValueError(f"{path}: expected a JSON list, the file begins with something else")
        yield from reader.elements()
        reader.end()


def read_lists(path: Path, handlers: Mapping[str, Callable[[int, Any], None]]) -> None:
    """Hands the elements of some lists in a file that holds one object to their handlers.

    Args:
        handlers: by name of the list; called with place and element, in the file's order. Other
            names are passed over.

    Raises: FileNotFoundError, or ValueError where the file is not valid JSON, not an object, or a
        list is missing or is something else.
    """
    missing = set(handlers)
    with _open(path) as reader:
        if reader.peek() != "{":
            names = ", ".join(f"'{name}'" for name in handlers)
            raise ValueError(f"{path}: expected a JSON object with {names}")
        for name in reader.names():
            if name not in handlers:
                reader.value()
                continue
            missing.discard(name)
            if reader.peek() != "[":
                raise ValueError(f"{path}: key '{name}' must be a list")
            for place, element in enumerate(reader.elements()):
                handlers[name](place, element)
        reader.end()
    for name in handlers:
        if name in missing:
            raise ValueError(f"{path}: key '{name}' is missing; it must be a list")
