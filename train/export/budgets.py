"""The part of a report that says what pruning was held to and what came of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from train.export import charts

__all__ = ["budget_section", "modality_chart"]

_LOOKS = {
    "vision": "#2e7d57",
    "text": "#c7812c",
    "fusion": "#3b6ea5",
    "image_fusion": "#9e4f4f",
    "decoder": "#8a4f9e",
}


def modality_chart(series_of: Any, name: str) -> str:
    """Removed by modality over the steps: expected dashed, actual solid; empty without records.

    Args:
        series_of: nested keys -> [(step, value)], as `Curve.series`.
    """
    series, dashed = {}, set()
    for modality, colour in _LOOKS.items():
        for key, told in ((modality, modality), (f"{modality}_expected", f"{modality}, expected")):
            if points := series_of("sparsity", key):
                series[told] = (colour, points)
                if key != modality:
                    dashed.add(told)
    if not series:
        return ""
    label = f"Removed by modality in {name} by training step"
    return charts.lines(series, "step", "removed", label, percent=True, dashed=frozenset(dashed))


def _share(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f} %"


def _times(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.2f}x"


def _rows(budget: Mapping[str, Any]) -> Iterable[Sequence[str]]:
    for name, row in {**budget["modalities"], "all": budget}.items():
        yield name, _share(row["target"]), _share(row["expected"]), _share(row["actual"])


def _speed(speedup: Mapping[str, Any]) -> str:
    """One sentence: target, prediction, measurement with its quartiles, corrections."""
    told = (
        f"Speed-up over the {speedup.get('against', 'reference')} at batch "
        f"{speedup.get('batch', '?')} on {speedup.get('device', 'this device')}: target "
        f"{_times(speedup['target'])}, predicted {_times(speedup['predicted'])}, measured "
        f"{_times(speedup['measured'])}"
    )
    if speedup.get("q1") is not None:
        told += f" (quartiles {speedup['q1']:.2f} to {speedup['q3']:.2f})"
    more = max(0, len(speedup.get("tries") or ()) - 1)
    return told + (f"; the structure was corrected {more} time(s)." if more else ".")


def budget_section(budgets: Mapping[str, Mapping[str, Any]]) -> str:
    """HTML of the budgets by run name ("budget" of sparsity.json); empty without any."""
    blocks = []
    for name, budget in budgets.items():
        rounded = budget.get("round_to", 1)
        told = f"Shares of {budget['unit']}, {budget['scope']}"
        told += f", FFN widths in multiples of {rounded}" if rounded > 1 else ""
        head = "".join(f"<th>{x}</th>" for x in ("part", "target", "expected", "actual"))
        body = "".join(
            "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>"
            for row in _rows(budget)
        )
        speed = f"<p>{escape(_speed(budget['speedup']))}</p>" if "speedup" in budget else ""
        blocks.append(
            f'<div><h3>{escape(name)}</h3><p class="note">{escape(told)}; a part without a target '
            f"was left to the losses.</p><table><tr>{head}</tr>{body}</table>{speed}</div>"
        )
    if not blocks:
        return ""
    return f'<section><h2>Budgets</h2><div class="two">{"".join(blocks)}</div></section>'
