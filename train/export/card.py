"""The model card: what a shipped model is, where it came from and how good it was measured to be."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

if TYPE_CHECKING:
    from models.xvlm import XVLM

__all__ = ["Facts", "card"]


@dataclass(frozen=True)
class Facts:
    """What the weights alone cannot tell: each comes from a file, and is left out without it.

    Attributes:
        recipe: resolved run file, as YAML text.
        data: split name -> manifest hash and counts.
        evaluation: of espalier eval --json: metrics, and "task", "split" and "model" beside them.
        dense_prunable: prunable parameters before pruning, for the sparsity.
        command: how to make the model again.
        origin: where the first weights came from (train.student.FirstWeights.save).
        selected: step whose weights the run ended with (checkpoint.selection.Selected).
        sparsity: what pruning kept, by modality (sparsity.json of the run); a card tells it only of
            the model with as many parameters as pruning left, not of RUN/dense.
        bench: of espalier bench --json.   benched: this model's name in it.
    """

    recipe: str = ""
    data: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    evaluation: Mapping[str, Any] = field(default_factory=dict)
    dense_prunable: int | None = None
    command: str = ""
    origin: Mapping[str, Any] = field(default_factory=dict)
    selected: Mapping[str, Any] = field(default_factory=dict)
    sparsity: Mapping[str, Any] = field(default_factory=dict)
    bench: Mapping[str, Any] = field(default_factory=dict)
    benched: str = ""

    @classmethod
    def of_run(
        cls,
        model: Path,
        evaluation: Mapping[str, Any] | None = None,
        dense: int | None = None,
        bench: Mapping[str, Any] | None = None,
        benched: str = "",
    ) -> Facts:
        """Facts of the run directory that holds `model` (RUN/model), as far as it has files."""
        folder = model.resolve().parent
        measured: dict[str, Any] = {
            "evaluation": evaluation or {},
            "dense_prunable": dense,
            "bench": bench or {},
            "benched": benched,
        }
        run_file = folder / "run.yaml"
        if not run_file.is_file():
            return cls(**measured)
        text = run_file.read_text(encoding="utf-8")
        values = yaml.safe_load(text)
        values = values if isinstance(values, dict) else {}
        data = {}
        for split, place in _sources(values.get("data") or {}):
            found = _json(Path(place) / "manifest.json")
            if found:
                data[split] = {
                    key: found[key] for key in ("task", "samples", "hash") if key in found
                }
        stage = values.get("stage", "")
        return cls(
            recipe=text,
            data=data,
            command=f"espalier {stage} run.yaml" if stage else "",
            origin=_json(folder / "origin.json"),
            selected=_json(folder / "selected.json"),
            sparsity=_json(folder / "sparsity.json"),
            **measured,
        )


def _json(path: Path) -> dict[str, Any]:
    """The object in a file; empty where there is no file."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _sources(data: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(split, folder) of every data set that a run file names, those of a mixture one by one."""
    found = []
    for split in ("train", "val"):
        value = data.get(split)
        if isinstance(value, str):
            found.append((split, value))
        elif isinstance(value, list):
            parts = [
                str(part["path"]) for part in value if isinstance(part, dict) and "path" in part
            ]
            found += [(f"{split}: {part}", part) for part in parts]
    return found


def _shape(model: XVLM) -> list[str]:
    config = model.config
    text, vision = config.text, config.vision
    rows = [
        f"| vision | {vision.layers} | {_widths(vision.heads)} | | {_widths(vision.ffn)} |",
        f"| text | {text.text_layers} | {_widths(text.heads[: text.text_layers])} | | "
        f"{_widths(text.ffn[: text.text_layers])} |",
        f"| fusion | {text.fusion_layers} | {_widths(text.heads[text.text_layers :])} | "
        f"{_widths(text.cross_heads)} | {_widths(text.ffn[text.text_layers :])} |",
    ]
    if (stream := config.image_fusion) is not None:
        rows.append(
            f"| image fusion | {len(stream.ffn)} | {_widths(stream.heads)} | "
            f"{_widths(stream.cross_heads)} | {_widths(stream.ffn)} |"
        )
    if (decoder := config.decoder) is not None:
        rows.append(
            f"| decoder | {decoder.layers} | {_widths(decoder.heads)} | "
            f"{_widths(decoder.cross_heads)} | {_widths(decoder.ffn)} |"
        )
    return ["| part | layers | heads | cross heads | FFN units |", "|---|---|---|---|---|", *rows]


def _widths(values: tuple[int, ...]) -> str:
    return str(values[0]) if len(set(values)) == 1 else " ".join(map(str, values))


def _origin(origin: Mapping[str, Any]) -> list[str]:
    lines = [f"From {origin.get('source', 'unknown')}."]
    maps = origin.get("layer_maps") or {}
    if maps:
        lines += ["", "| stack | source layer of each layer |", "|---|---|"]
        lines += [f"| {stack} | {' '.join(map(str, layers))} |" for stack, layers in maps.items()]
    for what in ("fresh", "resized", "unused"):
        if keys := origin.get(what):
            lines += ["", f"{len(keys)} {what}: {', '.join(f'`{key}`' for key in keys[:8])}"]
            if len(keys) > 8:
                lines[-1] += f" and {len(keys) - 8} more"
    return lines


def _selection(selected: Mapping[str, Any]) -> str:
    metric, step, value = (selected[key] for key in ("metric", "step", "value"))
    if value is None:
        return f"Of the last step, {step}: no validation of {metric} counted."
    return (
        f"Of step {step} of {selected['last_step']}, by {metric} on the validation data ({value:.4f}), "
        "which is therefore no unbiased estimate."
    )


def card(
    model: XVLM, facts: Facts, dtype: str, size: int, graphs: Mapping[str, Any] | None = None
) -> str:
    """Markdown of the card.

    Args:
        size: bytes of the weights file, or of all graphs.
        graphs: what graphs.json says, for a folder of graphs.
    """
    from train.evaluation.macs import parameters

    counts, config = parameters(model), model.config
    lines = [
        f"# {config.name}",
        "",
        f"A vision-language model of form `{config.form}`, {counts['total']:,} parameters, "
        f"{size / 1e6:.2f} MB of {dtype} weights, pictures of {config.vision.image_size} px.",
        "",
        *(_LOADING if graphs is None else _graphs(graphs)),
        "## Parameters",
        "",
        "| part | parameters |",
        "|---|---|",
        *(f"| {part} | {count:,} |" for part, count in counts.items()),
        "",
        *_sparsity(facts, counts["prunable"], _of_this(facts.sparsity, model)),
        *("## Shape", "", *_shape(model), ""),
        *_metrics(facts.evaluation),
        *_speed(facts.bench, facts.benched),
    ]
    if facts.origin:
        lines += ["## First weights", "", *_origin(facts.origin), ""]
    if facts.selected:
        lines += ["## Selection", "", _selection(facts.selected), ""]
    if facts.data:
        lines += ["## Data", "", "| split | task | samples | manifest hash |", "|---|---|---|---|"]
        lines += [
            f"| {name} | {d.get('task', '')} | {d.get('samples', '')} | `{d.get('hash', '')}` |"
            for name, d in facts.data.items()
        ]
        lines.append("")
    if facts.recipe:
        lines += ["## Recipe", ""]
        lines += [f"Made again by `{facts.command}` with:", ""] if facts.command else []
        lines += ["```yaml", facts.recipe.strip(), "```", ""]
    return "\n".join(lines)


_LOADING = [
    "```python",
    "from models import from_pretrained",
    'model = from_pretrained("path/to/this/folder")',
    "```",
    "",
]


def _graphs(described: Mapping[str, Any]) -> list[str]:
    """The files, what they take and give, and how far they are from the model."""
    found = described["check"]
    lines = [
        f"## Graphs ({described['format']})",
        "",
        "| file | MB | takes | gives | largest difference |",
        "|---|---|---|---|---|",
    ]
    for name, graph in described["graphs"].items():
        takes = "<br>".join(
            f"{port['name']} {port['dtype']} ({', '.join(map(str, port['shape']))})"
            for port in graph["inputs"]
        )
        gives = "<br>".join(port["name"] for port in graph["outputs"])
        worst = max(found["graphs"][name].values())
        size = graph["bytes"] / 1e6
        lines.append(f"| {graph['file']} | {size:.2f} | {takes} | {gives} | {worst:.1e} |")
    return [
        *lines,
        "",
        f"Differences are between {found['runtime']}, in a process of its own, and the model in "
        f"PyTorch (float32, CPU, {found['cases']} sets of sizes), relative to the largest value where "
        "that is above 1. Sizes, preprocessing and what each graph means: graphs.json.",
        "",
    ]


def _of_this(sparsity: Mapping[str, Any], model: XVLM) -> Mapping[str, Any]:
    """The report of a pruning run where it is of this model, else nothing."""
    left = sum(value.numel() for value in model.parameters())
    return sparsity if sparsity.get("parameters", {}).get("after") == left else {}


def _sparsity(facts: Facts, left: int, report: Mapping[str, Any]) -> list[str]:
    if facts.dense_prunable:
        share = 1 - left / facts.dense_prunable
        lines = [
            f"Sparsity {100 * share:.2f} %: {left:,} of {facts.dense_prunable:,} "
            "prunable parameters (attention heads and FFN units) are left, counted from this "
            "file.",
            "",
        ]
    else:
        lines = []
    rows = {**report.get("modalities", {}), "all": report.get("prunable", {})}
    rows = {name: row for name, row in rows.items() if {"kept", "total", "sparsity"} <= row.keys()}
    if rows:
        lines += ["| pruned part | kept | of | sparsity |", "|---|---|---|---|"]
        lines += [
            f"| {name} | {row['kept']:,} | {row['total']:,} | {100 * row['sparsity']:.2f} % |"
            for name, row in rows.items()
        ]
        lines.append("")
    return lines


def _metrics(evaluation: Mapping[str, Any]) -> list[str]:
    numbers = {
        name: value
        for name, value in evaluation.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }
    if not numbers:
        return ["## Measured", "", "Not measured.", ""]
    about = " ".join(str(evaluation[key]) for key in ("task", "split") if key in evaluation)
    lines = [f"## Measured{f': {about}' if about else ''}", "", "| metric | value |", "|---|---|"]
    lines += [f"| {name} | {value:.4f} |" for name, value in numbers.items()]
    lines.append("")
    if any("blind" in name for name in numbers):
        lines += ["`blind` is what is reached on the same samples without their pictures.", ""]
    return lines


def _speed(bench: Mapping[str, Any], name: str) -> list[str]:
    """Latency of this model and, where it was measured beside others, how much faster it is."""
    if not bench:
        return ["## Speed", "", "Not measured.", ""]
    found = bench["models"]
    first = next(iter(found))
    lines = [
        f"## Speed: {bench['device']}, {bench['threads']} threads, {bench['repeats']} repeats",
        "",
        "| batch | median ms | quartiles | times as fast as " + first + " |",
        "|---|---|---|---|",
    ]
    for batch, row in found[name]["latency"].items():
        ratio = "" if name == first else f"{_ratio(bench, name, batch):.2f}"
        lines.append(
            f"| {batch} | {row['median']:.2f} | {row['q1']:.2f} to {row['q3']:.2f} | {ratio} |"
        )
    return [*lines, "", "Models took turns in one process.", ""]


def _ratio(bench: Mapping[str, Any], name: str, batch: str) -> float:
    """The measured speed-up over the first model, as the bench has it or from its medians."""
    told = bench.get("speedup", {}).get(name, {}).get(batch)
    if told:
        return told["whole"]["median"]
    rows = [model["latency"][batch]["median"] for model in bench["models"].values()]
    return rows[0] / bench["models"][name]["latency"][batch]["median"]
