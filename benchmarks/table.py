"""The table of blocksworld: what half the depth, pruning and a teacher do to each task.

For each task and seed: the student trained with its teacher (KD), the same student pruned by
modal-adaptive gates (25 %, VQA 35 %), pruned to the same sparsity in every layer (uniform), and a
student trained without a teacher. Scored on at least 10,000 test items of pictures that nobody
trained on; retention against the teacher with paired bootstrap 95 % intervals over pictures; what is
reached without looking at a picture stands beside. Run from the repository root:

    python benchmarks/table.py --tasks vqa:3,retrieval:3,nlvr2,captioning,grounding --max-hours 3

Every cell is a folder of --work with its own marker: a run that was stopped or killed goes on where
it was, training at its last checkpoint. One process at a time. benchmarks/results/table.json and
docs/results.md are written after every cell; what has not run is marked there.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from cells import Cell, alone, finished, hours, read_json, write_json  # noqa: E402

TASKS = ("vqa", "retrieval", "nlvr2", "captioning", "grounding")
KINDS = ("student", "pruned", "no_kd", "uniform")
# Relative to the root, where every run starts: a copy of the checkout goes on with the same cells.
PRETRAINED = Path("models/pretrained/blocksworld-teacher")
TEACHER_VQA = Path("models/pretrained/blocksworld-teacher-vqa")
# Test pictures (NLVR2: pairs) that make 10,000 items or more.
PICTURES = {"vqa": 1500, "retrieval": 6000, "nlvr2": 3000, "captioning": 10_000, "grounding": 1500}
SCENES = (20_000, 400, 10_000)
DATA = "--image-size 48 --seed 77"
TOP_K = {"vqa": 4, "retrieval": 32}
# Steps: of the pre-training stage, and by task of teacher, student and pruning.
BASE_STEPS = 300
TEACHER_STEPS = {"grounding": 8000}
STUDENT_STEPS = 1100
PRUNE_STEPS = 900
PRUNING = ("prune.ramp_steps=150", "prune.freeze_step=300")
# CPU seconds of a step and of scoring, one thread, as measured; they only feed the estimates.
STEP_SECONDS = {"base": 0.52, "base_no_kd": 0.35, "teacher": 0.33, "student": 0.30, "no_kd": 0.15}
SCORE_SECONDS = 60.0
_STOPPED = 75


# -- the plan --------------------------------------------------------------------------------------


def _train(
    work: Path, name: str, verb: str, recipe: str, data: str, seed: int, steps: int, *more: str
) -> tuple[str, ...]:
    """One training command; it writes WORK/NAME/run."""
    folder = work / "data" / data
    return (
        verb, recipe, f"out={work / name / 'run'}", f"seed={seed}", f"data.train={folder / 'train'}",
        f"data.val={folder / 'val'}", f"optim.steps={steps}", "log.every=50", "log.pictures_every=0",
        "checkpoint.every=250", *more,
    )  # fmt: skip


def _recipe(task: str, role: str) -> str:
    names = {"student": "finetune-student", "prune": "prune"}
    return f"blocksworld-{names[role] if task == 'vqa' else f'{task}-{role}'}"


def teacher_cell(work: Path, task: str, steps: float) -> Cell:
    """The task's teacher: one for all seeds."""
    name = f"{task}/teacher"
    if task == "vqa":
        return Cell(name, task, "teacher", 0, (), TEACHER_VQA, (), SCORE_SECONDS)
    count = max(1, round(TEACHER_STEPS.get(task, 1500) * steps))
    argv = _train(
        work, name, "finetune", f"blocksworld-{task}-teacher", task, 0, count, f"model={PRETRAINED}"
    )
    seconds = count * STEP_SECONDS["teacher"] + SCORE_SECONDS
    return Cell(name, task, "teacher", 0, argv, work / name / "run" / "model", (), seconds)


def base_cell(work: Path, seed: int, kd: bool, steps: float) -> Cell:
    """Pre-training at half the depth from layers of the teacher, with and without its help."""
    kind = "base" if kd else "base_no_kd"
    name, count = f"{kind}/{seed}", max(1, round(BASE_STEPS * steps))
    verb, help_ = (
        ("distill", f"teacher.path={PRETRAINED}") if kd else ("pretrain", "teacher.path=null")
    )
    more = (help_, f"model={work / 'first'}", *(() if kd else ("stage=pretrain",)))
    argv = _train(work, name, verb, "blocksworld-distill", "pretrain", seed, count, *more)
    seconds = count * STEP_SECONDS[kind]
    return Cell(name, None, kind, seed, argv, work / name / "run" / "model", (), seconds)


def task_cells(work: Path, task: str, seed: int, steps: float) -> list[Cell]:
    """The four students of a task and seed, in the order in which they are trained."""
    teacher = teacher_cell(work, task, steps).model
    made = {kind: f"{task}/{kind}-{seed}" for kind in KINDS}
    folders = {kind: work / name / "run" / "model" for kind, name in made.items()}
    count, cut = max(1, round(STUDENT_STEPS * steps)), max(1, round(PRUNE_STEPS * steps))
    ramp, freeze = (max(1, round(int(key.split("=")[1]) * steps)) for key in PRUNING)
    pruning = (
        f"model={folders['student']}", f"teacher.path={teacher}", f"prune.ramp_steps={ramp}",
        f"prune.freeze_step={min(freeze, cut)}",
    )  # fmt: skip
    student, prune = _recipe(task, "student"), _recipe(task, "prune")
    # The others have the positions of grounding's teacher, by way of its task vector.
    places = ("initialise.add_positions=sincos",) if task == "grounding" else ()
    settings = {
        "student": (
            "finetune", student, count, f"model={work / 'base' / str(seed) / 'run' / 'model'}",
            f"teacher.path={teacher}", f"initialise.task_vector={PRETRAINED}",
        ),
        "pruned": ("prune", prune, cut, *pruning),
        "no_kd": (
            "finetune", student, count, f"model={work / 'base_no_kd' / str(seed) / 'run' / 'model'}",
            "teacher.path=null", "initialise.task_vector=null", *places,
        ),
        "uniform": ("prune", prune, cut, *pruning, "prune.scope=uniform"),
    }  # fmt: skip
    after = {
        "student": (f"base/{seed}", f"{task}/teacher"),
        "no_kd": (f"base_no_kd/{seed}",),
    }
    cells = []
    for kind, (verb, recipe, length, *more) in settings.items():
        argv = _train(work, made[kind], verb, recipe, task, seed, length, *more)
        each = STEP_SECONDS["no_kd" if kind == "no_kd" else "student"]
        needs = after.get(kind, (made["student"], f"{task}/teacher"))
        seconds = length * each + SCORE_SECONDS
        cells.append(Cell(made[kind], task, kind, seed, argv, folders[kind], needs, seconds))
    return cells


def make_plan(work: Path, tasks: Mapping[str, int], steps: float = 1.0) -> list[Cell]:
    """Every cell, each soon before the first that needs it; seed by seed and task by task, so that a
    stopped table has whole rows. `tasks`: name -> seeds.
    """
    cells: list[Cell] = []
    for seed in range(max(tasks.values())):
        bases = {
            cell.name: cell for cell in (base_cell(work, seed, kd, steps) for kd in (True, False))
        }
        for task in with_seed(tasks, seed):
            teacher = teacher_cell(work, task, steps)
            needed = bases | {teacher.name: teacher}
            for cell in task_cells(work, task, seed, steps):
                known = {other.name for other in cells}
                cells += [needed[name] for name in cell.after if name in needed.keys() - known]
                cells.append(cell)
    return cells


def with_seed(tasks: Mapping[str, int], seed: int) -> list[str]:
    """The tasks that have more than `seed` seeds."""
    return [task for task, seeds in tasks.items() if seed < seeds]


def identities(cells: Sequence[Cell]) -> dict[str, str]:
    """Name -> hash of a cell's command, its recipe's text, its model, and the cells it is after."""
    from train.recipes_io import find_recipe

    found: dict[str, str] = {}
    for cell in cells:
        state = hashlib.sha256(json.dumps([cell.argv, PICTURES.get(cell.task or "")]).encode())
        if cell.argv:
            state.update(find_recipe(cell.argv[1]).read_bytes())
        else:
            state.update((ROOT / cell.model / "model.safetensors").read_bytes())
        for name in cell.after:
            state.update(found[name].encode())
        found[cell.name] = state.hexdigest()
    return found


# -- doing it --------------------------------------------------------------------------------------


def prepare_data(work: Path, scenes: Sequence[int], options: str = DATA) -> None:
    """Data of all tasks, or those of `options`, without the teachers' scenes, once."""
    if not (work / "data" / "dataset.json").is_file():
        train, val, test = scenes
        argv = [sys.executable, "-m", "train.main", "data", "blocksworld", "--out", work / "data"]
        argv += ["--scenes", train, "--val", val, "--test", test, *options.split()]
        argv += ["--exclude", ROOT / PRETRAINED / "scenes-train.npy"]
        subprocess.run([str(part) for part in argv], check=True, cwd=ROOT)


def prepare(work: Path, scenes: Sequence[int]) -> None:
    """Data, and the students' first weights, once."""
    prepare_data(work, scenes)
    prepare_student(work)


def prepare_student(work: Path) -> None:
    """The students' first weights, half of the teacher's layers, once."""
    from models import from_pretrained, presets
    from models.initialise import student_from_teacher

    if not (work / "first" / "config.json").is_file():
        teacher = from_pretrained(ROOT / PRETRAINED)
        text = {"vocab_size": teacher.config.text.vocab_size}
        student, _ = student_from_teacher(teacher, presets.config("blocksworld-student", text=text))
        shutil.rmtree(work / "first.partial", ignore_errors=True)
        student.save_pretrained(work / "first.partial", tokenizer=None)
        (work / "first.partial").rename(work / "first")


def batch_options(task: str) -> tuple[int, int]:
    """(pictures a batch, tokens) of scoring; tokens as the recipes have them."""
    return 50, {"vqa": 20, "nlvr2": 24, "retrieval": 40, "captioning": 48, "grounding": 16}[task]


def score(cell: Cell, work: Path, limit: int, gallery: int) -> Any:
    """The cell's `Items` on the test split."""
    from models import from_pretrained

    assert cell.task is not None
    return score_model(from_pretrained(ROOT / cell.model), cell.task, work, limit, gallery)


def score_model(model: Any, task: str, work: Path, limit: int, gallery: int) -> Any:
    """A model's `Items` on the test split of a task."""
    from data_pipeline.loader import build_loader
    from data_pipeline.text import load_tokenizer
    from train.evaluation.captioning import CaptionWriter
    from train.evaluation.items import model_items
    from train.evaluation.vqa import AnswerList

    tokenizer = load_tokenizer(work / "data" / "tokenizer")
    where, (batch, tokens) = work / "data" / task / "test", batch_options(task)
    loader = build_loader(
        task, where, tokenizer=tokenizer, batch=batch, train=False, limit=limit,
        image_size=model.config.vision.image_size, patch_size=model.config.vision.patch_size,
        max_tokens=tokens,
    )  # fmt: skip
    answers = AnswerList.load(where, tokenizer) if task == "vqa" else None
    return model_items(
        model, task, iter(loader), answers=answers,
        writer=CaptionWriter(tokenizer, beams=3, max_length=tokens),
        top_k=TOP_K.get(task, 128), gallery=gallery,
    )  # fmt: skip


def run_cell(cell: Cell, work: Path, identity: str, place: str, args: argparse.Namespace) -> int:
    """Train (or go on training) and score one cell. Exit code of the training."""
    from train.demo import Stage, run_stage, stream

    folder, trained, began = work / cell.name, 0.0, time.monotonic()
    if cell.argv:
        stage = Stage(cell.name.replace("/", "-"), cell.kind, cell.argv, ("run",), cell.argv[1])
        # A training that outlives a killed table holds the lock until it ends.
        holds = partial(stream, pass_fds=(args.lock,))
        code, trained = run_stage(stage, folder, identity, place, holds)
        if code:
            return code
    known: dict[str, Any] = {"identity": identity, "train_seconds": round(trained, 1)}
    if cell.task is not None:
        from train.evaluation.items import HEADLINE

        limit = args.pictures or PICTURES[cell.task]
        items = score(cell, work, limit, min(args.gallery, limit))
        folder.mkdir(parents=True, exist_ok=True)
        items.save(folder / "items.npz")
        known["score"] = float(items.score(HEADLINE[cell.task]))
        print(f"== {cell.name}: {100 * known['score']:.2f} on {items.items:,} items", flush=True)
    known["seconds"] = round(time.monotonic() - began, 1)
    known["load_average"] = os.getloadavg()
    write_json(folder / "finished.json", known)
    return 0


def slowness(cells: Sequence[Cell], work: Path) -> float:
    """Measured over estimated seconds of the cells that were trained."""
    pairs = [
        (known["seconds"], cell.seconds)
        for cell in cells
        if cell.argv and (known := read_json(work / cell.name / "finished.json")).get("seconds")
    ]
    return sum(a for a, _ in pairs) / sum(b for _, b in pairs) if pairs else 1.0


def run_all(
    cells: Sequence[Cell],
    names: Mapping[str, str],
    args: argparse.Namespace,
    run: Callable[..., int] | None = None,
    write: Callable[..., None] | None = None,
) -> int:
    """Every cell that is not finished, until the time is up.

    Args:
        run, write: in place of `run_cell` and `table_page.write_results`.

    Returns:
        0; 1 when the training of a cell failed; 75 (or that of the signal) when stopped.
    """
    from table_page import write_results

    run, write = run or run_cell, write or write_results
    began, failed = time.monotonic(), set[str]()
    for number, cell in enumerate(cells, 1):
        if finished(cell, args.work, names[cell.name]):
            continue
        if lacking := [name for name in cell.after if name in failed]:
            failed.add(cell.name)
            print(f"== {cell.name}: left out, {', '.join(lacking)} failed", flush=True)
            continue
        factor = slowness(cells, args.work)
        left = [c.seconds for c in cells[number - 1 :] if not finished(c, args.work, names[c.name])]
        spent, next_ = time.monotonic() - began, cell.seconds * factor
        if args.max_hours and spent + next_ > 3600 * args.max_hours:
            print(
                f"== stopped after {hours(spent)}: {cell.name} would take about {hours(next_)}, "
                "more than --max-hours leaves; the same command goes on",
                flush=True,
            )
            break
        print(
            f"== {cell.name}: about {hours(next_)}; all that is left: {hours(sum(left) * factor)}",
            flush=True,
        )
        code = run(cell, args.work, names[cell.name], f"[{number}/{len(cells)}]", args)
        if code == _STOPPED or code < 0:
            return code if code > 0 else 128 - code
        if code:  # others may still run: this is left alone for a night
            failed.add(cell.name)
            continue
        write(cells, names, args)
    write(cells, names, args)
    return 1 if failed else 0


def tasks_of(text: str) -> dict[str, int]:
    """Seeds by task: "vqa:3,nlvr2" -> {"vqa": 3, "nlvr2": 1}; "all:3" is three of each.

    Raises:
        argparse.ArgumentTypeError: an unknown task, or a number that is not 1 or more.
    """
    found: dict[str, int] = {}
    for part in text.split(","):
        name, colon, seeds = part.partition(":")
        if name not in (*TASKS, "all"):
            raise argparse.ArgumentTypeError(f"{name!r}: choose from all, {', '.join(TASKS)}")
        if colon and not (seeds.isdecimal() and int(seeds)):
            raise argparse.ArgumentTypeError(f"{part!r}: say TASK:SEEDS, with one seed or more")
        names = TASKS if name == "all" else (name,)
        found |= dict.fromkeys(names, int(seeds) if colon else 1)
    return found


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    result.add_argument(
        "--tasks", type=tasks_of, default=tasks_of("vqa:3,retrieval:3"), metavar="TASK[:SEEDS],...",
        help="or: all[:SEEDS]; one seed unless told",
    )  # fmt: skip
    result.add_argument(
        "--max-hours", type=float, default=0.0, help="start no cell beyond; 0: none"
    )
    result.add_argument("--work", type=Path, default=ROOT / "runs/table")
    result.add_argument("--json", type=Path, default=ROOT / "benchmarks/results/table.json")
    result.add_argument("--page", type=Path, default=ROOT / "docs/results.md")
    result.add_argument("--draws", type=int, default=2000, help="of the bootstrap")
    result.add_argument(
        "--plan", action="store_true", help="print cells and estimates; run nothing"
    )
    small = result.add_argument_group("for a trial; a table of record has the defaults")
    small.add_argument("--scale-steps", type=float, default=1.0, help="factor on all step counts")
    small.add_argument(
        "--scenes", type=int, nargs=3, default=SCENES, metavar=("TRAIN", "VAL", "TEST")
    )
    small.add_argument(
        "--pictures", type=int, default=0, help="test pictures; 0: as the task needs"
    )
    small.add_argument("--gallery", type=int, default=1000, help="pictures that retrieval searches")
    return result


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    # Runs start in the repository root, wherever this one was started.
    args.work, args.json, args.page = (p.resolve() for p in (args.work, args.json, args.page))
    args.command = " ".join(
        ["python", "benchmarks/table.py", *(sys.argv[1:] if argv is None else argv)]
    )
    args.began = datetime.now(UTC).isoformat(timespec="seconds")
    cells = make_plan(args.work, args.tasks, args.scale_steps)
    if args.plan:
        for cell in cells:
            print(f"{cell.name:24s} {hours(cell.seconds):>8s}")
        print(f"{'in all':24s} {hours(sum(cell.seconds for cell in cells)):>8s}")
        return 0
    try:
        with alone(args.work) as args.lock:
            prepare(args.work, args.scenes)
            return run_all(cells, identities(cells), args)
    except (ValueError, FileNotFoundError) as error:
        print(f"table: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
