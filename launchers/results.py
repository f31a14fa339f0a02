"""The table at the end of a queue: each job's metrics, sparsity and speed, read from its run directory.

    metrics.jsonl   numbers of the last validation        eval.json    of espalier eval --json
    selected.json   of which step they are, where it is not the last (checkpoint.best)
    sparsity.json   what pruning removed                  bench.json   of espalier bench --json

What has no file has no value. As text for people, CSV for spreadsheets and JSON for programs.
"""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

__all__ = ["results", "write_table"]

_STATES = {None: "waiting", 0: "done", 75: "stopped"}
_TAIL = 1 << 20  # bytes at the end of metrics.jsonl in which the last validation is looked for


class _Job(Protocol):
    @property
    def name(self) -> str: ...
    @property
    def out(self) -> str | None: ...


def write_table(folder: Path, ended: Sequence[tuple[_Job, Mapping[str, Any]]]) -> str:
    """Writes table.txt, table.csv and table.json into `folder`; returns the text."""
    rows = [_row(job, state) for job, state in ended]
    columns = list(dict.fromkeys(name for row in rows for name in row))
    with (folder / "table.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns, restval="")
        writer.writeheader()
        writer.writerows(rows)
    text = _text(rows, columns)
    failed = [row for row in rows if str(row["state"]).startswith("failed")]
    if failed:
        text += f"\n{len(failed)} of {len(rows)} jobs failed: " + ", ".join(
            r["job"] for r in failed
        )
    (folder / "table.json").write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    (folder / "table.txt").write_text(text + "\n", encoding="utf-8")
    return text


def _row(job: _Job, state: Mapping[str, Any]) -> dict[str, Any]:
    code = state.get("code")
    row: dict[str, Any] = {"job": job.name, "state": _STATES.get(code, f"failed ({code})")}
    if state:
        row["minutes"] = round(state["seconds"] / 60, 1)
    return row | (results(Path(job.out)) if job.out else {})


def results(out: Path) -> dict[str, float]:
    """Numbers of a run directory by column."""
    selected = _json(out / "selected.json").get("step")
    row = {**_validation(out / "metrics.jsonl", selected), **_numbers(_json(out / "eval.json"))}
    pruned = _json(out / "sparsity.json").get("prunable", {})
    if isinstance(pruned, dict) and "sparsity" in pruned:
        row["sparsity"] = pruned["sparsity"]
    return row | _speed(_json(out / "bench.json"), out)


def _speed(bench: Mapping[str, Any], out: Path) -> dict[str, float]:
    """Median milliseconds and times as fast as the first model, for the model of this run."""
    home = os.path.realpath(out)
    for name, model in bench.get("models", {}).items():
        if os.path.commonpath([home, os.path.realpath(model.get("folder", "/"))]) != home:
            continue
        row = {f"ms@{size}": one["median"] for size, one in model["latency"].items()}
        faster = bench.get("speedup", {}).get(name, {})
        return row | {f"x@{size}": parts["whole"]["median"] for size, parts in faster.items()}
    return {}


def _json(path: Path) -> dict[str, Any]:
    """The object in a file; empty where there is none, or only half of one."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _numbers(values: Mapping[str, Any]) -> dict[str, float]:
    """The headline numbers: not those of groups ("accuracy/colour"), nor counts."""
    return {
        name: value
        for name, value in values.items()
        if isinstance(value, int | float)
        and not isinstance(value, bool)
        and "/" not in name
        and not name.endswith("_count")
    }


def _validation(path: Path, step: int | None = None) -> dict[str, float]:
    """The last validation of a run, or of one of its steps."""
    if not path.is_file():
        return {}
    with path.open("rb") as file:
        if step is None:
            file.seek(max(0, path.stat().st_size - _TAIL))
        lines = file.read().decode("utf-8", errors="replace").splitlines()
    for line in reversed(lines):
        try:
            found = json.loads(line)
        except ValueError:  # the first line may be cut, the last one half written
            continue
        if not isinstance(found, dict) or step not in (None, found.get("step")):
            continue
        if isinstance(found.get("validation"), dict):
            return _numbers(found["validation"])
    return {}


def _text(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> str:
    cells = [list(columns), *([_cell(row.get(name)) for name in columns] for row in rows)]
    widths = [max(len(row[place]) for row in cells) for place in range(len(columns))]
    lines = []
    for row in cells:
        first = row[0].ljust(widths[0])
        rest = (cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))
        lines.append("  ".join([first, *rest]))
    return "\n".join(lines)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
