"""Small charts as SVG text: points, lines, grouped bars and kept-share bars. No network, no
scripts, no fonts.

Every chart carries a description for readers who cannot see it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

__all__ = [
    "GRID",
    "INK",
    "MUTED",
    "Point",
    "grouped_bars",
    "histogram",
    "kept_bars",
    "lines",
    "nice_ticks",
    "points",
]

INK, MUTED, GRID = "#26302b", "#68736d", "#e4e8e5"
_FEW = 12  # a curve of so few values shows each


@dataclass(frozen=True)
class Point:
    """One model in a plot: position, spread along x, and how it is drawn."""

    name: str
    x: float
    y: float
    colour: str
    low: float | None = None
    high: float | None = None


def nice_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers covering [low, high], about `count` of them, 1, 2 or 5 times a power of ten
    apart.
    """
    if not math.isfinite(low) or not math.isfinite(high):
        return [0.0, 1.0]
    if high <= low:
        high = low + (abs(low) or 1.0) * 0.1
    raw = (high - low) / max(count - 1, 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [index * step for index in range(first, last + 1)]


def _number(value: float) -> str:
    if value == 0:
        return "0"
    if abs(value) >= 10_000:
        return f"{value / 1000:g}k"
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"


def _percent(value: float) -> str:
    return (
        f"{100 * value:g}%"
        if abs(100 * value - round(100 * value)) > 1e-6
        else f"{round(100 * value)}%"
    )


def _text(x: float, y: float, text: str, anchor: str = "middle", extra: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" {extra}>{escape(text)}</text>'


def _svg(width: float, height: float, label: str, body: Sequence[str]) -> str:
    return (
        f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{escape(label, quote=True)}" '
        f'xmlns="http://www.w3.org/2000/svg" font-size="12" fill="{INK}">'
        f"<title>{escape(label)}</title>{''.join(body)}</svg>"
    )


@dataclass(frozen=True)
class _Frame:
    """Maps values to pixels inside margins, and draws the axes."""

    x_ticks: list[float]
    y_ticks: list[float]
    width: float = 480
    height: float = 290
    left: float = 54
    right: float = 16
    top: float = 16
    bottom: float = 44
    x_end: float | None = None  # where the axis ends, when not at the last tick

    def x(self, value: float) -> float:
        low, high = self.x_ticks[0], self.x_end or self.x_ticks[-1]
        return self.left + (value - low) / (high - low) * (self.width - self.left - self.right)

    def y(self, value: float) -> float:
        low, high = self.y_ticks[0], self.y_ticks[-1]
        return (
            self.height
            - self.bottom
            - (value - low) / (high - low) * (self.height - self.top - self.bottom)
        )

    def axes(self, x_label: str, y_label: str, percent_y: bool, with_x: bool = True) -> list[str]:
        body, floor = [], self.height - self.bottom
        for tick in self.y_ticks:
            y = self.y(tick)
            body.append(
                f'<line x1="{self.left}" x2="{self.width - self.right}" y1="{y:.1f}" y2="{y:.1f}" stroke="{GRID}"/>'
            )
            label = _percent(tick) if percent_y else _number(tick)
            body.append(_text(self.left - 8, y + 4, label, "end", f'fill="{MUTED}"'))
        for tick in self.x_ticks if with_x else ():
            body.append(_text(self.x(tick), floor + 17, _number(tick), extra=f'fill="{MUTED}"'))
        body.append(
            f'<line x1="{self.left}" x2="{self.width - self.right}" y1="{floor}" y2="{floor}" stroke="{MUTED}"/>'
        )
        middle = (self.left + self.width - self.right) / 2
        if x_label:
            body.append(_text(middle, self.height - 8, x_label, extra=f'fill="{MUTED}"'))
        turn = (self.top + floor) / 2
        body.append(
            _text(13, turn, y_label, extra=f'fill="{MUTED}" transform="rotate(-90 13 {turn:.1f})"')
            if y_label
            else ""
        )
        return body


def points(data: Sequence[Point], x_label: str, y_label: str, label: str) -> str:
    """Accuracy (0..1) against a positive cost; a bar shows the spread of the cost."""
    highest = max([p.high or p.x for p in data] + [p.x for p in data])
    lowest = min(p.y for p in data)
    top = max(p.y for p in data)
    margin = max((top - lowest) * 0.4, 0.02)
    y_ticks = [
        tick
        for tick in nice_ticks(max(0.0, lowest - margin), min(1.0, top + margin), 5)
        if tick <= 1.0001
    ]
    frame = _Frame(nice_ticks(0.0, highest * 1.12), y_ticks)
    body = frame.axes(x_label, y_label, True)
    half = (frame.left + frame.width - frame.right) / 2
    for p in sorted(data, key=lambda p: p.x):
        x, y = frame.x(p.x), frame.y(p.y)
        if p.low is not None and p.high is not None:
            a, b = frame.x(p.low), frame.x(p.high)
            body.append(
                f'<path d="M{a:.1f} {y:.1f}H{b:.1f}M{a:.1f} {y - 4:.1f}v8M{b:.1f} {y - 4:.1f}v8" '
                f'stroke="{p.colour}" stroke-width="1.5" fill="none"/>'
            )
        body.append(
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="7" fill="{p.colour}" stroke="#fff" stroke-width="1.5"/>'
        )
        side, shift = ("end", -11) if x > half + 70 else ("start", 11)
        body.append(_text(x + shift, y - 9, p.name, side, f'font-weight="600" fill="{p.colour}"'))
    return _svg(frame.width, frame.height, label, body)


def _thin(values: Sequence[tuple[float, float]], most: int = 400) -> list[tuple[float, float]]:
    """At most `most` points, each the mean of a run of them: a page stays small and a curve
    readable.
    """
    if len(values) <= most:
        return list(values)
    size = math.ceil(len(values) / most)
    chunks = [values[i : i + size] for i in range(0, len(values), size)]
    return [(chunk[-1][0], sum(y for _, y in chunk) / len(chunk)) for chunk in chunks]


def _legend_columns(names: Iterable[str]) -> tuple[int, float]:
    """(columns, width of one) so that the longest name fits; an entry has a line of 21 before it."""
    room = _Frame.width - _Frame.left - _Frame.right
    need = 21 + 8 + 5.8 * max(len(name) for name in names)
    columns = max(1, min(3, int(room / need)))
    return columns, room / columns


def lines(
    series: Mapping[str, tuple[str, Sequence[tuple[float, float]]]],
    x_label: str,
    y_label: str,
    label: str,
    percent: bool = False,
    dashed: frozenset[str] = frozenset(),
) -> str:
    """Curves: name -> (colour, [(x, y), ...]). Values that are not finite are left out."""
    clean = {
        name: (colour, _thin([(x, y) for x, y in values if math.isfinite(y)]))
        for name, (colour, values) in series.items()
    }
    clean = {name: pair for name, pair in clean.items() if pair[1]}
    if not clean:
        return ""
    every = [value for _, values in clean.values() for value in values]
    ys = [y for _, y in every]
    columns, column = _legend_columns(clean)
    rows = math.ceil(len(clean) / columns)
    last = max(x for x, _ in every)
    x_ticks = nice_ticks(min(x for x, _ in every), last)
    frame = _Frame(
        [tick for tick in x_ticks if tick <= last] if last > x_ticks[0] else x_ticks,
        nice_ticks(min(0.0, *ys), max(max(ys), 1e-9)),
        height=_Frame.height + 18 * (rows - 1),
        top=16 + 18 * rows,
        x_end=last if last > x_ticks[0] else None,
    )
    body = frame.axes(x_label, y_label, percent)
    for index, (name, (colour, values)) in enumerate(clean.items()):
        path = "M" + "L".join(f"{frame.x(x):.1f} {frame.y(y):.1f}" for x, y in values)
        dash = ' stroke-dasharray="5 4"' if name in dashed else ""
        body.append(
            f'<path d="{path}" fill="none" stroke="{colour}" stroke-width="1.8" stroke-linejoin="round"{dash}/>'
        )
        if len(values) <= _FEW:
            body += [
                f'<circle cx="{frame.x(x):.1f}" cy="{frame.y(y):.1f}" r="2.6" fill="{colour}"/>'
                for x, y in values
            ]
        x, y = frame.left + (index % columns) * column, 14 + 18 * (index // columns)
        body.append(
            f'<line x1="{x}" x2="{x + 16}" y1="{y - 4}" y2="{y - 4}" stroke="{colour}" stroke-width="2.5"{dash}/>'
        )
        body.append(_text(x + 21, y, name, "start", 'font-size="11"'))
    return _svg(frame.width, frame.height, label, body)


def grouped_bars(
    groups: Sequence[str],
    series: Mapping[str, tuple[str, Mapping[str, float]]],
    label: str,
    width: float = 980,
) -> str:
    """Shares (0..1) of several series side by side in each group."""
    frame = _Frame(
        [0.0, 1.0], [0.0, 0.25, 0.5, 0.75, 1.0], width=width, height=260, top=30, bottom=30
    )
    body = frame.axes("", "accuracy", True, with_x=False)
    slot = (frame.width - frame.left - frame.right) / max(len(groups), 1)
    bar = min(slot * 0.8 / max(len(series), 1), 34)
    for g, group in enumerate(groups):
        begin = frame.left + slot * (g + 0.5) - bar * len(series) / 2
        for s, (name, (colour, values)) in enumerate(series.items()):
            if group not in values:
                continue
            y, x = frame.y(values[group]), begin + s * bar
            height = frame.height - frame.bottom - y
            body.append(
                f'<rect x="{x + 1:.1f}" y="{y:.1f}" width="{bar - 2:.1f}" height="{max(height, 0):.1f}" rx="2" '
                f'fill="{colour}"><title>{escape(f"{name}, {group}: {values[group]:.1%}")}</title></rect>'
            )
            if bar >= 22:
                body.append(
                    _text(
                        x + bar / 2,
                        y - 4,
                        f"{100 * values[group]:.0f}",
                        extra=f'font-size="10" fill="{MUTED}"',
                    )
                )
        body.append(_text(frame.left + slot * (g + 0.5), frame.height - 10, group))
    x = frame.left
    for name, (colour, _) in series.items():
        body.append(f'<rect x="{x}" y="4" width="11" height="11" rx="2" fill="{colour}"/>')
        body.append(_text(x + 17, 14, name, "start"))
        x += 44 + 7 * len(name)
    return _svg(width, frame.height, label, body)


def histogram(
    edges: Sequence[float],
    counts: Sequence[float],
    x_label: str,
    label: str,
    colour: str,
    width: float = 480,
) -> str:
    """Bars of counts between n + 1 rising edges."""
    highest = max(counts)
    frame = _Frame(nice_ticks(0.0, edges[-1]), nice_ticks(0.0, highest, 4), width=width, height=200)
    body = frame.axes(x_label, "examples", False)
    floor = frame.y(0.0)
    for low, high, count in zip(edges[:-1], edges[1:], counts, strict=True):
        x, y = frame.x(low), frame.y(count)
        told = f"{low:.2f} to {high:.2f}: {count:g}"
        body.append(
            f'<rect x="{x + 0.5:.1f}" y="{y:.1f}" width="{max(frame.x(high) - x - 1, 0.5):.1f}" '
            f'height="{floor - y:.1f}" fill="{colour}"><title>{escape(told)}</title></rect>'
        )
    return _svg(frame.width, frame.height, label, body)


def kept_bars(
    rows: Sequence[tuple[str, int, int]], colour: str, label: str, width: float = 300
) -> str:
    """One bar per row (name, kept, total): the filled share is kept, the pale rest was cut."""
    step, left, right = 22, 92, 70
    body = []
    for index, (name, kept, total) in enumerate(rows):
        y, room = 4 + index * step, width - left - right
        share = kept / total if total else 0.0
        body.append(_text(left - 8, y + 12, name, "end", f'font-size="11.5" fill="{MUTED}"'))
        body.append(
            f'<rect x="{left}" y="{y + 1}" width="{room}" height="14" rx="3" fill="#e9efeb"/>'
        )
        body.append(
            f'<rect x="{left}" y="{y + 1}" width="{room * share:.1f}" height="14" rx="3" fill="{colour}"/>'
        )
        body.append(
            _text(width - right + 8, y + 12, f"{kept}/{total}", "start", 'font-size="11.5"')
        )
    return _svg(width, 8 + step * len(rows), label, body)
