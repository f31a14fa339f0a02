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
    """What the weights alone cannot tell.

    Attributes:
        recipe: resolved run file, as YAML text.
        data: split name -> manifest hash and counts.
        metrics: name -> value, as evaluated.
        dense_prunable: prunable parameters before pruning, for the sparsity.
        command: how to make the model again.
        origin: where the first weights came from (train.student.FirstWeights.save).
    """

    recipe: str = ""
    data: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    dense_prunable: int | None = None
    command: str = ""
    origin: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of_run(
        cls, model: Path, metrics: Mapping[str, float] | None = None, dense: int | None = None
    ) -> Facts:
        """Facts of the run directory that holds `model` (RUN/model); empty where there is none."""
        run_file = model.resolve().parent / "run.yaml"
        if not run_file.is_file():
            return cls(metrics=metrics or {}, dense_prunable=dense)
        text = run_file.read_text(encoding="utf-8")
        values = yaml.safe_load(text)
        values = values if isinstance(values, dict) else {}
        data = {}
        for split, folder in _sources(values.get("data") or {}):
            manifest = Path(folder) / "manifest.json"
            if manifest.is_file():
                found = json.loads(manifest.read_text(encoding="utf-8"))
                data[split] = {
                    key: found[key] for key in ("task", "samples", "hash") if key in found
                }
        origin_file = run_file.with_name("origin.json")
        origin = (
            json.loads(origin_file.read_text(encoding="utf-8")) if origin_file.is_file() else {}
        )
        stage = values.get("stage", "")
        command = f"espalier {stage} run.yaml" if stage else ""
        return cls(text, data, metrics or {}, dense, command, origin)


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


def card(model: XVLM, facts: Facts, dtype: str, size: int) -> str:
    """Markdown of the card. `size`: bytes of the weights file."""
    from train.evaluation.macs import parameters

    counts, config = parameters(model), model.config
    lines = [
        f"# {config.name}",
        "",
        f"A vision-language model of form `{config.form}`, {counts['total']:,} parameters, "
        f"{size / 1e6:.2f} MB of {dtype} weights, pictures of {config.vision.image_size} px.",
        "",
        "```python",
        "from models import from_pretrained",
        'model = from_pretrained("path/to/this/folder")',
        "```",
        "",
        "## Parameters",
        "",
        "| part | parameters |",
        "|---|---|",
        *(f"| {part} | {count:,} |" for part, count in counts.items()),
        "",
    ]
    if facts.dense_prunable:
        sparsity = 1 - counts["prunable"] / facts.dense_prunable
        lines += [
            f"Sparsity {100 * sparsity:.2f} %: {counts['prunable']:,} of {facts.dense_prunable:,} "
            "prunable parameters (attention heads and FFN units) are left, counted from this "
            "file.",
            "",
        ]
    lines += ["## Shape", "", *_shape(model), ""]
    if facts.metrics:
        lines += ["## Measured", "", "| metric | value |", "|---|---|"]
        lines += [f"| {name} | {value:.4f} |" for name, value in facts.metrics.items()]
        lines += [
            "",
            "`blind` is the accuracy of a language-only baseline on the same questions.",
            "",
        ]
    if facts.origin:
        lines += ["## First weights", "", *_origin(facts.origin), ""]
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
