"""How far a long job is: a bar on a terminal, lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from typing import TypeVar

__all__ = ["progress"]

T = TypeVar("T")


def progress(
    items: Iterable[T],
    total: int,
    label: str,
    unit: str,
    size: Callable[[T], int] = lambda _: 1,
    interval: float = 10.0,
) -> Iterator[T]:
    """Pass items on and show how far they are (stderr): a bar on a terminal, else lines.

    Args:
        total: sum of the sizes of all items, in `unit`.   size: how much one item is.
        interval: seconds between two lines.
    """
    if sys.stderr.isatty():
        from tqdm import tqdm

        with tqdm(total=total, desc=label, unit=unit) as bar:
            for item in items:
                bar.update(size(item))
                yield item
        return
    begun = said = time.monotonic()
    done = 0
    for item in items:
        done += size(item)
        now = time.monotonic()
        if now - said >= interval or done >= total:
            rate = done / max(now - begun, 1e-9)
            left = timedelta(seconds=round((total - done) / rate)) if rate else "unknown"
            ahead = f", {left} left" if done < total else ""
            print(f"{label}: {done}/{total} {unit} ({rate:.3g}/s{ahead})", file=sys.stderr)
            sys.stderr.flush()
            said = now
        yield item
