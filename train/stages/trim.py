"""The end of a trim stage: what the trained trimmers keep on held-out inputs, and the counts that
mode "bucket" will use.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from data_pipeline.batches import Batch
from models import from_pretrained
from models.outputs import TrimRecord, TrimSite
from models.trim_config import TrimmingConfig
from models.xvlm import XVLM
from train.evaluation.runner import evaluate
from train.tasks.base import StepContext
from train.tasks.trim import TrimTask, costs_of, row_shares
from train.trim_config import TrimConfig

__all__ = ["REPORT", "Kept", "finish_trimming", "keep_counts", "measure"]

_LOG = logging.getLogger(__name__)
REPORT = "trim.json"
_MOST = 0.9
_BINS = 20


@dataclass
class Kept:
    """What a trimmed model kept on some batches.

    Attributes:
        counts: "vision.3", "image.6" (image tokens that text layer 6 reads), "text.2" -> tokens kept
            of those that could go, one number a row.
        tokens: the same names -> tokens in front of the first site, protected ones counted.
        heads: "vision.3", "fusion.6", "cross.6" -> kept share of heads, one number a row.
        shares: cost of each row over the full model's, where every text has an image of its own.
        mean_shares: of each batch; `rows` of it.
    """

    counts: dict[str, list[float]] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)
    heads: dict[str, list[float]] = field(default_factory=dict)
    shares: list[float] = field(default_factory=list)
    mean_shares: list[float] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)

    def site(self, name: str, site: TrimSite) -> None:
        """Adds a token site's decisions."""
        kept = (site.kept > 0) & site.movable
        self.counts.setdefault(name, []).extend(kept.sum(1).tolist())
        self.tokens[name] = site.tokens

    def record(self, name: str, record: TrimRecord) -> None:
        """Adds everything that a pass decided."""
        for layer, site in record.sites.items():
            self.site(f"{name}.{layer}", site)
        for layer, site in record.context_sites.items():
            self.site(f"image.{layer}", site)
        for kind, chosen in ((name, record.heads), ("cross", record.cross_heads)):
            for layer, heads in chosen.items():
                self.heads.setdefault(f"{kind}.{layer}", []).extend(heads.mean(1).tolist())

    @property
    def macs_share(self) -> float:
        """Mean cost over the full model's."""
        return sum(s * n for s, n in zip(self.mean_shares, self.rows, strict=True)) / sum(self.rows)


@torch.inference_mode()
def measure(model: XVLM, task: Any, batches: Iterable[Batch]) -> Kept:
    """What a model in mode "mask" keeps; it is evaluated without noise.

    Args:
        task: `Trimmable`.

    Raises:
        ValueError: there are no batches.
    """
    found, device = Kept(), next(model.parameters()).device
    for batch in batches:
        batch = batch.to(device)
        context = StepContext(0, 0, 1, torch.Generator().manual_seed(0))
        done = task.score(model, batch, context, task.shares(batch, context))
        for name, output in (("vision", done.image), ("text", done.text), ("text", done.fused)):
            if output is not None and output.trimming is not None:
                found.record(name, output.trimming)
        costs = costs_of(model, done)
        found.mean_shares.append(float(costs.share()))
        found.rows.append(batch.rows)
        shares = row_shares(costs)
        if shares is not None:
            found.shares.extend(shares.tolist())
    if not found.rows:
        raise ValueError("trim: there are no held-out inputs to count kept tokens on (data.val)")
    return found


def keep_counts(
    trimming: TrimmingConfig, kept: Kept, trim: TrimConfig, first_fusion: int, patches: int
) -> TrimmingConfig:
    """The configuration with counts for mode "bucket": what the sites keep of the tokens that may
    go, on average or nearly always, rounded up to `trim.multiple`, never more than at the site
    before.
    """
    values: dict[str, Any] = {}
    names = {
        "vision": [f"vision.{layer}" for layer in trimming.vision],
        "fusion": [f"image.{first_fusion + layer}" for layer in trimming.fusion],
        "text": [f"text.{layer}" for layer in trimming.text],
    }
    for field_name, sites in names.items():
        counts, limit = [], patches if field_name != "text" else 10**9
        for site in sites:
            wanted = _count(kept.counts[site], trim)
            wanted = math.ceil(wanted / trim.multiple) * trim.multiple
            limit = max(1, min(limit, wanted))
            counts.append(limit)
        values[f"{field_name}_keep"] = tuple(counts) if sites else None
    return replace(trimming, **values)


def _count(found: list[float], trim: TrimConfig) -> float:
    return _mean(found) if trim.keep == "mean" else _most(found)


def finish_trimming(
    folder: Path, task: TrimTask, batches: Any, device: torch.device, tokenizer: Any
) -> dict[str, Any]:
    """Measures the saved model, gives it counts for buckets and mode "gather", and writes trim.json
    beside the folder. On one rank.

    Args:
        folder: of the model that the run has saved.
        batches: a loader of held-out inputs, one pass each time it is iterated.

    Returns:
        What the file holds: metrics of the full and of the trimmed model on those inputs, the share
        of the cost, and what each site keeps.
    """
    model = from_pretrained(folder, device=device)
    assert model.config.trimming is not None
    results: dict[str, Any] = {}
    for mode in ("off", "mask"):
        model.set_trimming(mode)
        results["full" if mode == "off" else "trimmed"] = evaluate(model, task, batches)
    kept = measure(model, task.base, _valid(batches))
    config = model.config
    assert config.trimming is not None  # the run added it
    trimming = keep_counts(
        config.trimming, kept, task.trim, config.text.text_layers, config.vision.patches
    )
    model.config = replace(config, trimming=replace(trimming, mode="gather"))
    model.save_pretrained(folder, tokenizer=tokenizer)
    report = results | _summary(kept, task.trim, trimming)
    (folder.parent / REPORT).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    _LOG.info("trimmed passes cost %.3f of the full ones (asked: %.3f), see %s", kept.macs_share,
              task.trim.budget, folder.parent / REPORT)  # fmt: skip
    return report


def _valid(batches: Iterable[Batch]) -> Iterator[Batch]:
    """Without the batch that padding fills up: repeated rows would count twice. Where all inputs
    are fewer than a batch, they are better counted so than not at all.
    """
    whole, last = 0, None
    for batch in batches:
        if bool(batch.valid.all()):
            whole += 1
            yield batch
        last = batch
    if not whole and last is not None:
        _LOG.warning("fewer held-out inputs than eval.batch: some count twice in %s", REPORT)
        yield last


def _summary(kept: Kept, trim: TrimConfig, trimming: TrimmingConfig) -> dict[str, Any]:
    shares = torch.tensor(kept.shares or [kept.macs_share], dtype=torch.float64)
    edges = torch.linspace(0, max(1.0, float(shares.max())), _BINS + 1, dtype=torch.float64)
    return {
        "budget": trim.budget,
        "macs_share": kept.macs_share,
        "macs_share_min": float(shares.min()),
        "macs_share_max": float(shares.max()),
        "macs_share_histogram": {
            "edges": edges.tolist(),
            "counts": torch.histogram(shares, edges).hist.tolist(),
        },
        "samples": sum(kept.rows),
        "sites": {
            name: {"tokens": kept.tokens[name], "mean": _mean(values), "most": _most(values)}
            for name, values in kept.counts.items()
        },
        "heads": {name: _mean(values) for name, values in kept.heads.items()},
        "keep": {name: getattr(trimming, f"{name}_keep") for name in ("vision", "fusion", "text")},
    }


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _most(values: list[float]) -> float:
    """The smallest of the numbers that is enough for `_MOST` of them."""
    return sorted(values)[math.ceil(_MOST * len(values)) - 1]
