"""Accuracy against cost of adaptive trimming on blocksworld, with every baseline in one harness.

For each task and budget: trimmers trained on the task's teacher, and baselines that are given at
least as many multiply-accumulates: random patches, as many patches of every picture by the learned
scores, class attention (EViT, with and without a fused token), merging (ToMe), smaller pictures.
Scored on at least 10,000 test items with bootstrap 95 % intervals over pictures; multiply-accumulates
counted while a pass runs; latency of batch 1 and 32, all models taking turns. Run from the
repository root:

    python benchmarks/trimming.py --tasks vqa:3,retrieval --budgets 0.5 0.35 --max-hours 3

Cells are those of benchmarks/table.py: each a folder of --work with its own marker, so a run that was
stopped goes on where it was. benchmarks/results/trimming.json, docs/trimming-results.md and its plot
are written after every cell; what has not run is marked there.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import table
from table import ROOT, SCORE_SECONDS, TOP_K, Cell

if TYPE_CHECKING:
    from models.xvlm import XVLM

BUDGETS = (0.5, 0.35)
FIXED = ("random", "evit", "evit-fused", "tome", "resolution")  # of the model that was trimmed
TRAINED = ("uniform", "random-trained")  # of the weights that trimming has trained
# At full size 88 % of the cost lies in the vision encoder; of the table's models, which see 36 patches,
# 71 %, and things fill half of their patches. 81 patches bring that to 82 % and 36 %.
IMAGE_SIZE, SEED = 72, 77
STEPS, STEP_SECONDS = 600, 1.2
TEACHER_STEPS, TEACHER_SECONDS = 1200, 0.5
# AMX or not, a step in bfloat16 is never slower than in float32 here (models/packing.py).
PRECISION = "engine.precision=bf16"
MACS_ROWS, ONE_BY_ONE, BATCH = 48, 8, 32  # rows of counted passes and of latency
REPEATS = {1: 15, BATCH: 15}
PROBES, CROWD, SHUFFLED_PICTURES = 400, 400, 300


# -- the plan --------------------------------------------------------------------------------------


def _name(task: str, kind: str, budget: float, seed: int | None = None) -> str:
    return f"{task}/{kind}-{budget:g}" + ("" if seed is None else f"-{seed}")


def teacher_cell(work: Path, task: str, steps: float) -> Cell:
    """The model that is trimmed: the table's (VQA) or the pre-trained one, at the larger size."""
    name, count = f"{task}/teacher", max(1, round(TEACHER_STEPS * steps))
    role, source = "finetune-teacher", table.TEACHER_VQA
    if task != "vqa":
        role, source = f"{task}-teacher", table.PRETRAINED
    argv = table._train(
        work, name, "finetune", f"blocksworld-{role}", task, 0, count, f"model={source}",
        f"image_size={IMAGE_SIZE}", "data.batch=32", "optim.lr=7.0e-4", PRECISION,
    )  # fmt: skip
    seconds = count * TEACHER_SECONDS + SCORE_SECONDS
    return Cell(name, task, "teacher", 0, argv, work / name / "run" / "model", (), seconds)


def trim_cell(
    work: Path, task: str, teacher: Cell, budget: float, seed: int, steps: float, kind: str = "trim"
) -> Cell:
    """Trimmers in front of every vision block, trained together with the teacher's weights; of kind
    "self" they do not see the text.
    """
    name, count = _name(task, kind, budget, seed), max(1, round(STEPS * steps))
    more = (
        f"model={teacher.model}", f"trim.budget={budget:g}", "trim.vision=[0,1,2,3]", PRECISION,
        *(("trim.guided=false",) if kind == "self" else ()),
    )  # fmt: skip
    argv = table._train(work, name, "trim", f"blocksworld-{task}-trim", task, seed, count, *more)
    seconds = count * STEP_SECONDS + 2 * SCORE_SECONDS
    model = work / name / "run" / "model"
    return Cell(name, task, f"{kind}@{budget:g}", seed, argv, model, (teacher.name,), seconds)


def make_plan(
    work: Path, tasks: Mapping[str, int], budgets: Sequence[float], steps: float = 1.0
) -> list[Cell]:
    """Every cell after those that it needs; the first seed is whole before the next begins.
    `tasks`: name -> seeds.
    """
    cells: list[Cell] = []
    for seed in range(max(tasks.values())):
        for task in table.with_seed(tasks, seed):
            teacher = teacher_cell(work, task, steps)
            cells += [teacher] if seed == 0 else []
            for budget in budgets:
                cells += _budget_cells(work, task, teacher, budget, seed, steps)
    return cells


def _budget_cells(
    work: Path, task: str, teacher: Cell, budget: float, seed: int, steps: float
) -> list[Cell]:
    trim = trim_cell(work, task, teacher, budget, seed, steps)

    def cell(
        kind: str, numbered: bool, model: Path, after: tuple[str, ...], seconds: float
    ) -> Cell:
        name = _name(task, kind, budget, seed if numbered else None)
        return Cell(name, task, f"{kind}@{budget:g}", seed, (), model, after, seconds)

    needs, scored = (teacher.name, trim.name), SCORE_SECONDS
    made = [trim] + [cell(kind, True, trim.model, needs, scored) for kind in TRAINED]
    if task == "vqa":
        made.append(cell("behaviour", True, trim.model, needs, scored))
    if seed == 0:
        fixed = [cell(kind, False, teacher.model, needs, scored) for kind in FIXED]
        names = (*needs, *(other.name for other in fixed), made[1].name)
        made += [*fixed, cell("latency", False, trim.model, names, 2 * scored)]
        if task == "vqa":
            made.append(trim_cell(work, task, teacher, budget, seed, steps, "self"))
    return made


def identities(cells: Sequence[Cell]) -> dict[str, str]:
    """As the table's. A cell without a command stands on the cells it is after."""
    found = table.identities([cell for cell in cells if cell.argv or cell.kind == "teacher"])
    for cell in cells:
        if cell.name not in found:
            parts = (cell.kind, str(cell.seed), *(found[name] for name in cell.after))
            found[cell.name] = hashlib.sha256("/".join(parts).encode()).hexdigest()
    return found


# -- models of a cell ------------------------------------------------------------------------------


def _limit(args: argparse.Namespace, task: str) -> int:
    return args.pictures or table.PICTURES[task]


def _answers(work: Path, task: str) -> Any:
    from data_pipeline.text import load_tokenizer
    from train.evaluation.vqa import AnswerList

    if task != "vqa":
        return None
    return AnswerList.load(work / "data" / task / "test", load_tokenizer(work / "data/tokenizer"))


def _rows(work: Path, task: str, model: XVLM, count: int) -> list[Any]:
    from trim_models import load_asked

    from data_pipeline.text import load_tokenizer

    tokens = table.batch_options(task)[1]
    tokenizer = load_tokenizer(work / "data" / "tokenizer")
    size = model.config.vision.image_size
    return load_asked(work / "data" / task / "test", task, tokenizer, size, count, tokens)


def _counted(work: Path, task: str, model: XVLM, count: int = MACS_ROWS) -> float:
    from trim_models import counted_macs

    rows = _rows(work, task, model, count)
    return counted_macs(model, rows, _answers(work, task), TOP_K.get(task, 128))


def trained(cell: Cell) -> XVLM:
    """The trimmed model of a cell, which removes tokens."""
    from models import from_pretrained

    model = from_pretrained(ROOT / cell.model)
    model.set_trimming("gather")
    return model


def built(kind: str, source: XVLM, keep: Sequence[int], seed: int) -> XVLM:
    """A baseline; `source`: the model that it is made from."""
    from models.trimming import baselines

    if kind == "random-trained":
        kind = "random"
    return baselines.apply(source, kind, keep=keep, seed=seed)


def matched(cell: Cell, work: Path, target: float, profile: Sequence[int]) -> tuple[int, ...]:
    """The fewest patches with which a baseline costs at least `target` MACs."""
    from trim_models import cheapest, schedules

    from models import from_pretrained

    kind, source = cell.kind.partition("@")[0], from_pretrained(ROOT / cell.model)
    vision = source.config.vision
    family = kind.removesuffix("-trained").removesuffix("-fused")
    options = schedules(family, vision.patches, vision.layers, profile)

    def cost(keep: tuple[int, ...]) -> float:
        return _counted(work, cell.task or "", built(kind, source, keep, cell.seed))

    return cheapest(options, cost, target)


# -- running a cell --------------------------------------------------------------------------------


def run_cell(cell: Cell, work: Path, identity: str, place: str, args: argparse.Namespace) -> int:
    """Train, score or time one cell. Exit code of the training."""
    from train.demo import Stage, run_stage, stream

    kind, _, budget = cell.kind.partition("@")
    if kind == "teacher":
        code = table.run_cell(cell, work, identity, place, args)
        if not code:
            _teacher_cost(cell, work)
        return code
    began = time.monotonic()
    known: dict[str, Any] = {"identity": identity}
    (work / cell.name).mkdir(parents=True, exist_ok=True)
    if cell.argv:
        stage = Stage(cell.name.replace("/", "-"), cell.kind, cell.argv, ("run",), cell.argv[1])
        holds = partial(stream, pass_fds=(args.lock,))
        code, seconds = run_stage(stage, work / cell.name, identity, place, holds)
        if code:
            return code
        known |= {"train_seconds": round(seconds, 1)} | _score_trimmed(cell, work, args)
    elif kind == "behaviour":
        known |= _behaviour(cell, work)
    elif kind == "latency":
        known |= _latency(cell, work, budget)
    else:
        known |= _score_baseline(cell, work, budget, args)
    known |= {"seconds": round(time.monotonic() - began, 1), "load_average": os.getloadavg()}
    table.write_json(work / cell.name / "finished.json", known)
    return 0


def _teacher_cost(cell: Cell, work: Path) -> None:
    from models import from_pretrained

    path = work / cell.name / "finished.json"
    macs = _counted(work, cell.task or "", from_pretrained(ROOT / cell.model))
    table.write_json(path, table.read_json(path) | {"macs": macs})


def _items(model: XVLM, cell: Cell, work: Path, args: argparse.Namespace, file: str) -> float:
    """Scores a model, keeps what each picture adds, and says the score."""
    from train.evaluation.items import HEADLINE

    assert cell.task is not None
    limit = _limit(args, cell.task)
    items = table.score_model(model, cell.task, work, limit, min(args.gallery, limit))
    items.save(work / cell.name / file)
    return float(items.score(HEADLINE[cell.task]))


def _score_trimmed(cell: Cell, work: Path, args: argparse.Namespace) -> dict[str, Any]:
    """The trimmed pass and the full one of the same weights; what training says of the budget."""
    model = trained(cell)
    told = table.read_json(cell.model.parent / "trim.json")
    vision = [site for name, site in told["sites"].items() if name.startswith("vision.")]
    known: dict[str, Any] = {
        "macs": _counted(work, cell.task or "", model),
        "score": _items(model, cell, work, args, "items.npz"),
        "profile": [site["mean"] for site in vision],
        "validation": {
            key: told[key] for key in ("macs_share", "macs_share_min", "macs_share_max", "samples")
        },
        "kept": told["sites"],
    }
    model.set_trimming("off")
    known["full_score"] = _items(model, cell, work, args, "items-full.npz")
    print(
        f"== {cell.name}: {100 * known['score']:.2f}, without trimming "
        f"{100 * known['full_score']:.2f}; {known['macs'] / 1e6:.1f} MMACs",
        flush=True,
    )
    return known


def _budget_trim(cell: Cell, work: Path, budget: str, seed: int) -> tuple[Path, dict[str, Any]]:
    """Folder of the model, and marker, of the trimmed model that a cell is compared with."""
    name = _name(cell.task or "", "trim", float(budget), seed)
    return work / name / "run" / "model", table.read_json(work / name / "finished.json")


def _score_baseline(
    cell: Cell, work: Path, budget: str, args: argparse.Namespace
) -> dict[str, Any]:
    from models import from_pretrained

    _, trim = _budget_trim(cell, work, budget, cell.seed)
    kind = cell.kind.partition("@")[0]
    keep = matched(cell, work, trim["macs"], [max(1, round(kept)) for kept in trim["profile"]])
    model = built(kind, from_pretrained(ROOT / cell.model), keep, cell.seed)
    macs = _counted(work, cell.task or "", model)
    score = _items(model, cell, work, args, "items.npz")
    print(f"== {cell.name}: {100 * score:.2f}, {macs / 1e6:.1f} MMACs, keeps {keep}", flush=True)
    return {"macs": macs, "keep": list(keep), "score": score}


def _behaviour(cell: Cell, work: Path) -> dict[str, Any]:
    import trim_behaviour as behaviour

    from data_pipeline.loader import build_loader
    from data_pipeline.text import TextEncoder, load_tokenizer

    tokenizer, model = load_tokenizer(work / "data" / "tokenizer"), trained(cell)
    batch, tokens = table.batch_options("vqa")
    encoder, vision = TextEncoder(tokenizer, tokens), model.config.vision
    loader = build_loader(
        "vqa", work / "data/vqa/test", tokenizer=tokenizer, batch=batch, train=False,
        limit=SHUFFLED_PICTURES, image_size=vision.image_size, patch_size=vision.patch_size,
        max_tokens=tokens,
    )  # fmt: skip
    told = behaviour.shuffled(model, loader, _answers(work, "vqa"), TOP_K["vqa"])
    model.set_trimming("mask")
    return {
        "overlap": behaviour.overlap(model, encoder, behaviour.probes(PROBES)),
        "shuffled_text": told,
        "crowd": behaviour.crowd(model, encoder, CROWD),
    }


def _latency(cell: Cell, work: Path, budget: str) -> dict[str, Any]:
    """Of the trimmed model (seed 0) in its modes, and of every baseline with its counts."""
    from trim_models import one_by_one, respond, timed, together

    from models import from_pretrained

    task = cell.task or ""
    teacher = from_pretrained(ROOT / teacher_cell(work, task, 1.0).model)
    folder, _ = _budget_trim(cell, work, budget, 0)
    models: dict[str, XVLM] = {"dense": teacher}
    for mode in ("gather", "packed"):
        models[f"trimmed, {mode}"] = from_pretrained(ROOT / folder)
        models[f"trimmed, {mode}"].set_trimming(mode)
    for kind in (*FIXED, "uniform"):
        name = _name(task, kind, float(budget), 0 if kind in TRAINED else None)
        keep = table.read_json(work / name / "finished.json")["keep"]
        source = from_pretrained(ROOT / folder) if kind in TRAINED else teacher
        models[kind] = built(kind, source, keep, 0)
    answers, top_k = _answers(work, task), TOP_K.get(task, 128)
    rows = {
        size: _rows(work, task, model, BATCH)
        for model in models.values()
        if (size := model.config.vision.image_size)
    }
    found: dict[str, Any] = {}
    for batch in (1, BATCH):
        calls = {}
        for name, model in models.items():
            own = rows[model.config.vision.image_size]
            if batch == 1:
                calls[name] = one_by_one(model, own[:ONE_BY_ONE], answers, top_k)
            else:
                calls[name] = partial(respond, model, together(own), answers, top_k)
        found[str(batch)] = timed(calls, REPEATS[batch], "dense")
    return {"latency": found, "rows_of_a_call": {"1": ONE_BY_ONE, str(BATCH): BATCH}}


# -- the command -----------------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    """The table's options, and the budgets."""
    result = table.parser()
    result.description = (__doc__ or "").splitlines()[0]
    result.set_defaults(
        tasks=table.tasks_of("vqa:3,retrieval"), work=ROOT / "runs/trimming",
        json=ROOT / "benchmarks/results/trimming.json", page=ROOT / "docs/trimming-results.md",
    )  # fmt: skip
    result.add_argument(
        "--budgets", type=float, nargs="+", default=BUDGETS, help="shares of the model's MACs"
    )
    return result


def main(argv: Sequence[str] | None = None) -> int:
    from trimming_page import write_results

    args = parser().parse_args(argv)
    if unknown := set(args.tasks) - {"vqa", "retrieval"}:
        print(
            f"trimming: {', '.join(sorted(unknown))}: vqa and retrieval run here", file=sys.stderr
        )
        return 2
    args.work, args.json, args.page = (p.resolve() for p in (args.work, args.json, args.page))
    said = sys.argv[1:] if argv is None else argv
    args.command = " ".join(["python", "benchmarks/trimming.py", *said])
    args.began = datetime.now(UTC).isoformat(timespec="seconds")
    cells = make_plan(args.work, args.tasks, args.budgets, args.scale_steps)
    if args.plan:
        for cell in cells:
            print(f"{cell.name:28s} {table.hours(cell.seconds):>8s}")
        print(f"{'in all':28s} {table.hours(sum(cell.seconds for cell in cells)):>8s}")
        return 0
    try:
        with table.alone(args.work) as args.lock:
            options = f"--image-size {IMAGE_SIZE} --seed {SEED} --tasks vqa,retrieval"
            table.prepare_data(args.work, args.scenes, options)
            return table.run_all(cells, identities(cells), args, run_cell, write_results)
    except (ValueError, FileNotFoundError) as error:
        print(f"trimming: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
