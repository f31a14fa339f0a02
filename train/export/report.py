"""One self-contained HTML page about runs: no network, no scripts; charts are inline SVG, pictures
data URIs.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from train.export import charts
from train.export.budgets import budget_section, modality_chart
from train.export.collect import Collected, Curve, collect
from train.export.trimming import cost_chart, trimming_section

__all__ = ["COLOURS", "render", "verdict", "write_report"]

COLOURS = {
    "teacher": "#4d6791",
    "student": "#c7812c",
    "pruned": "#2e7d57",
    "blind": "#b6bcb8",
}
_MORE = ("#4d6791", "#c7812c", "#2e7d57", "#8b5a9b", "#b34a4a", "#3f8f98", "#8a8f39", "#68736d")
_MOST_TERMS = 6
_PARTS = {"vision": "#4d6791", "text": "#c7812c", "fusion": "#2e7d57", "decoder": "#8b5a9b"}
_STYLE = """
:root{color-scheme:light}
*{box-sizing:border-box}
body{margin:0;background:#f6f8f6;color:#26302b;font:15px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,
"Helvetica Neue",Arial,sans-serif}
main{max-width:1080px;margin:0 auto;padding:36px 28px 48px}
header p.kicker{margin:0;color:#2e7d57;font-weight:600;letter-spacing:.06em;text-transform:uppercase;font-size:12.5px}
h1{margin:4px 0 6px;font-size:30px;line-height:1.2;letter-spacing:-.01em}
h2{margin:0 0 4px;font-size:18px} h3{margin:0 0 6px;font-size:14px} h3::first-letter{text-transform:uppercase}
.verdict{margin:0;font-size:17px;color:#3c4842;max-width:62em}
.note{margin:0 0 12px;color:#68736d;font-size:13.5px}
section{background:#fff;border:1px solid #e1e7e3;border-radius:10px;padding:20px 22px;margin-top:18px}
.facts{display:grid;grid-template-columns:repeat(4,1fr);gap:14px;margin-top:20px}
.fact{background:#fff;border:1px solid #e1e7e3;border-radius:10px;padding:14px 18px}
.fact b{display:block;font-size:27px;line-height:1.2;font-weight:650;letter-spacing:-.01em}
.fact span{color:#68736d;font-size:13px}
.two{display:grid;grid-template-columns:1fr 1fr;gap:22px}
.three{display:grid;grid-template-columns:repeat(3,1fr);gap:22px 26px}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
th,td{padding:8px 10px;text-align:right;border-bottom:1px solid #e8edea;vertical-align:top}
thead th{color:#68736d;font-weight:600;font-size:12.5px;border-bottom:1.5px solid #cfd8d2}
tbody th,thead th:first-child{text-align:left} tbody tr:last-child>*{border-bottom:0}
td small{display:block;color:#8a948e;font-size:11.5px;white-space:nowrap}
.dot{display:inline-block;width:11px;height:11px;border-radius:50%;margin-right:8px;vertical-align:-1px}
svg{display:block;width:100%;height:auto;font-family:inherit}
.examples{display:grid;grid-template-columns:repeat(4,1fr);gap:16px}
figure{margin:0;border:1px solid #e8edea;border-radius:8px;overflow:hidden;background:#fcfdfc}
figure img{display:block;width:100%;aspect-ratio:1;object-fit:cover;background:#eef2ef}
figcaption{padding:10px 12px 12px;font-size:13px} figcaption q{display:block;font-weight:600;min-height:3em;quotes:none}
dl{display:grid;grid-template-columns:auto 1fr;gap:1px 10px;margin:6px 0 0} dt{color:#68736d} dd{margin:0}
.right{color:#217346}.wrong{color:#b23a3a}
footer{margin-top:20px;color:#68736d;font-size:12.5px}
@media(max-width:820px){.two,.three{grid-template-columns:1fr}.facts,.examples{grid-template-columns:1fr 1fr}
.scroll{overflow-x:auto}}
@media print{@page{margin:12mm}body{background:#fff;font-size:11px;print-color-adjust:exact;
-webkit-print-color-adjust:exact}main{padding:0;max-width:none}
section,.fact,figure{break-inside:avoid;box-shadow:none}section{padding:12px 14px;margin-top:10px}}
"""


def _count(value: float | None) -> str:
    """1.84M, 212.3M, 17.5G: three or four digits and a unit."""
    if value is None:
        return "-"
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            scaled = value / size
            return f"{scaled:.2f}{unit}" if scaled < 100 else f"{scaled:.1f}{unit}"
    return f"{value:g}"


def _share(value: float | None, digits: int = 1) -> str:
    return "-" if value is None else f"{100 * value:.{digits}f}%"


def _ms(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}" if value < 10 else f"{value:.1f}"


def _ratio(value: float) -> str:
    return f"{value:.2f}x"


def _colour(name: str, index: int = 0) -> str:
    return COLOURS.get(name, _MORE[index % len(_MORE)])


def verdict(summary: Mapping[str, Any]) -> str:
    """One sentence that a reader can take away; what was not measured is not mentioned."""
    models = summary.get("models") or {}
    teacher, pruned = models.get("teacher") or {}, models.get("pruned") or {}
    parts = []
    if summary.get("retention") is not None:
        parts.append(f"keeps {_share(summary['retention'])} of the teacher's accuracy")
    speed = summary.get("speedup") or {}
    if speed:
        parts.append(
            "answers " + " and ".join(f"{_ratio(v)} as fast at batch {k}" for k, v in speed.items())
        )
    if teacher.get("params") and pruned.get("params"):
        parts.append(f"has {_share(pruned['params'] / teacher['params'], 0)} of its parameters")
    if not parts:
        return "No comparison was measured in these runs."
    head, last = parts[:-1], parts[-1]
    return f"The pruned model {', '.join(head)}{' and ' if head else ''}{last}."


def _facts(summary: Mapping[str, Any]) -> str:
    details, models = summary.get("details") or {}, summary.get("models") or {}
    pruned = models.get("pruned") or {}
    speed = summary.get("speedup") or {}
    facts: list[tuple[str, str]] = []
    if pruned.get("accuracy") is not None:
        facts.append((_share(pruned["accuracy"]), "accuracy of the pruned model"))
    if summary.get("retention") is not None:
        facts.append((_share(summary["retention"]), "of the teacher's accuracy kept"))
    if speed:
        batch = list(speed)[-1]
        facts.append((_ratio(speed[batch]), f"as fast as the teacher, batch {batch}"))
    if (details.get("sparsity") or {}).get("exported") is not None:
        facts.append((_share(details["sparsity"]["exported"]), "of prunable parameters removed"))
    cards = "".join(
        f'<div class="fact"><b>{escape(value)}</b><span>{escape(text)}</span></div>'
        for value, text in facts
    )
    return f'<div class="facts">{cards}</div>' if cards else ""


def _latency_cell(
    name: str, batch: str, model: Mapping[str, Any], summary: Mapping[str, Any]
) -> str:
    latency = (model.get("latency_ms") or {}).get(batch)
    quartiles = (((summary.get("details") or {}).get("latency") or {}).get(name) or {}).get(
        batch
    ) or {}
    teacher = (((summary.get("models") or {}).get("teacher") or {}).get("latency_ms") or {}).get(
        batch
    )
    small = (
        f"<small>{_ms(quartiles['q1'])} to {_ms(quartiles['q3'])}</small>"
        if "q1" in quartiles
        else ""
    )
    speed = _ratio(teacher / latency) if teacher and latency else "-"
    return f"<td>{_ms(latency)}{small}</td><td>{speed}</td>"


def _table(summary: Mapping[str, Any]) -> str:
    models: Mapping[str, Mapping[str, Any]] = summary.get("models") or {}
    batches = list(
        dict.fromkeys(str(b) for model in models.values() for b in model.get("latency_ms") or {})
    )
    head = "".join(
        f'<th scope="col">{text}</th>'
        for text in ("Model", "Accuracy", "Blind", "Parameters", "Prunable", "MACs")
    )
    head += "".join(
        f'<th scope="col">ms, batch {escape(b)}</th><th scope="col">Speed-up</th>' for b in batches
    )
    rows = []
    for index, (name, model) in enumerate(models.items()):
        cells = (
            _share(model.get("accuracy")),
            _share(model.get("blind_accuracy")),
            _count(model.get("params")),
            _count(model.get("params_prunable")),
            _count(model.get("macs")),
        )
        row = "".join(f"<td>{cell}</td>" for cell in cells)
        row += "".join(_latency_cell(name, b, model, summary) for b in batches)
        dot = f'<span class="dot" style="background:{_colour(name, index)}"></span>'
        rows.append(f'<tr><th scope="row">{dot}{escape(name)}</th>{row}</tr>')
    details = summary.get("details") or {}
    note = "Blind: the best a reader of the questions alone can do. "
    note += (
        "Latency: one full forward, picture and question in, answer out; median, quartiles below. "
    )
    if details.get("repeats"):
        note += (
            f"{details['repeats']} interleaved repeats on {details.get('threads', '?')} threads. "
        )
    if details.get("questions"):
        note += f"Accuracy on {details['questions']:,} test questions."
    return (
        f'<section><h2>The models side by side</h2><p class="note">{escape(note)}</p><div class="scroll"><table>'
        f"<thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div></section>"
    )


def _speed_plots(summary: Mapping[str, Any]) -> str:
    models: Mapping[str, Mapping[str, Any]] = summary.get("models") or {}
    latency = (summary.get("details") or {}).get("latency") or {}
    batches = list(
        dict.fromkeys(str(b) for model in models.values() for b in model.get("latency_ms") or {})
    )
    plots = []
    for batch in batches[:4]:
        data = []
        for index, (name, model) in enumerate(models.items()):
            x = (model.get("latency_ms") or {}).get(batch)
            if x is None or model.get("accuracy") is None:
                continue
            spread = (latency.get(name) or {}).get(batch) or {}
            colour = _colour(name, index)
            data.append(
                charts.Point(name, x, model["accuracy"], colour, spread.get("q1"), spread.get("q3"))
            )
        if data:
            told = "; ".join(f"{p.name} {_share(p.y)} in {_ms(p.x)} ms" for p in data)
            plots.append(
                charts.points(
                    data,
                    f"latency in ms, batch {batch}",
                    "accuracy",
                    f"Accuracy against latency: {told}",
                )
            )
    if not plots:
        return ""
    return (
        '<section><h2>Accuracy against latency</h2><p class="note">Up and to the left is better. '
        f'Bars: quartiles of the latency.</p><div class="two">{"".join(plots)}</div></section>'
    )


def _gates(kept: Mapping[str, Sequence[tuple[str, int, int]]]) -> str:
    columns, width = ("three", 330) if len(kept) in (3, 5, 6) else ("two", 490)
    blocks = []
    for part, rows in kept.items():
        had = sum(total for _, _, total in rows)
        told = f"Kept in {part}: " + ", ".join(f"layer {n} {k} of {t}" for n, k, t in rows)
        if not had:
            continue
        chart = charts.kept_bars(rows, _PARTS.get(part, "#2e7d57"), told, width)
        blocks.append(f"<div><h3>{escape(part)}</h3>{chart}</div>")
    if not blocks:
        return ""
    return (
        '<section><h2>What pruning kept</h2><p class="note">Attention heads and FFN units per layer, counted '
        f'from the exported model.</p><div class="{columns}">{"".join(blocks)}</div></section>'
    )


def _loss_chart(curve: Curve) -> str:
    """The total and the largest terms; the rest is in TensorBoard."""
    names = list(dict.fromkeys(n for record in curve.records for n in record.get("loss") or {}))
    found = {name: values for name in names if (values := curve.series("loss", name))}
    size = {name: sum(abs(y) for _, y in values) / len(values) for name, values in found.items()}
    shown = sorted(found, key=lambda name: (name != "total", -size[name]))[:_MOST_TERMS]
    series = {name: (_MORE[index % len(_MORE)], found[name]) for index, name in enumerate(shown)}
    return charts.lines(series, "step", "loss", f"Loss of {curve.name} by training step")


def _sparsity_chart(curve: Curve) -> str:
    looks = {"target": "#68736d", "expected": "#2e7d57", "actual": "#c7812c"}
    series = {name: (colour, curve.series("sparsity", name)) for name, colour in looks.items()}
    label = f"Sparsity of {curve.name} by training step"
    return charts.lines(
        series, "step", "sparsity", label, percent=True, dashed=frozenset({"target"})
    )


def _curves(curves: Iterable[Curve]) -> str:
    blocks = []
    for curve in curves:
        title = (
            f"{curve.name}: {curve.stage}"
            if curve.stage and curve.stage != curve.name
            else curve.name
        )
        drawn = {"loss": _loss_chart(curve), "sparsity": _sparsity_chart(curve)}
        drawn["removed by modality"] = modality_chart(curve.series, curve.name)
        drawn["cost of trimmed passes"] = cost_chart(curve.series, curve.name)
        for kind, chart in drawn.items():
            if chart:
                blocks.append(f"<div><h3>{escape(title)}, {kind}</h3>{chart}</div>")
    if not blocks:
        return ""
    return f'<section><h2>How training went</h2><div class="two">{"".join(blocks)}</div></section>'


def _types(summary: Mapping[str, Any]) -> str:
    by_type: Mapping[str, Mapping[str, float]] = (summary.get("details") or {}).get(
        "accuracy_by_type"
    ) or {}
    groups = sorted({kind for values in by_type.values() for kind in values})
    if not groups:
        return ""
    series = {name: (_colour(name, i), values) for i, (name, values) in enumerate(by_type.items())}
    told = "Accuracy by question type: " + "; ".join(
        f"{name} "
        + ", ".join(f"{kind} {_share(value, 0)}" for kind, value in sorted(values.items()))
        for name, values in by_type.items()
    )
    return (
        f"<section><h2>By question type</h2>{charts.grouped_bars(groups, series, told)}</section>"
    )


def _picture(path: Path, question: str) -> str:
    kind = "jpeg" if path.suffix.lower() in (".jpg", ".jpeg") else "png"
    data = base64.b64encode(path.read_bytes()).decode("ascii")
    alt = escape(f"Example picture for the question: {question}", quote=True)
    return f'<img alt="{alt}" src="data:image/{kind};base64,{data}">'


def _examples(summary: Mapping[str, Any], folder: Path | None) -> str:
    figures = []
    for example in (summary.get("details") or {}).get("examples") or []:
        path = (folder or Path()) / str(example["image"])
        if not path.is_file():
            continue
        answer = str(example["answer"])
        rows = "".join(
            f'<dt>{escape(name)}</dt><dd class="{"right" if said == answer else "wrong"}">'
            f"{'&#10003;' if said == answer else '&#10007;'} {escape(str(said))}</dd>"
            for name, said in example["predictions"].items()
        )
        question = str(example["question"])
        figures.append(
            f"<figure>{_picture(path, question)}<figcaption><q>{escape(question)}</q>"
            f"<dl>{rows}<dt>right</dt><dd>{escape(answer)}</dd></dl></figcaption></figure>"
        )
    if not figures:
        return ""
    return (
        '<section><h2>Examples</h2><p class="note">From the test split; the first shows a disagreement where '
        f'there is one.</p><div class="examples">{"".join(figures)}</div></section>'
    )


def _footer(summary: Mapping[str, Any] | None) -> str:
    bits = ["Made by espalier report"]
    if summary:
        if summary.get("device"):
            bits.append(f"measured on {summary['device']}")
        if summary.get("seconds"):
            bits.append(f"{summary['seconds'] / 60:.1f} minutes in all")
        stages = (summary.get("details") or {}).get("stages") or []
        if stages:
            bits.append(", ".join(f"{s['name']} {s['seconds']:.0f} s" for s in stages))
    return f"<footer>{escape('. '.join(bits))}.</footer>"


def render(found: Collected, title: str | None = None) -> str:
    """The page's HTML."""
    summary = found.summary
    models = list((summary or {}).get("models") or {})
    if title is None:
        title = (
            ", ".join(models[:-1]) + f" and {models[-1]}"
            if len(models) > 1
            else " and ".join(found.names)
        )
        title = title[:1].upper() + title[1:]
    task = f"{(summary or {}).get('task', '')} comparison".strip() if summary else "training runs"
    told = verdict(summary) if summary else f"Training curves of {', '.join(found.names)}."
    body = [
        f'<header><p class="kicker">Espalier, {escape(task)}</p><h1>{escape(title)}</h1>',
        f'<p class="verdict">{escape(told)}</p></header>',
    ]
    if summary is not None:
        body += [_facts(summary), _table(summary), _speed_plots(summary), _types(summary)]
    body += [_gates(found.kept), budget_section(found.budgets), trimming_section(found.trims)]
    body.append(_curves(found.curves))
    if summary is not None:
        body.append(_examples(summary, found.pictures))
    body.append(_footer(summary))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(title)} - Espalier</title><style>{_STYLE}</style></head>"
        f"<body><main>{''.join(body)}</main></body></html>\n"
    )


def write_report(runs: Sequence[Path], out: Path, title: str | None = None) -> Path:
    """Collect, render and write `out`; returns it. Raises what `collect` raises."""
    page = render(collect(runs), title)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(page, encoding="utf-8")
    return out
