"""The whole walk on the embedded data set: `python -m train.demo [--out runs/demo] [--quick]`.

Data, distillation with two processes under ZeRO-2, fine-tuning, pruning, slim export, evaluation,
bench, and a page that compares the models. Every stage is the command line a person would type. A
stage that is done is skipped on the next run as long as its command, its recipe and the stages
before it are the same.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from train.export.summary import write_summary

__all__ = ["Plan", "Stage", "main", "make_plan", "run_stage", "stream"]

ROOT = Path(__file__).resolve().parent.parent
_TOP_K = 4
_MAX_TOKENS = 20
_STOPPED = 75


@dataclass(frozen=True)
class Stage:
    """One command.

    Attributes:
        argv: arguments of `espalier`.   recipe: shipped recipe whose text belongs to the stage's
            identity.
        leaves: what it writes, relative to the demo's folder; removed before a start with other
            settings.
    """

    name: str
    title: str
    argv: tuple[str, ...]
    leaves: tuple[str, ...]
    recipe: str | None = None


@dataclass(frozen=True)
class Plan:
    """All stages and where the models come to lie."""

    out: Path
    stages: tuple[Stage, ...]
    models: Mapping[str, Path] = field(default_factory=dict)
    quick: bool = False


def _overrides(**values: object) -> tuple[str, ...]:
    """`a__b=c` as the command line's `a.b=c`."""
    return tuple(f"{key.replace('__', '.')}={value}" for key, value in values.items())


def _training(out: Path, teacher: Path, teacher_vqa: Path, quick: bool) -> list[Stage]:
    data = out / "data"
    tiny: dict[str, object] = {}
    if quick:
        tiny = {
            "optim__steps": 4,
            "optim__warmup_steps": 1,
            "data__batch": 8,
            "eval__samples": 8,
            "log__every": 1,
        }

    def stage(
        name: str, title: str, recipe: str, task: str, launched: bool, **values: object
    ) -> Stage:
        changes = _overrides(
            out=out / name,
            data__train=data / task / "train",
            data__val=data / task / "val",
            **values,
            **tiny,
        )
        before = ("launch", "-n", "2", "--") if launched else ()
        return Stage(name, title, (*before, name, recipe, *changes), (name,), recipe)

    regions = {"data__region__images": 4, "data__region__rows": 8} if quick else {}
    pruning = {"prune__ramp_steps": 2, "prune__freeze_step": 3} if quick else {}
    return [
        stage(
            "distill",
            "distil the teacher into half the depth (2 processes, ZeRO-2)",
            "blocksworld-distill",
            "pretrain",
            True,
            teacher__path=teacher,
            **regions,
        ),
        stage(
            "finetune",
            "teach the student to answer questions",
            "blocksworld-finetune-student",
            "vqa",
            False,
            model=out / "distill" / "model",
            teacher__path=teacher_vqa,
            initialise__task_vector=teacher,
        ),
        stage(
            "prune",
            "prune heads and FFN units, 35 %",
            "blocksworld-prune",
            "vqa",
            False,
            model=out / "finetune" / "model",
            teacher__path=teacher_vqa,
            **pruning,
        ),
    ]


def _data_stage(out: Path, exclude: Sequence[Path], quick: bool) -> Stage:
    # 8 questions a scene: 1,500 test scenes are well above the 10,000 questions that the summary
    # promises.
    scenes, val, test = (64, 16, 16) if quick else (12_000, 200, 1_500)
    argv = ["data", "blocksworld", "--out", str(out / "data"), "--scenes", str(scenes)]
    argv += ["--val", str(val), "--test", str(test), "--image-size", "48", "--seed", "20250"]
    argv += ["--tasks", "pretrain,vqa"]
    for file in exclude:
        argv += ["--exclude", str(file)]
    return Stage(
        "data", "draw scenes, disjoint from the teachers' training data", tuple(argv), ("data",)
    )


def make_plan(
    out: Path, teacher: Path, teacher_vqa: Path, quick: bool, exclude: Sequence[Path]
) -> Plan:
    """Every command of the demo, in order."""
    student, pruned = out / "finetune" / "model", out / "pruned"
    models = {"teacher": teacher_vqa, "student": student, "pruned": pruned}
    stages = [_data_stage(out, exclude, quick), *_training(out, teacher, teacher_vqa, quick)]
    export = (
        "export",
        str(out / "prune" / "model"),
        "--format",
        "safetensors",
        "--out",
        str(pruned),
    )
    extra = ("--dense", str(student), "--tokenizer", str(out / "data" / "tokenizer"))
    stages.append(Stage("export", "write the smaller model", (*export, *extra), ("pruned",)))
    for name, folder in models.items():
        argv = [
            "eval",
            str(folder),
            "--task",
            "vqa",
            "--data",
            str(out / "data"),
            "--split",
            "test",
        ]
        argv += ["--top-k", str(_TOP_K), "--max-tokens", str(_MAX_TOKENS)]
        argv += ["--json", str(out / "eval" / f"{name}.json")]
        # The language-only baseline is the same for all models; it is worked out once.
        argv += [] if name == "teacher" else ["--no-blind"]
        title = f"answer the test questions with the {name} model"
        stages.append(Stage(f"eval-{name}", title, tuple(argv), (f"eval/{name}.json",)))
    argv = ["bench", *(str(folder) for folder in models.values()), "--names", ",".join(models)]
    argv += ["--batch", "1,32", "--repeats", "5" if quick else "40", "--top-k", str(_TOP_K)]
    argv += ["--text-tokens", str(_MAX_TOKENS), "--json", str(out / "bench.json")]
    stages.append(
        Stage("bench", "measure latency, models taking turns", tuple(argv), ("bench.json",))
    )
    return Plan(out, tuple(stages), models, quick)


# -- running stages ------------------------------------------------------------------------------


def _model_bytes(folder: Path) -> bytes:
    """Identity of a teacher: its weights' digest; b"" where the folder is an earlier stage's."""
    weights = folder / "model.safetensors"
    return hashlib.sha256(weights.read_bytes()).digest() if weights.is_file() else b""


def _identities(plan: Plan, teachers: Sequence[Path]) -> dict[str, str]:
    """Name -> hash of a stage's command and recipe and of all stages before it."""
    from train.recipes_io import find_recipe

    state = hashlib.sha256(b"".join(_model_bytes(folder) for folder in teachers))
    result = {}
    for stage in plan.stages:
        state.update(json.dumps(stage.argv).encode())
        if stage.recipe is not None:
            state.update(find_recipe(stage.recipe).read_bytes())
        result[stage.name] = state.hexdigest()
    return result


def _read_marker(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return {}
    return value if isinstance(value, dict) else {}


def _write_marker(path: Path, values: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(values) + "\n", encoding="utf-8")
    os.replace(partial, path)


def _clear(out: Path, leaves: Sequence[str]) -> None:
    for leaf in leaves:
        path = out / leaf
        if path.is_dir():
            shutil.rmtree(path)
        elif path.exists():
            path.unlink()


def _environment() -> dict[str, str]:
    env = dict(os.environ)
    env["PYTHONPATH"] = os.pathsep.join(
        part for part in (str(ROOT), env.get("PYTHONPATH", "")) if part
    )
    env.setdefault("TOKENIZERS_PARALLELISM", "false")
    env.setdefault("HF_HUB_OFFLINE", "1")
    env["PYTHONUNBUFFERED"] = "1"
    return env


def stream(command: Sequence[str], log: Path, pass_fds: Sequence[int] = ()) -> int:
    """Run `command`, its output on the screen and in `log`; a signal reaches it and its end is
    awaited. It inherits `pass_fds`, such as that of a lock which it shall hold to its end.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as file:
        file.write(f"$ {' '.join(command)}\n".encode())
        file.flush()
        # Its own group: Ctrl-C comes here alone and goes on once, so that the stage saves once.
        process = subprocess.Popen(
            list(command),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
            env=_environment(),
            start_new_session=True,
            pass_fds=tuple(pass_fds),
        )
        assert process.stdout is not None

        def forward(number: int, frame: object) -> None:
            process.send_signal(number)

        before = {
            number: signal.signal(number, forward) for number in (signal.SIGINT, signal.SIGTERM)
        }
        try:
            while chunk := os.read(process.stdout.fileno(), 1 << 16):
                file.write(chunk)
                file.flush()
                sys.stdout.buffer.write(chunk)
                sys.stdout.flush()
            return process.wait()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def run_stage(
    stage: Stage,
    out: Path,
    identity: str,
    place: str,
    stream: Callable[[Sequence[str], Path], int] = stream,
    clock: Callable[[], float] = time.monotonic,
    began: float | None = None,
) -> tuple[int, float]:
    """Run one stage, or skip it when its marker says that it is done.

    A stage that was interrupted with the same settings starts on what it left (training resumes
    from its last checkpoint); with other settings what it left is removed first.

    Returns:
        (exit code, seconds it took, now or when it ran).
    """
    marker, log = out / ".stages" / f"{stage.name}.json", out / "logs" / f"{stage.name}.log"
    known = _read_marker(marker)
    same = known.get("hash") == identity
    there = all((out / leaf).exists() for leaf in stage.leaves)
    if same and known.get("state") == "done" and there:
        print(f"== {place} {stage.name}: done before, skipped", flush=True)
        return 0, float(known.get("seconds", 0.0))
    # Data are written anew: a folder without its last file is of no use to the builder.
    if not same or stage.name == "data":
        _clear(out, stage.leaves)
    begin = clock()
    _write_marker(marker, {"hash": identity, "state": "started"})
    since = begin - (begin if began is None else began)
    print(f"\n== {place} {stage.name}: {stage.title}   [{since / 60:.1f} min]", flush=True)
    code = stream((sys.executable, "-m", "train.main", *stage.argv), log)
    seconds = clock() - begin
    if code == 0:
        _write_marker(marker, {"hash": identity, "state": "done", "seconds": seconds})
        print(f"== {stage.name}: {seconds:.0f} s", flush=True)
    elif code == _STOPPED:
        print(f"== {stage.name}: stopped, saved; run the same command again to go on", flush=True)
    else:
        print(
            f"== {stage.name}: failed with exit code {code}; see {log}", file=sys.stderr, flush=True
        )
    return code, seconds


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m train.demo", description=__doc__)
    shipped = ROOT / "models" / "pretrained"
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder of the demo")
    parser.add_argument(
        "--quick", action="store_true", help="tiny sizes: shows that every stage runs"
    )
    parser.add_argument("--teacher", type=Path, default=shipped / "blocksworld-teacher")
    parser.add_argument("--teacher-vqa", type=Path, default=shipped / "blocksworld-teacher-vqa")
    return parser


def _digest_files(folders: Sequence[Path]) -> list[Path]:
    """The scene digests that ship beside the teachers: their training scenes stay out of the demo's
    data.
    """
    return sorted({file for folder in folders for file in folder.glob("scenes-*.npy")})


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo. Exit code: 0, 75 when stopped by a signal, otherwise that of the stage that
    failed.
    """
    args = _parser().parse_args(argv)
    out, teachers = args.out.resolve(), (args.teacher.resolve(), args.teacher_vqa.resolve())
    for folder in teachers:
        if not (folder / "config.json").is_file():
            print(
                f"train.demo: {folder}: no model there; name one with --teacher(-vqa)",
                file=sys.stderr,
            )
            return 2
    digests = _digest_files(teachers)
    if not digests:
        print(
            "train.demo: no scenes-*.npy beside the teachers: their training scenes may turn up "
            "in the demo's data",
            file=sys.stderr,
        )
    plan = make_plan(out, *teachers, args.quick, digests)
    identities = _identities(plan, teachers)
    out.mkdir(parents=True, exist_ok=True)
    took: list[tuple[str, float]] = []
    began, total = time.monotonic(), len(plan.stages) + 1
    for number, stage in enumerate(plan.stages, 1):
        code, seconds = run_stage(
            stage, out, identities[stage.name], f"[{number}/{total}]", began=began
        )
        if code:
            return code if code > 0 else 128 - code
        took.append((stage.name, seconds))
    print(f"\n== [{total}/{total}] report: summary and page", flush=True)
    begin = time.monotonic()
    spent = sum(seconds for _, seconds in took) + time.monotonic() - begin
    write_summary(out, plan.models, took, spent, _TOP_K, _MAX_TOKENS)
    return 0


if __name__ == "__main__":
    sys.exit(main())
