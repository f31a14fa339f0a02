"""Does pruning remove what was asked for? Target, expected and actual share, for all five tasks.

Each task's blocksworld pruning recipe prunes a half-depth student that was made from layers of the
pre-trained teacher, over a shorter ramp and without the recipe's own teacher: gates are held to
their target whatever the losses say. VQA is pruned in every scope as well, and once by the published
multipliers. Target and expected share of every step are those that the run recorded; the actual one is
counted from the tensors of the two safetensors files that the run leaves, uncut and cut. Run from the
repository root:

    python benchmarks/sparsity.py

Every case is a folder of --work with its own marker: what was stopped goes on where it was. Results
go to benchmarks/results/sparsity.json, the table of docs/pruning.md to the console.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import table
from table import ROOT, TASKS, read_json, write_json

STEPS, RAMP, FREEZE = 160, 80, 150
RESULTS = ROOT / "benchmarks/results/sparsity.json"
SCENES = "--scenes 300 --val 16 --test 16 --image-size 48 --seed 5"


@dataclass(frozen=True)
class Case:
    """One pruning run: its overrides of the task's recipe."""

    task: str
    scope: str = "modal-adaptive"
    constraint: str = "projection"

    @property
    def name(self) -> str:
        return f"{self.task}-{self.scope}-{self.constraint}"


CASES = (
    *(Case(task) for task in TASKS),
    Case("vqa", scope="per-encoder"),
    Case("vqa", scope="uniform"),
    Case("vqa", constraint="lagrangian"),
)


# -- runs ------------------------------------------------------------------------------------------


def prepare(work: Path) -> None:
    """Data of all tasks, and the student that every case prunes, once."""
    if not (work / "data" / "dataset.json").is_file():
        argv = [sys.executable, "-m", "train.main", "data", "blocksworld", *SCENES.split()]
        subprocess.run([*argv, "--out", str(work / "data")], check=True, cwd=ROOT)
    table.prepare_student(work)


def command(case: Case, work: Path, scale: float) -> tuple[str, ...]:
    """The training command of a case; it writes WORK/NAME/run."""
    ramp, freeze, steps = (max(1, round(n * scale)) for n in (RAMP, FREEZE, STEPS))
    data = work / "data" / case.task
    return (
        "prune", table._recipe(case.task, "prune"), f"out={work / case.name / 'run'}",
        f"model={work / 'first'}", "teacher.path=null", f"data.train={data / 'train'}",
        f"data.val={data / 'val'}", f"optim.steps={steps}", f"prune.ramp_steps={ramp}",
        f"prune.freeze_step={freeze}", f"prune.scope={case.scope}",
        f"prune.constraint={case.constraint}", "log.every=1", "log.histograms_every=0",
        "log.pictures_every=0", "checkpoint.every=50", "eval.samples=16",
    )  # fmt: skip


def run(case: Case, work: Path, scale: float, place: str) -> int:
    """Prunes, or goes on pruning; exit code."""
    from train.demo import Stage, run_stage
    from train.recipes_io import find_recipe

    argv = command(case, work, scale)
    identity = hashlib.sha256(json.dumps(argv).encode() + find_recipe(argv[1]).read_bytes())
    stage = Stage(case.name, "prune", argv, ("run",), argv[1])
    code, _ = run_stage(stage, work / case.name, identity.hexdigest(), place)
    return code


# -- what came of it -------------------------------------------------------------------------------


def parameters_of(path: Path) -> int:
    """Numbers in a safetensors file, from its header."""
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return sum(
        math.prod(entry["shape"]) for name, entry in header.items() if name != "__metadata__"
    )


def outcome(case: Case, folder: Path) -> dict[str, Any]:
    """What a finished run was held to, expected and removed."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    by_step = {r["step"]: r["sparsity"] for r in records if "sparsity" in r}  # a resume repeats
    report = read_json(folder / "sparsity.json")
    prunable, held = report["prunable"], report["budget"]
    files = [parameters_of(folder / name / "model.safetensors") for name in ("dense", "model")]
    gaps = [abs(by_step[step]["expected"] - by_step[step]["target"]) for step in sorted(by_step)]
    last = by_step[max(by_step)]
    return {
        "task": case.task,
        "scope": case.scope,
        "constraint": case.constraint,
        "steps": len(gaps),
        "target": held["target"],
        "expected": last["expected"],
        "actual": (files[0] - files[1]) / prunable["total"],
        "largest_gap": max(gaps),
        "largest_gap_after_first": max(gaps[1:]),
        "modalities": {
            name: {
                "target": told["target"],
                "expected": told["expected"],
                "actual": report["modalities"][name]["sparsity"],
            }
            for name, told in held["modalities"].items()
        },
    }


def _points(value: float) -> str:
    return f"{100 * value:.2f}"


def page_table(result: Mapping[str, Any]) -> str:
    """The table of docs/pruning.md."""
    lines = [
        "| task | scope | held by | target | expected | actual | largest gap | actual by modality |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for case in result["cases"]:
        parts = ", ".join(f"{k} {100 * v['actual']:.1f}" for k, v in case["modalities"].items())
        numbers = (case[key] for key in ("target", "expected", "actual", "largest_gap"))
        told = [case["task"], f"`{case['scope']}`", f"`{case['constraint']}`"]
        lines.append("| " + " | ".join([*told, *map(_points, numbers), parts]) + " |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    import torch

    from train.evaluation.latency import device_name
    from train.provenance import provenance

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--work", type=Path, default=ROOT / "runs/sparsity")
    parser.add_argument("--json", type=Path, default=RESULTS)
    parser.add_argument("--scale-steps", type=float, default=1.0, help="for a trial")
    args = parser.parse_args(argv)
    work = args.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    prepare(work)
    found = []
    for number, case in enumerate(CASES, 1):
        if code := run(case, work, args.scale_steps, f"[{number}/{len(CASES)}]"):
            return code
        found.append(outcome(case, work / case.name / "run"))
    result = {
        "what": "shares of the prunable parameters: asked for, expected when the structure is fixed, "
        "and removed; largest gap between expected and ramped target over all steps, and over all "
        "but the first, whose target of 0 no gates reach",
        "command": "python benchmarks/sparsity.py",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": device_name(torch.device("cpu")),
        "steps": {"all": STEPS, "ramp": RAMP, "freeze": FREEZE, "scale": args.scale_steps},
        "load_average": os.getloadavg(),
        "cases": found,
        "provenance": provenance(1),
    }
    write_json(args.json, result)
    print(page_table(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
