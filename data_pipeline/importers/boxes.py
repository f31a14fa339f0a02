"""Boxes of a record, put into the picture as it is written.

They are scaled with it, clipped to it, and left out and counted where less than a pixel of them
remains.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from data_pipeline.faults import SkipSample

__all__ = ["check_frame", "fit_box", "fit_boxes", "read_frame"]


def fit_box(
    box: Sequence[float], frame: tuple[int, int], size: tuple[int, int]
) -> tuple[list[float] | None, bool]:
    """(x, y, w, h of `box` in a picture of `size`, whether it had to be clipped); None: too small.

    Numbers of a box that fits as it is are not touched.
    """
    x, y, w, h = box
    low = (max(x, 0), max(y, 0))
    high = (min(x + w, frame[0]), min(y + h, frame[1]))
    if not (high[0] - low[0] >= 1 and high[1] - low[1] >= 1):  # NaN as well
        return None, False
    clipped = (*low, *high) != (x, y, x + w, y + h)
    if frame == size and not clipped:
        return [x, y, w, h], False
    start, length = [], []
    for a, b, old, new in zip(low, high, frame, size, strict=True):
        # In hundredths of a pixel no box leaves the picture by rounding: its sides are whole.
        first = int(a * new / old * 100) / 100
        extent = round(min(b * new / old, new) - first, 2)
        start.append(first)
        length.append(extent)
    return [*start, *length] if min(length) > 0 else None, clipped


def check_frame(frame: tuple[int, int], whole: tuple[int, int]) -> None:
    """The picture may be another size than the annotations say, but not another shape.

    Raises: SkipSample: another shape, by more than a pixel.
    """
    (fw, fh), (w, h) = frame, whole
    if abs(w * fh - h * fw) > max(fw, fh, w, h):
        raise SkipSample(
            "record", f"the picture is {w}x{h}, the annotations are for {fw}x{fh} pixels"
        )


def fit_boxes(data: dict[str, Any], frame: tuple[int, int], size: tuple[int, int]) -> Counter[str]:
    """Puts the boxes of a record into a picture of `size` (width, height), in place; counts them.

    Args:
        frame: (width, height) that the boxes are pixels of.

    Raises: SkipSample: something that is not a box.
    """
    found: Counter[str] = Counter()
    for name in ("elems", "expressions"):
        kept = []
        for number, entry in enumerate(data.get(name, ())):
            try:
                box, clipped = fit_box(entry["bb"], frame, size)
            except (TypeError, ValueError, OverflowError):
                raise SkipSample(
                    "record", f"field '{name}[{number}].bb' is no box: {entry.get('bb')!r}"
                ) from None
            found["boxes_clipped"] += clipped
            if box is None:
                found["boxes_dropped"] += 1
            else:
                kept.append(entry | {"bb": box})
        if name in data:
            data[name] = kept
    return found


def read_frame(data: Mapping[str, Any]) -> tuple[int, int] | None:
    """(width, height) that the annotations give; None where they do not.

    Raises: SkipSample: a size without pixels.
    """
    width, height = data.get("width"), data.get("height")
    if not isinstance(width, int) or not isinstance(height, int):
        return None
    if width < 1 or height < 1:
        raise SkipSample("record", f"the annotations give a size of {width}x{height} pixels")
    return width, height
