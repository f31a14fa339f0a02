"""Does a teacher help pre-training? The same student with and without it, paired over seeds.

Both runs of a pair follow the shipped recipe blocksworld-distill from the same first weights, over
the same batches in the same order, for the same steps and learning rate; without the teacher the
task losses have weight 1. Scored on the validation split: retrieval R@1 both ways (among 64), ITM
accuracy (own pairs and others), accuracy of masked tokens, and mean IoU of predicted boxes. Run
from the repository root:

    python benchmarks/pretrain_kd_gain.py --steps 200 --seeds 0 1 2

The data are made first where --data has none: scenes that the teacher has not seen. Results go to
benchmarks/results/pretrain_kd_gain.json.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
RECIPE = ROOT / "train/recipes/blocksworld-distill.yaml"
TEACHER = ROOT / "models/pretrained/blocksworld-teacher"
WITHOUT = ("stage=pretrain", "teacher.path=null")  # the task losses then have weight 1
METRICS = (
    "image_to_text_r1",
    "text_to_image_r1",
    "itm_accuracy",
    "mlm_accuracy",
    "box_iou",
)
BATCH = 64  # images of an evaluation batch, among which retrieval chooses
MAKE_DATA = "--scenes 4000 --val 512 --test 200 --image-size 48 --seed 5 --tasks pretrain"
BOX_BATCHES = 24  # of 24 pictures and 64 rows each
_SETTINGS: dict[str, Any] = {
    "max_tokens": 40,
    "image_size": 48,
    "patch_size": 8,
    "seed": 0,
    "batch": BATCH,
}


def make_data(args: argparse.Namespace) -> None:
    """Writes the data set into args.data, without the scenes that the teacher was trained on."""
    seen = TEACHER / "scenes-train.npy"
    make = [sys.executable, "-m", "train.main", "data", "blocksworld", "--out", str(args.data)]
    subprocess.run([*make, *MAKE_DATA.split(), "--exclude", str(seen)], check=True, cwd=ROOT)


def command(args: argparse.Namespace, teacher: bool, seed: int, init: Path, out: Path) -> list[str]:
    """One training run by the command line."""
    settings = [
        f"out={out}",
        f"seed={seed}",
        f"model={init}",
        f"teacher.path={args.teacher}",
        f"data.train={args.data / 'pretrain' / 'train'}",
        "data.val=null",
        f"data.region.probability={args.regions}",
        f"optim.steps={args.steps}",
        "checkpoint.every=0",
        *(() if teacher else WITHOUT),
    ]
    stage = "distill" if teacher else "pretrain"
    run = [sys.executable, "-m", "train.main", stage, str(RECIPE)]
    return [*run, *settings, "--resume", "none"]


def first_student(args: argparse.Namespace, out: Path) -> Path:
    """The recipe's student before its first step, written once, so that all runs start from one
    file: cut from the teacher by the layer map, or drawn at random.
    """
    import torch

    from models import from_pretrained, presets
    from models.initialise import student_from_teacher
    from models.xvlm import XVLM

    teacher = from_pretrained(args.teacher)
    text = {"vocab_size": teacher.config.text.vocab_size}
    config = presets.config("blocksworld-student", text=text)
    if args.first == "teacher":
        student, _ = student_from_teacher(teacher, config)
    else:
        torch.manual_seed(0)
        student = XVLM(config)
    student.save_pretrained(out, tokenizer=None)
    return out


def scores(model_folder: Path, data: Path) -> dict[str, float]:
    """METRICS of a model on the validation split: the same pictures, masks and crops for all."""
    from data_pipeline.loader import build_loader
    from data_pipeline.text import load_tokenizer
    from models import from_pretrained
    from train.config import KdConfig
    from train.data_config import RegionConfig
    from train.evaluation.runner import evaluate
    from train.tasks.pretrain import PretrainTask

    model = from_pretrained(model_folder).eval()
    split, tokenizer = data / "pretrain" / "val", load_tokenizer(data / "tokenizer")
    plain = build_loader("pretrain", split, tokenizer=tokenizer, train=False, **_SETTINGS)
    region = RegionConfig(images=24, rows=64)
    boxes = build_loader(
        "region", split, tokenizer=tokenizer, train=True, region=region, **_SETTINGS
    )
    task = PretrainTask({}, KdConfig(), model.config, None)
    found = evaluate(model, task, plain)
    found["itm_accuracy"] = (found["itm_positive"] + found["itm_negative"]) / 2
    found["box_iou"] = box_iou(model, islice(boxes, BOX_BATCHES))
    return {name: found[name] for name in METRICS}


def box_iou(model: Any, batches: Iterable[Any]) -> float:
    """Mean IoU over the region rows: boxes from the whole picture and the text."""
    import torch
    from torchvision.ops import box_convert
    from torchvision.ops import box_iou as overlaps

    total, count = 0.0, 0
    with torch.inference_mode():
        for batch in batches:
            images = model.encode_image(batch.images).last[batch.image_index]
            text = model.encode_text(batch.text_ids, batch.text_mask).last
            pred = model.predict_box(model.fuse(text, batch.text_mask, images).last)
            pred, target = (box_convert(b, "cxcywh", "xyxy") for b in (pred, batch.boxes))
            iou = overlaps(pred, target).diagonal()[batch.is_region]
            total, count = total + float(iou.sum()), count + iou.numel()
    return total / count


def summary(pairs: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """For each metric: means of both variants, the gain's mean, least and spread, and the seeds in
    which there is one.
    """
    result = {}
    for name in METRICS:
        sides = {side: [pair[side][name] for pair in pairs] for side in ("with_kd", "without_kd")}
        gains = [ours - alone for ours, alone in zip(*sides.values(), strict=True)]
        result[name] = {f"mean_{side}": statistics.mean(sides[side]) for side in sides} | {
            "mean_gain": statistics.mean(gains),
            "min_gain": min(gains),
            "stdev_gain": statistics.stdev(gains) if len(gains) > 1 else None,
            "seeds_with_gain": f"{sum(gain > 0 for gain in gains)} of {len(gains)}",
        }
    return result


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    result.add_argument("--data", type=Path, default=ROOT / "runs/pretrain_kd_gain/data")
    result.add_argument("--teacher", type=Path, default=TEACHER)
    result.add_argument("--steps", type=int, default=200)
    result.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    result.add_argument("--regions", type=float, default=0.5, help="probability of a region step")
    result.add_argument("--first", choices=("teacher", "random"), default="teacher")
    result.add_argument("--work", type=Path, default=ROOT / "runs/pretrain_kd_gain")
    result.add_argument(
        "--json", type=Path, default=ROOT / "benchmarks/results/pretrain_kd_gain.json"
    )
    return result


def main() -> int:
    args = parser().parse_args()
    # Runs start in the repository root, wherever this one was started.
    args.data, args.teacher, args.work = (
        path.resolve() for path in (args.data, args.teacher, args.work)
    )
    from train.provenance import provenance

    if not (args.data / "dataset.json").is_file():
        make_data(args)
    init = first_student(args, args.work / "init")
    references = {"teacher": scores(args.teacher, args.data), "first": scores(init, args.data)}
    print(json.dumps(references), flush=True)
    pairs: list[dict[str, Any]] = []
    for seed in args.seeds:
        pair: dict[str, Any] = {"seed": seed}
        for name, teacher in (("with_kd", True), ("without_kd", False)):
            out = args.work / f"{name}-{seed}"
            began = time.perf_counter()
            subprocess.run(command(args, teacher, seed, init, out), check=True, cwd=ROOT)
            pair[f"seconds_{name}"] = round(time.perf_counter() - began, 1)
            pair[name] = scores(out / "model", args.data)
        print(json.dumps(pair), flush=True)
        pairs.append(pair)
    result = {
        "what": "validation metrics of the half-depth student after pre-training, with and without "
        "its teacher, at equal steps",
        "command": " ".join(["python", *sys.argv]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "steps": args.steps,
        "region_probability": args.regions,
        "first_weights": args.first,
        "references": references,
        "metrics": summary(pairs),
        "pairs": pairs,
        "load_average": os.getloadavg(),
        "provenance": provenance(1),
    }
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result["metrics"], indent=1))
    return 0 if all(metric["mean_gain"] > 0 for metric in result["metrics"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
