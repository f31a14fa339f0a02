"""What a report page needs, read from run directories; every file is optional except the directory
itself.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from models.config import ModelConfig

__all__ = ["Collected", "Curve", "collect", "kept_widths", "read_metrics"]

Kept = dict[str, list[tuple[str, int, int]]]


@dataclass(frozen=True)
class Curve:
    """One training stage: its run file's values and its metrics, oldest first."""

    name: str
    stage: str
    records: tuple[dict[str, Any], ...]

    def series(self, *keys: str) -> list[tuple[float, float]]:
        """(step, value) of one nested key, such as ("loss", "total"), where it is there and finite."""
        result = []
        for record in self.records:
            value: Any = record
            for key in keys:
                value = value.get(key) if isinstance(value, Mapping) else None
            if isinstance(value, int | float) and math.isfinite(value):
                result.append((float(record.get("step", 0)), float(value)))
        return result


@dataclass
class Collected:
    """Everything found.

    Attributes:
        summary: the demo's summary.json; None without one.
        curves: stages that left metrics.
        kept: part -> (row, kept, total) of heads and FFN units of the pruned model.
        budgets: pruning run -> what it was held to and what came of it ("budget" of sparsity.json).
        trims: trimming run -> what its trimmers keep (trim.json).
        pictures: folder that example pictures are relative to.
    """

    names: list[str] = field(default_factory=list)
    summary: dict[str, Any] | None = None
    curves: list[Curve] = field(default_factory=list)
    kept: Kept = field(default_factory=dict)
    budgets: dict[str, dict[str, Any]] = field(default_factory=dict)
    trims: dict[str, dict[str, Any]] = field(default_factory=dict)
    pictures: Path | None = None


def read_metrics(path: Path) -> tuple[dict[str, Any], ...]:
    """Records of metrics.jsonl in step order; the later record wins where a resumed run wrote a
    step twice.

    A last line that was cut off by a kill is left out. Raises ValueError on any other broken line.
    """
    records: dict[float, dict[str, Any]] = {}
    rows = path.read_text(encoding="utf-8").splitlines()
    for number, row in enumerate(rows, 1):
        if not row.strip():
            continue
        try:
            record = json.loads(row)
        except json.JSONDecodeError as error:
            if number == len(rows):
                break
            raise ValueError(f"{path}:{number}: not JSON ({error.msg}); remove the line") from error
        if isinstance(record, dict) and isinstance(record.get("step"), int | float):
            before = records.get(record["step"], {})
            records[record["step"]] = before | record
    return tuple(records[step] for step in sorted(records))


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not JSON ({error}); remake it or leave the run out") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object")
    return value


def _rows(
    kind: str, kept: Sequence[int], total: Sequence[int], first: int = 0
) -> Iterator[tuple[str, int, int]]:
    for layer, (have, had) in enumerate(zip(kept, total, strict=True)):
        yield f"{layer + first} {kind}", have, had


def kept_widths(pruned: ModelConfig, dense: ModelConfig) -> Kept:
    """part -> rows (layer and kind, kept, total), heads first.

    Raises ValueError where the two do not have the same depths.
    """
    p, d = pruned, dense
    split = d.text.text_layers
    parts: dict[str, list[tuple[str, Sequence[int], Sequence[int]]]] = {
        "vision": [("heads", p.vision.heads, d.vision.heads), ("FFN", p.vision.ffn, d.vision.ffn)],
        "text": [
            ("heads", p.text.heads[:split], d.text.heads[:split]),
            ("FFN", p.text.ffn[:split], d.text.ffn[:split]),
        ],
        "fusion": [
            ("self heads", p.text.heads[split:], d.text.heads[split:]),
            ("cross heads", p.text.cross_heads, d.text.cross_heads),
            ("FFN", p.text.ffn[split:], d.text.ffn[split:]),
        ],
    }
    if p.image_fusion is not None and d.image_fusion is not None:
        parts["image fusion"] = [
            ("self heads", p.image_fusion.heads, d.image_fusion.heads),
            ("cross heads", p.image_fusion.cross_heads, d.image_fusion.cross_heads),
            ("FFN", p.image_fusion.ffn, d.image_fusion.ffn),
        ]
    if p.decoder is not None and d.decoder is not None:
        parts["decoder"] = [
            ("self heads", p.decoder.heads, d.decoder.heads),
            ("cross heads", p.decoder.cross_heads, d.decoder.cross_heads),
            ("FFN", p.decoder.ffn, d.decoder.ffn),
        ]
    try:
        return {
            part: [row for kind, have, had in kinds for row in _rows(kind, have, had)]
            for part, kinds in parts.items()
        }
    except ValueError as error:
        raise ValueError(
            f"models {pruned.name!r} and {dense.name!r} differ in depth; one is not the other "
            "pruned"
        ) from error


def _add_run(run: Path, name: str, found: Collected) -> None:
    values: dict[str, Any] = {}
    if (run / "run.yaml").is_file():
        loaded = yaml.safe_load((run / "run.yaml").read_text(encoding="utf-8"))
        values = loaded if isinstance(loaded, dict) else {}
        values = values.get("config", values) if isinstance(values.get("config"), dict) else values
    if (run / "metrics.jsonl").is_file():
        records = read_metrics(run / "metrics.jsonl")
        if records:
            found.curves.append(Curve(name, str(values.get("stage", "")), records))
    if (run / "sparsity.json").is_file():
        budget = _read_json(run / "sparsity.json").get("budget")
        if budget:  # runs of earlier versions have none
            found.budgets[name] = budget
    if (run / "trim.json").is_file():
        found.trims[name] = _read_json(run / "trim.json")
    # What run.yaml names may have another form or depth than what was pruned.
    pruned, dense = (run / part / "config.json" for part in ("model", "dense"))
    wanted = values.get("stage") == "prune" and not found.kept
    if wanted and pruned.is_file() and dense.is_file():
        found.kept = kept_widths(ModelConfig.load(pruned), ModelConfig.load(dense))


def _began(folder: Path) -> float:
    """When a stage was first logged, so that stages appear in the order in which they ran."""
    path = folder / "metrics.jsonl"
    for record in read_metrics(path) if path.is_file() else ():
        if isinstance(record.get("time"), int | float):
            return float(record["time"])
    return math.inf


def collect(runs: Sequence[Path]) -> Collected:
    """Read run directories; a directory of runs (as the demo's) also brings its children.

    Raises FileNotFoundError for a directory that is not there or holds nothing to report.
    """
    found = Collected()
    for run in runs:
        if not run.is_dir():
            raise FileNotFoundError(f"{run}: no such run directory")
        found.names.append(run.resolve().name)
        before = len(found.curves), found.summary
        if (run / "summary.json").is_file() and found.summary is None:
            found.summary, found.pictures = _read_json(run / "summary.json"), run
            gates = (found.summary.get("details") or {}).get("gates") or {}
            found.kept = {
                part: [(str(n), int(k), int(t)) for n, k, t in rows] for part, rows in gates.items()
            }
        children = sorted(
            (child for child in run.iterdir() if child.is_dir()), key=lambda c: (_began(c), c.name)
        )
        for folder in (run, *children):
            _add_run(folder, folder.resolve().name, found)
        if before == (len(found.curves), found.summary):
            raise FileNotFoundError(
                f"{run}: neither summary.json nor metrics.jsonl in it or one level below"
            )
    return found
