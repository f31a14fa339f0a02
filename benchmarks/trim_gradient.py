"""What a loss tells a keep decision: its signed derivative against the derivative's size.

For patches that show a thing of the picture and patches of the wall behind, on a trained model of
blocksworld with fresh trimmers: mean and spread of the reason to stay, which is -dL/dm (signed) or
|dL/dm| (size), and how often a patch with a thing has more reason to stay than a patch of the wall (1
is a perfect guide, 0.5 is none). Once with everything kept, and once with an eighth dropped at
random at each site, as in the first steps of training, where dropped patches are told apart. Run
from the repository root, on the model that benchmarks/trimming.py trims:

    python benchmarks/trim_gradient.py --model runs/trimming/vqa/teacher/run/model --data runs/trimming/data
"""

from __future__ import annotations

import argparse
import json
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

from data_pipeline.loader import build_loader  # noqa: E402
from data_pipeline.text import load_tokenizer  # noqa: E402
from models import from_pretrained  # noqa: E402
from models.trimming import default_trimming, with_trimming  # noqa: E402
from models.xvlm import XVLM  # noqa: E402
from train.config import KdConfig  # noqa: E402
from train.provenance import provenance  # noqa: E402
from train.tasks.base import StepContext  # noqa: E402
from train.tasks.vqa import VqaTask  # noqa: E402

_PIXELS, _CONTRAST = 3, 40  # a patch shows a thing: more pixels than this, so far from the median
_READERS = ("models.attention", "models.streams", "models.vision")


def shows_thing(images: Tensor, patch: int) -> Tensor:
    """(N, 3, S, S) uint8 -> (N, patches) bool."""
    wall = images.float().flatten(2).median(-1).values[:, :, None, None]
    far = (images.float() - wall).abs().amax(1) > _CONTRAST
    grid = far.shape[-1] // patch
    parts = far.view(len(far), grid, patch, grid, patch).permute(0, 1, 3, 2, 4)
    return parts.reshape(len(far), grid * grid, -1).sum(-1) > _PIXELS


def more_often(things: Tensor, walls: Tensor) -> float:
    """How often one of the first is above one of the second (area under the ROC curve)."""
    every = torch.cat([things, walls])
    rank = torch.empty(len(every), dtype=torch.float64)
    rank[every.argsort()] = torch.arange(1, len(every) + 1, dtype=torch.float64)
    count = len(things)
    return float((rank[:count].sum() - count * (count + 1) / 2) / (count * len(walls)))


def reasons(model: XVLM, task: VqaTask, batches: list[Any], signed: bool) -> dict[int, Any]:
    """Site -> (reason to stay, kept, shows a thing), each one number a patch, over all batches."""
    found: dict[int, list[tuple[Tensor, Tensor, Tensor]]] = {}
    for number, batch in enumerate(batches):
        torch.manual_seed(number)
        context = StepContext(0, 0, 1, torch.Generator().manual_seed(number))
        patches = [mock.patch(f"{module}.salient", lambda w: w) for module in _READERS]
        for patch in patches if signed else ():
            patch.start()
        try:
            done = task.score(model, batch, context, task.shares(batch, context))
            sites = done.image.trimming.sites
            loss = torch.stack(list(done.terms.values())).sum()
            grads = torch.autograd.grad(loss, [site.kept for site in sites.values()])
        finally:
            mock.patch.stopall()
        prefix = model.config.vision.prefix_tokens
        things = shows_thing(batch.images, model.config.vision.patch_size)[batch.image_index]
        for (layer, site), grad in zip(sites.items(), grads, strict=True):
            # Times the rows: of one question's loss, not of the batch's mean.
            parts = (-grad[:, prefix:] * len(grad), site.kept[:, prefix:] > 0, things)
            found.setdefault(layer, []).append(tuple(p.detach().flatten() for p in parts))
    return {
        layer: [torch.cat(part) for part in zip(*parts, strict=True)]
        for layer, parts in found.items()
    }


def _of(values: Tensor) -> dict[str, float]:
    return {"mean": float(values.mean()), "spread": float(values.std()), "patches": len(values)}


def told(reason: Tensor, kept: Tensor, things: Tensor, dropped: bool) -> dict[str, Any]:
    """What is written down of a site."""
    result: dict[str, Any] = {
        "thing": _of(reason[kept & things]), "wall": _of(reason[kept & ~things]),
        "thing_above_wall": more_often(reason[kept & things], reason[kept & ~things]),
    }  # fmt: skip
    if dropped:
        result["dropped"] = _of(reason[~kept])
        result["largest_dropped_over_largest_kept"] = float(
            reason[~kept].abs().max() / reason[kept].abs().max()
        )
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="of form vqa, without trimmers")
    parser.add_argument("--data", type=Path, required=True, help="with vqa/val and tokenizer")
    parser.add_argument("--batches", type=int, default=32, help="of 16 pictures, 4 questions each")
    parser.add_argument("--json", type=Path, default=ROOT / "benchmarks/results/trim_gradient.json")
    args = parser.parse_args()
    torch.manual_seed(0)
    dense = from_pretrained(args.model)
    sites = tuple(range(dense.config.vision.layers))
    model = with_trimming(dense, default_trimming(dense.config, vision=sites, fusion=())).train()
    tokenizer, vision = load_tokenizer(args.data / "tokenizer"), model.config.vision
    loader = iter(build_loader(
        "vqa", args.data / "vqa/val", tokenizer=tokenizer, batch=16, train=True, seed=3,
        image_size=vision.image_size, patch_size=vision.patch_size, max_tokens=20,
        max_answer_tokens=3, rows_per_image=4,
    ))  # fmt: skip
    batches = [next(loader) for _ in range(args.batches)]
    task = VqaTask({}, KdConfig(), model.config, None)
    found: dict[str, Any] = {}
    for name, tau in (("everything kept", None), ("one in eight dropped at each site", 1.0)):
        model.set_trimming("mask", tau=tau)
        found[name] = {
            kind: {
                str(layer): told(*parts, dropped=tau is not None)
                for layer, parts in reasons(model, task, batches, kind == "signed").items()
            }
            for kind in ("signed", "size")
        }
    args.json.write_text(json.dumps({
        "what": "reason to stay of patches with a thing and of the wall, by kind of gradient",
        "command": " ".join(["python benchmarks/trim_gradient.py", *sys.argv[1:]]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"), "questions": 64 * args.batches,
        "found": found, "provenance": provenance(1),
    }, indent=1) + "\n")  # fmt: skip
    for name, kinds in found.items():
        for kind, layers in kinds.items():
            line = "  ".join(f"{n}: {s['thing_above_wall']:.3f}" for n, s in layers.items())
            print(f"{name}, {kind}: a thing above the wall at site {line}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
