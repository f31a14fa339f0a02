"""Does distillation help? The same student with and without its teacher, paired over seeds.

Both runs of a pair start from the same weights (cut from the VQA teacher by the layer map), see the
same batches in the same order for the same steps and learning rate; without KD the task weight is
1. The difference of their accuracies on held-out questions is the gain. Run from the repository
root:

    python benchmarks/kd_gain.py --data DIR --steps 150 --seeds 0 1 2

DIR is a folder made by `espalier data blocksworld --image-size 48`; results go to
benchmarks/results/kd_gain.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
VARIANTS = {
    "with_kd": (),
    "without_kd": ("kd.task_weight=1.0", "kd.kd_weight=0.0", "teacher.path=null"),
}


def command(args: argparse.Namespace, variant: str, seed: int, init: Path, out: Path) -> list[str]:
    """One training run by the command line."""
    data = args.data / "vqa"
    return [
        sys.executable,
        "-m",
        "train.main",
        "finetune",
        "blocksworld-finetune-student",
        f"out={out}",
        f"seed={seed}",
        f"model={init}",
        f"teacher.path={args.teacher}",
        "initialise.task_vector=null",
        f"data.train={data / 'train'}",
        f"data.val={data / args.split}",
        f"optim.steps={args.steps}",
        "eval.samples=0",
        "checkpoint.every=0",
        *VARIANTS[variant],
        "--resume",
        "none",
    ]


def cut_student(teacher: Path, out: Path) -> Path:
    """The half-depth student cut from the teacher, written once, so that both variants start from
    one file.
    """
    sys.path.insert(0, str(ROOT))
    from models import from_pretrained, presets
    from models.initialise import student_from_teacher

    model = from_pretrained(teacher)
    vocab_size = model.config.text.vocab_size
    config = presets.config("blocksworld-student", form="vqa", text={"vocab_size": vocab_size})
    student, _ = student_from_teacher(model, config)
    student.save_pretrained(out, tokenizer=None)
    return out


def accuracy(out: Path) -> float:
    """Held-out accuracy of the last step."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return next(line["validation"]["accuracy"] for line in reversed(lines) if "validation" in line)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument(
        "--teacher", type=Path, default=ROOT / "models/pretrained/blocksworld-teacher-vqa"
    )
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--split", default="val", help="held-out split that is scored")
    parser.add_argument("--work", type=Path, default=ROOT / "runs/kd_gain")
    parser.add_argument("--json", type=Path, default=ROOT / "benchmarks/results/kd_gain.json")
    args = parser.parse_args()
    init = cut_student(args.teacher, args.work / "init")
    pairs: list[dict[str, Any]] = []
    for seed in args.seeds:
        pair: dict[str, Any] = {"seed": seed}
        for variant in VARIANTS:
            out = args.work / f"{variant}-{seed}"
            subprocess.run(command(args, variant, seed, init, out), check=True, cwd=ROOT)
            pair[variant] = accuracy(out)
        pair["gain"] = pair["with_kd"] - pair["without_kd"]
        print(pair, flush=True)
        pairs.append(pair)
    gains = [pair["gain"] for pair in pairs]
    from train.provenance import provenance

    result = {
        "what": "accuracy of the half-depth student on held-out questions, with and without its teacher",
        "command": " ".join(["python", *sys.argv]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "steps": args.steps,
        "pairs": pairs,
        "mean_gain": statistics.mean(gains),
        "min_gain": min(gains),
        "stdev_gain": statistics.stdev(gains) if len(gains) > 1 else None,
        "provenance": provenance(1),
    }
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({key: result[key] for key in ("mean_gain", "min_gain")}))
    return 0 if min(gains) > 0 else 1


if __name__ == "__main__":
    sys.exit(main())
