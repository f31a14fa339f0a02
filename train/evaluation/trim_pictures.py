"""What a trimmed model keeps, for people: patches site by site on the picture, words of the question,
and how much each example costs.

Every rank runs the same forwards; rank 0 writes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from models.config import PAIRED, ModelConfig
from models.outputs import TrimSite
from train.losses.gather import by_itself
from train.monitor.pictures import framed, kept_patches
from train.tasks.base import StepContext
from train.tasks.scored import Scored
from train.tasks.trim import TrimTask, costs_of, row_shares

if TYPE_CHECKING:
    from models.xvlm import XVLM
    from train.monitor import Monitor
    from train.runtime.distributed import Distributed

__all__ = ["drawn", "trim_pictures"]

_FRAME = "#9aa5a0"
_PANELS = 5  # vision sites of a strip
_PER_IMAGE = 2  # rows of an image: two questions about it say more than two pictures


def trim_pictures(
    monitor: Monitor,
    step: int,
    model: XVLM,
    task: TrimTask,
    loader: Iterable[Any],
    dist: Distributed,
    tokenizer: Any,
    count: int = 8,
) -> None:
    """Writes up to `count` examples of the first batch as TASK/kept, and two histograms over its
    rows: trim/macs_share (cost of an example over the full model's, vision alone where texts share
    images) and trim/kept_patches (share of patches behind the last vision site).
    """
    batch = next(iter(loader)).to(dist.device)
    was_training = model.training
    model.eval()
    model.set_trimming("mask")
    try:
        with torch.inference_mode(), by_itself():
            context = StepContext(step, 0, 1, torch.Generator().manual_seed(0))
            done = task.base.score(model, batch, context, task.base.shares(batch, context))
            pictures, texts = drawn(model, done, batch, tokenizer, count)
            values = _distributions(model, done, batch)
    finally:
        model.train(was_training)
    if pictures:
        monitor.pictures(step, f"{task.name}/kept", torch.stack(pictures), texts)
    monitor.histograms(step, values)


def drawn(
    model: XVLM, done: Scored, batch: Any, tokenizer: Any, count: int
) -> tuple[list[Tensor], list[str]]:
    """A strip for each of up to `count` valid rows, and its text.

    A strip is the picture, then what is left of it in front of vision blocks (dropped patches are
    dark), then what the last fusion site lets through. NLVR2 has one below the other.
    """
    pictures, texts = [], []
    shares = row_shares(costs_of(model, done))
    for row in _rows(batch, count):
        pictures.append(_strip(model.config, done, batch, row))
        told = [_sentence(done, batch, tokenizer, row)]
        if shares is not None:
            told.append(f"costs {100 * float(shares[row]):.0f} % of the full pass")
        texts.append("\n".join(told))
    return pictures, texts


def _rows(batch: Any, count: int) -> list[int]:
    """Valid rows, of each image the first ones."""
    shown: dict[int, int] = {}
    rows = []
    for row in batch.valid.nonzero()[:, 0].tolist():
        image = int(batch.image_index[row])
        if shown.get(image, 0) < _PER_IMAGE:
            shown[image] = shown.get(image, 0) + 1
            rows.append(row)
    return rows[:count]


# --- pictures -------------------------------------------------------------------------------------


def _strip(config: ModelConfig, done: Scored, batch: Any, row: int) -> Tensor:
    paired = config.form in PAIRED
    indices = (batch.image_index, batch.second_index) if paired else (batch.image_index,)
    lines = []
    for side, index in enumerate(indices):
        image = int(index[row])
        panels = [framed(batch.images[image], _FRAME)]
        seen = row + side * batch.rows if done.image.per_text else image
        for label, kept in _panels(config, done, seen, row, side if paired else None):
            told = f"{label}: {int(kept.sum())}/{kept.numel()}"
            panels.append(kept_patches(batch.images[image], kept, told))
        lines.append(torch.cat(panels, dim=2))
    return torch.cat(lines, dim=1)


def _panels(
    config: ModelConfig, done: Scored, seen: int, row: int, side: int | None
) -> list[tuple[str, Tensor]]:
    """(name, (g, g) bool of kept patches) of the sites that are shown.

    Args:
        seen: row of the image pass.   row: of the fusion pass.   side: of two pictures, which.
    """
    found = []
    if done.image.trimming is not None:
        sites = done.image.trimming.sites
        for layer in _spaced(list(sites), _PANELS):
            found.append((f"block {layer}", _grid(config, sites[layer], seen)))
    if done.fused.trimming is not None:
        first = config.text.text_layers
        context = {
            layer - first: site
            for layer, site in done.fused.trimming.context_sites.items()
            if side is None or (layer - first) % 2 == side
        }
        if context:
            layer = max(context)
            found.append((f"fusion {layer}", _grid(config, context[layer], row)))
    return found


def _grid(config: ModelConfig, site: TrimSite, row: int) -> Tensor:
    """(g, g) bool: the patches, which are the last tokens of a row, that are there behind a site."""
    side = config.vision.image_size // config.vision.patch_size
    return (site.keep()[row, -config.vision.patches :] > 0).view(side, side).cpu()


def _spaced(items: Sequence[int], most: int) -> list[int]:
    """At most `most` of them, evenly, the last one among them."""
    if len(items) <= most:
        return list(items)
    return [items[(place + 1) * len(items) // most - 1] for place in range(most)]


def _sentence(done: Scored, batch: Any, tokenizer: Any, row: int) -> str:
    """The text; tokens that a text site dropped are in brackets."""
    asked = hasattr(batch, "question_ids")
    ids, mask = (
        (batch.question_ids, batch.question_mask) if asked else (batch.text_ids, batch.text_mask)
    )
    passes = [output.trimming for output in (done.text, done.fused) if output is not None]
    sites = [site for record in passes if record for site in record.sites.values()]
    own = ids[row][mask[row]]
    if not sites:
        return tokenizer.decode(own.tolist(), skip_special_tokens=True)
    kept = (sites[-1].keep()[row] > 0)[mask[row]].tolist()
    tokens = tokenizer.convert_ids_to_tokens(own.tolist())
    return " ".join(
        token if stays else f"[-{token}-]" for token, stays in zip(tokens, kept, strict=True)
    )


# --- numbers --------------------------------------------------------------------------------------


def _distributions(model: XVLM, done: Scored, batch: Any) -> dict[str, Tensor]:
    costs = costs_of(model, done)
    shares = row_shares(costs)
    if shares is None:
        values = {"trim/macs_share": costs.parts["vision"] * costs.images / costs.dense["vision"]}
    else:
        values = {"trim/macs_share": shares[batch.valid]}
    if done.image.trimming is not None and done.image.trimming.sites:
        site = list(done.image.trimming.sites.values())[-1]
        values["trim/kept_patches"] = site.keep()[:, -model.config.vision.patches :].mean(1)
    return values
