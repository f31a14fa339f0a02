"""The pre-training distillation step against an eager one that materialises every attention map.

Full-size teacher (xvlm-clip-base, 12/6/6) and student (efficientvlm, 6/3/3), one general step:
forward of both models, all losses, backward, clipping, AdamW. Ours goes through the engine as the
recipe efficientvlm-4m sets it up; the other is `eager_step.py`. First both must give the same losses
(1e-4, fp32, without dropout); then each is timed in a process of its own, in turns. Run from the
repository root:

    python benchmarks/distill_step.py --device cuda --batch 128 --dtype bf16
    python benchmarks/distill_step.py --device cuda --batch 64 --image-size 384 --dtype bf16 \\
        --eager-dtype fp16 --set engine.compile=default

--dtype is of both, --eager-dtype of the eager one where it differs: "fp16" there is autocast with a
dynamic loss scale, what the published code trains in. Memory: CUDA's peak of allocated bytes; on a
CPU the growth of the resident set from before the models to its peak. "step" is what of it is
not weights, gradients, or optimizer states. On a CPU that others use, too, compare CPU seconds rather
than seconds, with OMP_NUM_THREADS=1. Results go to benchmarks/results/distill_step_DEVICE.json,
an entry for each setting.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
SIDES = ("ours", "eager")
TOLERANCE = 1e-4
CHECKED_ROWS = 4  # of the batch on which losses are compared


def settings(args: argparse.Namespace) -> Any:
    """The recipe's run, at the size and in the precision asked for, in one process: with nothing to
    partition ZeRO would only keep second copies.
    """
    from train.recipes_io import load_run_config

    overrides = [
        f"data.batch={args.batch}",
        f"engine.precision={args.dtype}",
        f"teacher.dtype={args.dtype}",
        "engine.config=zero0",
        *args.set,
    ]
    return load_run_config(ROOT / "train/recipes/efficientvlm-4m.yaml", overrides)[0]


def model_sizes(args: argparse.Namespace) -> tuple[Any, Any]:
    """Configurations of student and teacher."""
    from models import presets

    size: dict[str, Any] = {"vision.image_size": args.image_size}
    return presets.config(args.student, **size), presets.config(args.teacher, **size)


def models(args: argparse.Namespace, device: Any) -> tuple[Any, Any]:
    """Student and teacher with fresh weights, the same in every process: the teacher's drawn, the
    student's cut from it as in the recipe.
    """
    import torch

    from models.initialise import student_from_teacher
    from models.xvlm import XVLM

    torch.manual_seed(0)
    student_config, teacher_config = model_sizes(args)
    teacher = XVLM(teacher_config)
    student, _ = student_from_teacher(teacher, student_config)
    return student.to(device), teacher.to(device)


def batch_of(config: Any, model: Any, device: Any) -> Any:
    """A general batch of the run's sizes: noise, texts of 8 tokens up to the longest."""
    import torch

    from data_pipeline.batches import PretrainBatch
    from train.stages.memory import step_batch

    generator = torch.Generator().manual_seed(0)
    empty = step_batch(config, model, region=False)
    assert isinstance(empty, PretrainBatch)
    rows, tokens = empty.text_ids.shape

    def ids() -> torch.Tensor:
        return torch.randint(1, model.text.vocab_size, (rows, tokens), generator=generator)

    slots = empty.mlm_labels.shape[1]
    lengths = torch.randint(min(8, tokens), tokens + 1, (rows, 1), generator=generator)
    text = ids()
    images = torch.randint(
        0, 256, tuple(empty.images.shape), dtype=torch.uint8, generator=generator
    )
    return replace(
        empty,
        images=images,
        text_ids=text,
        text_mask=torch.arange(tokens)[None] < lengths,
        mlm_ids=ids(),
        mlm_positions=torch.randint(0, min(8, tokens), (rows, slots), generator=generator),
        mlm_labels=torch.randint(1, model.text.vocab_size, (rows, slots), generator=generator),
    ).to(device)


# --- the same losses ------------------------------------------------------------------------------


def compare(args: argparse.Namespace) -> dict[str, Any]:
    """Raw terms of both steps on one small batch in fp32, and their largest relative difference."""
    import torch

    from benchmarks.eager_step import EagerStep, total
    from train.build import build_task
    from train.runtime.step import keyed_generator
    from train.runtime.teacher import Teacher
    from train.tasks.base import StepContext

    args.dtype, args.set = "fp32", []
    args.batch = min(args.batch, CHECKED_ROWS)
    config, device = settings(args), torch.device(args.device)
    student, teacher = models(args, device)
    student.eval()  # no dropout
    batch = batch_of(config, student.config, device)
    task = build_task(config, student, teacher, None)
    context = StepContext(0, 0, 1, keyed_generator(0, 0))
    with torch.no_grad():
        ours = task.losses(
            student, Teacher(teacher, torch.float32, device, "torch"), batch, context
        )
        optimizer = torch.optim.SGD(student.parameters(), lr=0.0)
        eager = EagerStep(student, teacher, optimizer, None).forward(batch, keyed_generator(0, 0))
    terms = {name: float(value) for name, value in ours.terms.items()}
    theirs = {name: float(value) for name, value in eager.items()}
    terms["total"], theirs["total"] = float(ours.total()), float(total(eager))
    assert terms.keys() == theirs.keys(), (terms.keys(), theirs.keys())
    differences = {name: abs(terms[name] / theirs[name] - 1) for name in terms}
    return {
        "rows": args.batch,
        "ours": terms,
        "eager": theirs,
        "largest_relative_difference": max(differences.values()),
    }


# --- one side in its own process ------------------------------------------------------------------


def ours_step(args: argparse.Namespace, device: Any) -> Callable[[int], Any]:
    """Our optimizer step: engine, task and teacher as a run builds them."""
    from train.build import build_task
    from train.runtime.engine import build_engine, parameter_groups
    from train.runtime.step import EngineModule, keyed_generator, train_step
    from train.runtime.teacher import Teacher, choose_dtype
    from train.tasks.base import StepContext

    config = settings(args)
    student, teacher = models(args, device)
    frozen = Teacher(
        teacher,
        choose_dtype(config.teacher.dtype, device),
        device,
        config.teacher.backend,
        compile=config.teacher.compile,
        overlap=config.teacher.overlap,
    )
    task = build_task(config, student, frozen.model, None)
    engine = build_engine(
        config,
        EngineModule(student, task, frozen),
        parameter_groups(student, set(), config.optim),
    )
    batch = batch_of(config, student.config, device)

    def step(number: int) -> float:
        def context(micro: int) -> StepContext:
            return StepContext(number, 0, 1, keyed_generator(0, number, micro))

        return train_step(engine, iter([batch] * config.engine.accumulate), context).loss

    return step


def eager_side(args: argparse.Namespace, device: Any) -> Callable[[int], Any]:
    """The eager optimizer step, with torch's own AdamW."""
    import torch

    from benchmarks.eager_step import EagerStep
    from train.runtime.engine import parameter_groups
    from train.runtime.step import keyed_generator

    config = settings(args)
    student, teacher = models(args, device)
    groups = parameter_groups(student, set(), config.optim)
    optimizer = torch.optim.AdamW(groups, betas=config.optim.betas, eps=config.optim.eps)
    half = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
    run = EagerStep(student, teacher, optimizer, half[args.eager_dtype], config.optim.clip)
    batch = batch_of(config, student.config, device)
    return lambda number: float(run(batch, keyed_generator(0, number, 0))["total"])


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Seconds of each step and peak memory of one side in this process."""
    import torch

    from train.runtime.distributed import finish, start

    device = start().device if args.device == "cuda" else torch.device("cpu")
    if args.device == "cpu":
        start()
    torch.nn.Linear(64, 64)(torch.randn(8, 64)).sum().backward()  # libraries are loaded
    before = 0 if device.type == "cuda" else resident("VmRSS")
    step = {"ours": ours_step, "eager": eager_side}[args.worker](args, device)
    reset_peak(device)
    for number in range(args.warmup):
        step(number)
    seconds, busy, value = [], [], 0.0
    for number in range(args.warmup, args.warmup + args.steps):
        synchronise(device)
        began, worked = time.perf_counter(), time.process_time()
        value = step(number)
        synchronise(device)
        seconds.append(time.perf_counter() - began)
        busy.append(time.process_time() - worked)
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else resident("VmHWM")
    finish()
    return {
        "seconds": seconds,
        "cpu_seconds": busy,
        "peak_bytes": peak - before,
        "last_total": value,
    }


def synchronise(device: Any) -> None:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize()


def reset_peak(device: Any) -> None:
    """From here on counts the peak, the states that a first step makes included."""
    import torch

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


def resident(key: str) -> int:
    """A figure of /proc/self/status in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024
    raise ValueError(f"/proc/self/status has no {key}")


def in_process(args: argparse.Namespace, worker: str) -> dict[str, Any]:
    """The worker's result; {"error": ...} where it ran out of memory."""
    run = [sys.executable, __file__, *sys.argv[1:], "--worker", worker]
    done = subprocess.run(run, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    if "OutOfMemoryError" in done.stderr:
        return {"error": "out of memory"}
    sys.stderr.write(done.stdout + done.stderr)
    raise SystemExit(f"distill_step: the process of {worker!r} failed ({done.returncode})")


# --- what came of it ------------------------------------------------------------------------------


def state_bytes(args: argparse.Namespace, side: str) -> int:
    """Teacher in its precision; the student's weights, gradients and AdamW states in fp32 (and the
    fp16 weights of the engine's fp16 mode).
    """
    from models.summary import summarise

    student, teacher = (summarise(config).parameters["total"] for config in model_sizes(args))
    half = side == "ours" and args.dtype != "fp32"
    masters = 2 * student if side == "ours" and args.dtype == "fp16" else 0
    return 16 * student + (2 if half else 4) * teacher + masters


def peak_rate(args: argparse.Namespace, dtype: str) -> float | None:
    """FLOP/s the device could do: as given, or from the table of known devices."""
    import torch

    from train.monitor.flops import device_peak

    if args.peak_tflops:
        return args.peak_tflops * 1e12
    return device_peak(torch.device(args.device), dtype)


def side_result(args: argparse.Namespace, side: str, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians over all steps of all processes of one side."""
    from train.monitor.flops import step_cost

    dtype = args.dtype if side == "ours" else args.eager_dtype
    if any("error" in run for run in runs):
        return {"dtype": dtype, "error": "out of memory"}
    seconds, busy = ([v for run in runs for v in run[key]] for key in ("seconds", "cpu_seconds"))
    median = statistics.median(seconds)
    flops = step_cost(settings(args), *model_sizes(args)).general
    rate = peak_rate(args, dtype)
    peak = max(run["peak_bytes"] for run in runs)
    return {
        "dtype": dtype,
        "seconds": {"median": median, "min": min(seconds), "max": max(seconds), "all": seconds},
        "cpu_seconds": {"median": statistics.median(busy), "all": busy},
        "samples_per_s": args.batch / median,
        "tflops": flops / median / 1e12,
        "mfu": None if rate is None else flops / median / rate,
        "peak_bytes": peak,
        "step_bytes": peak - state_bytes(args, side),
        "last_total": runs[-1]["last_total"],
    }


def entry(args: argparse.Namespace, check: dict[str, Any]) -> dict[str, Any]:
    """Measures both sides in turns."""
    from train.provenance import provenance

    runs: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
    load = [os.getloadavg()[0]]
    for _ in range(args.rounds):
        for side in SIDES:
            runs[side].append(in_process(args, side))
            print(side, json.dumps(runs[side][-1]), flush=True)
            load.append(os.getloadavg()[0])
    sides = {side: side_result(args, side, runs[side]) for side in SIDES}
    ratios = {}
    if not any("error" in result for result in sides.values()):
        ours, eager = sides["ours"], sides["eager"]
        ratios = {
            "speedup": eager["seconds"]["median"] / ours["seconds"]["median"],
            "speedup_of_fastest_steps": eager["seconds"]["min"] / ours["seconds"]["min"],
            "speedup_in_cpu_time": eager["cpu_seconds"]["median"] / ours["cpu_seconds"]["median"],
            "peak_memory": ours["peak_bytes"] / eager["peak_bytes"],
            "step_memory": ours["step_bytes"] / eager["step_bytes"],
        }
    return {
        "command": " ".join(["python", "benchmarks/distill_step.py", *sys.argv[1:]]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": device_name(args),
        "student": args.student,
        "teacher": args.teacher,
        "image_size": args.image_size,
        "batch": args.batch,
        "dropout": "as configured, both",
        "rounds": args.rounds,
        "steps_per_round": args.steps,
        "warmup_steps": args.warmup,
        **ratios,
        **sides,
        "same_losses": check,
        "load_average": {"before": load[0], "most": max(load), "cores": os.cpu_count()},
        "provenance": provenance(1),
    }


def device_name(args: argparse.Namespace) -> str:
    """Of the GPU, or the processor's model and the threads torch uses."""
    import torch

    if args.device == "cuda":
        return torch.cuda.get_device_name()
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.split(":")[1].strip() for line in lines if "model name" in line), "CPU")
    return f"{model}, {torch.get_num_threads()} threads"


def save(path: Path, found: dict[str, Any]) -> None:
    """Adds the entry, in place of one by the same command."""
    entries = json.loads(path.read_text())["entries"] if path.is_file() else []
    kept = [old for old in entries if old["command"] != found["command"]]
    path.parent.mkdir(parents=True, exist_ok=True)
    what = (
        "one general pre-training distillation step of the full-size models, ours against an eager "
        "step that materialises all attention maps"
    )
    path.write_text(json.dumps({"what": what, "entries": [*kept, found]}, indent=1) + "\n")


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    result.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    result.add_argument("--batch", type=int, default=2, help="image-text pairs")
    result.add_argument("--image-size", type=int, default=224)
    result.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), default="fp32")
    result.add_argument("--eager-dtype", choices=("fp32", "bf16", "fp16"))
    result.add_argument("--steps", type=int, default=2, help="timed in each process")
    result.add_argument("--warmup", type=int, default=1)
    result.add_argument("--rounds", type=int, default=3, help="processes of each side, in turns")
    result.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="of our run file")
    result.add_argument("--peak-tflops", type=float, help="of the device, for MFU")
    result.add_argument("--student", default="efficientvlm")
    result.add_argument("--teacher", default="xvlm-clip-base")
    result.add_argument("--json", type=Path)
    result.add_argument("--worker", choices=(*SIDES, "compare"), help=argparse.SUPPRESS)
    return result


def main() -> int:
    args = parser().parse_args()
    args.eager_dtype = args.eager_dtype or args.dtype
    if args.batch < 2:
        raise SystemExit("--batch: hard negatives need at least 2 pairs")
    if args.worker:
        found = compare(args) if args.worker == "compare" else measure(args)
        print(json.dumps(found))
        return 0
    check = in_process(args, "compare")
    print(json.dumps(check), flush=True)
    worst = check["largest_relative_difference"]
    if not worst <= TOLERANCE:
        raise SystemExit(f"distill_step: losses differ by {worst:.1e} (relative)")
    found = entry(args, check)
    save(args.json or ROOT / f"benchmarks/results/distill_step_{args.device}.json", found)
    shown = {key: value for key, value in found.items() if isinstance(value, float)}
    print(json.dumps(shown, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
