"""The part of a report that says what trimmers keep and what it costs (trim.json of a run)."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

from train.export import charts

__all__ = ["cost_chart", "trimming_section"]

_COLOUR = "#2e7d57"


def _share(value: float) -> str:
    return f"{100 * value:.1f} %"


def _accuracies(found: Mapping[str, Any]) -> str:
    """A table of metrics of the full and of the trimmed model on held-out inputs."""
    full, trimmed = found.get("full") or {}, found.get("trimmed") or {}
    rows = "".join(
        f'<tr><th scope="row">{escape(name)}</th><td>{full[name]:.4g}</td>'
        f"<td>{trimmed[name]:.4g}</td></tr>"
        for name in full
        if name in trimmed and not name.endswith("_count")
    )
    if not rows:
        return ""
    head = "".join(f'<th scope="col">{x}</th>' for x in ("held out", "full", "trimmed"))
    return f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"


def _kept(found: Mapping[str, Any]) -> str:
    """Mean tokens kept at each site, of those of the whole input."""
    rows = [
        (name, round(float(site["mean"])), int(site["tokens"]))
        for name, site in (found.get("sites") or {}).items()
    ]
    if not rows:
        return ""
    told = "Tokens kept: " + ", ".join(f"{name} {k} of {t}" for name, k, t in rows)
    return f"<h3>Tokens kept, mean</h3>{charts.kept_bars(rows, _COLOUR, told, 490)}"


def _heads(found: Mapping[str, Any]) -> str:
    heads: Mapping[str, float] = found.get("heads") or {}
    if not heads:
        return ""
    rows = [(name, round(100 * value), 100) for name, value in heads.items()]
    told = "Per cent of heads kept: " + ", ".join(f"{name} {k}" for name, k, _ in rows)
    return f"<h3>Heads kept, per cent</h3>{charts.kept_bars(rows, '#4d6791', told, 490)}"


def _histogram(found: Mapping[str, Any]) -> str:
    histogram = found.get("macs_share_histogram") or {}
    if not histogram or not any(histogram["counts"]):
        return ""
    told = f"Cost of an example: mean {_share(found['macs_share'])} of the full model's"
    chart = charts.histogram(
        histogram["edges"], histogram["counts"], "share of the full model's MACs", told, _COLOUR
    )
    return f"<h3>Cost of an example</h3>{chart}"


def cost_chart(series_of: Any, name: str) -> str:
    """Cost of trimmed passes and its target over the steps; empty without records.

    Args:
        series_of: nested keys -> [(step, value)], as `Curve.series`.
    """
    looks = {"target_share": ("target", "#68736d"), "macs_share": ("trimmed passes", _COLOUR)}
    series = {
        told: (colour, points)
        for key, (told, colour) in looks.items()
        if (points := series_of("metrics", key))
    }
    label = f"Cost of {name} by training step"
    return charts.lines(
        series, "step", "share of MACs", label, percent=True, dashed=frozenset({"target"})
    )


def trimming_section(trims: Mapping[str, Mapping[str, Any]]) -> str:
    """HTML of trim.json by run name; empty without any."""
    blocks = []
    for name, found in trims.items():
        told = (
            f"Asked for {_share(found['budget'])} of the full model's multiply-accumulates, found "
            f"{_share(found['macs_share'])} on {found['samples']:,} held-out inputs "
            f"({_share(found['macs_share_min'])} to {_share(found['macs_share_max'])}). MACs are no "
            "time: espalier bench measures whether it pays."
        )
        blocks.append(
            f'<h3>{escape(name)}</h3><p class="note">{escape(told)}</p><div class="two">'
            f"<div>{_accuracies(found)}{_histogram(found)}</div>"
            f"<div>{_kept(found)}{_heads(found)}</div></div>"
        )
    if not blocks:
        return ""
    return f"<section><h2>What trimming keeps</h2>{''.join(blocks)}</section>"
