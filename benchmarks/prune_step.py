"""The pruning step with gates on activations, folded into weights, and with closed units left out.

Full-size student (efficientvlm) and teacher (xvlm-clip-base), the task and distillation of the recipe
efficientvlm-vqa-prune: gates are drawn as a run draws them, forward of the student, all losses,
backward, gradients of the gates gathered. The teacher's outputs are computed once and kept; what its
forward takes is measured beside, because it does not depend on the gates. Gates are 0 with the
probability asked for, in every layer alike, and drawn anew in each step.

All forms take turns in one process, at every sparsity with the same gates, after their losses and
gradients have been compared (1e-3 of their size, fp32, without dropout). Time is the processor
time of one thread on a CPU, where neighbours disturb it least, and the wall clock on a GPU. Run from
the repository root:

    python benchmarks/prune_step.py
    python benchmarks/prune_step.py --device cuda --batch 32 --pixels 384 --dtype bf16

Results go to benchmarks/results/prune_step.json. "speedup" is against "mask" in the same round;
"whole_step" adds the teacher's forward to both.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from models import presets  # noqa: E402
from models.gates import LOG_ALPHA_HIGH, LOG_ALPHA_LOW, GateBank  # noqa: E402
from models.kernels.reference_gates import OPEN_SHIFT  # noqa: E402
from models.xvlm import XVLM  # noqa: E402
from train.build import build_task  # noqa: E402
from train.config import PruneConfig, RunConfig  # noqa: E402
from train.evaluation.latency import device_name, interleave  # noqa: E402
from train.provenance import provenance  # noqa: E402
from train.recipes_io import load_run_config  # noqa: E402
from train.runtime.gate_optimizer import GateOptimizer  # noqa: E402
from train.runtime.step import keyed_generator  # noqa: E402
from train.runtime.teacher import Teacher  # noqa: E402
from train.stages.memory import step_batch  # noqa: E402
from train.tasks.base import StepContext  # noqa: E402
from train.tasks.vqa import VqaTask  # noqa: E402

RECIPE = ROOT / "train/recipes/efficientvlm-vqa-prune.yaml"
FORMS = ("mask", "fold", "compact")
SETTINGS = ("batch", "pixels", "repeats", "dtype", "threads", "student", "teacher")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
LARGEST_DIFFERENCE = 1e-3


class KeptTeacher(VqaTask):
    """The task with the teacher's outputs of the one batch kept."""

    kept: Any = None

    def _run(self, model: XVLM, batch: Any, side: Any) -> Any:
        if side != "teacher":
            return super()._run(model, batch, side)
        if self.kept is None:
            self.kept = super()._run(model, batch, side)
        return self.kept


class Step:
    """Everything of one setting of attention distillation but the form and the sparsity."""

    def __init__(self, args: argparse.Namespace, attention: str) -> None:
        self.config = settings(args, attention)
        self.device, self.dtype = torch.device(args.device), DTYPES[args.dtype]
        torch.manual_seed(0)
        size: dict[str, Any] = {"vision.image_size": args.pixels}
        self.student = presets.create(args.student, form="vqa", **size).to(self.device)
        model = presets.create(args.teacher, form="vqa", **size)
        self.teacher = Teacher(model.to(self.device), self.dtype, self.device, "torch")
        task = build_task(self.config, self.student, self.teacher.model, None)
        assert isinstance(task, VqaTask)
        task.__class__ = KeptTeacher
        self.task: Any = task
        self.batch = batch_of(self.config, self.student).to(self.device)

    def autocast(self) -> Any:
        half = self.dtype != torch.float32
        return torch.autocast(self.device.type, self.dtype) if half else nullcontext()

    def total(self, seed: int) -> Tensor:
        """The loss of the whole step."""
        context = StepContext(seed, 0, 1, keyed_generator(0, seed))
        with self.autocast():
            return self.task.losses(self.student, self.teacher, self.batch, context).total()

    def teacher_forward(self) -> None:
        """What the teacher adds to a step."""
        with self.teacher.running() as model:
            VqaTask._run(self.task, model, self.batch, "teacher")


def settings(args: argparse.Namespace, attention: str) -> RunConfig:
    """The recipe's run at the size asked for."""
    chosen = [f"data.batch={args.batch}"]
    if attention == "off":
        chosen.append("kd.attention=none")
    return load_run_config(RECIPE, chosen)[0]


def batch_of(config: RunConfig, student: XVLM) -> Any:
    """Noise in full batches of the run's sizes."""
    generator, batch = torch.Generator().manual_seed(0), step_batch(config, student.config, False)
    high = student.config.text.vocab_size

    def noise(like: Tensor, high: int) -> Tensor:
        return torch.randint(1, high, like.shape, generator=generator).to(like.dtype)

    ids: dict[str, Any] = {
        name: noise(getattr(batch, name), high) for name in ("question_ids", "answer_ids")
    }
    return replace(batch, images=noise(batch.images, 256), **ids)


class Gated:
    """The step with gates in one form at one sparsity."""

    def __init__(self, step: Step, form: Any, sparsity: float) -> None:
        self.step, self.number = step, 0
        bank = GateBank.of_model(step.student)
        odds = torch.logit(torch.tensor(1.0 - sparsity, dtype=torch.float64), eps=1e-12).item()
        level = min(max(odds + OPEN_SHIFT, LOG_ALPHA_LOW), LOG_ALPHA_HIGH)
        with torch.no_grad():
            bank.log_alpha.fill_(level)
        self.gates = GateOptimizer(bank, PruneConfig(gates=form), step.device, 1)
        self._prepare()

    def _prepare(self) -> None:
        self.gates.prepare(self.number, keyed_generator(0, self.number))

    def run(self, update: Callable[[dict[str, Tensor]], None] | None = None) -> float:
        """One step; log-alpha stays, so that the sparsity does. The loss, unless timed."""
        student = self.step.student
        self.gates.begin_step(self.number, keyed_generator(0, self.number))
        torch.manual_seed(self.number)
        loss = self.step.total(self.number)
        loss.backward()
        if update is not None:
            found = {name: p.grad for name, p in student.named_parameters() if p.grad is not None}
            update(found | {"gates": self.gates.bank.gradient() * (self._flat() != 0)})
        self.gates.finish_step(self.number, applied=False)
        student.zero_grad(set_to_none=True)
        self.number += 1
        self._prepare()
        return loss.item() if update is not None else 0.0

    def _flat(self) -> Tensor:
        bank = self.gates.bank
        return bank.join({name: z for name, z in bank.values().items() if z is not None}).detach()

    def __call__(self) -> None:
        self.run()


def compare(calls: dict[str, Gated]) -> float:
    """Largest difference of a gradient from the masked form's, relative to the largest in its
    tensor; without dropout. Raises SystemExit when it is more than rounding.
    """
    expected: dict[str, Tensor] = {}
    worst, losses = 0.0, []
    for name, call in calls.items():
        found: dict[str, Tensor] = {}
        call.step.student.eval()
        losses.append(call.run(lambda grads, found=found: found.update(grads)))
        call.step.student.train()
        if name == "mask":
            expected = found
        for key, value in expected.items():
            scale = float(value.abs().max())
            # A softmax does not see a bias of the keys: that gradient is rounding alone.
            if scale > 0 and not key.endswith(".k.bias"):
                worst = max(worst, float((found[key] - value).abs().max()) / scale)
    worst = max(worst, max(losses) / min(losses) - 1)
    exact = next(iter(calls.values())).step.dtype == torch.float32
    if not worst < (LARGEST_DIFFERENCE if exact else 0.2):
        raise SystemExit(f"the forms do not compute the same: {worst:.2e}")
    return worst


def spread(values: list[float]) -> dict[str, float]:
    """Median, least and largest."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def measured(step: Step, sparsity: float, args: argparse.Namespace) -> dict[str, Any]:
    """Seconds of every form, and ratios to the masked one round by round."""
    calls = {form: Gated(step, form, sparsity) for form in args.forms}
    difference = compare(calls)
    cuda = args.device == "cuda"
    seconds = interleave(
        [*calls.items(), ("teacher", step.teacher_forward)],
        args.repeats,
        warm_up=3 if cuda else 0,  # the comparison was one
        synchronise=torch.cuda.synchronize if cuda else lambda: None,
        clock=time.perf_counter if cuda else time.process_time,
        progress=True,
    )
    teacher = seconds.pop("teacher")
    result: dict[str, Any] = {
        "closed": 1.0 - calls["mask"].gates.bank.probabilities_open().mean().item(),
        "difference": difference,
        "teacher_seconds": spread(teacher),
    }
    for form, values in seconds.items():
        pairs = list(zip(seconds["mask"], values, teacher, strict=True))
        result[form] = {
            "seconds": spread(values),
            "speedup": spread([mask / own for mask, own, _ in pairs]),
            "whole_step": spread([(mask + other) / (own + other) for mask, own, other in pairs]),
        }
    return result


def parser() -> argparse.ArgumentParser:
    cuda = torch.cuda.is_available()
    result = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    result.add_argument("--forms", nargs="+", choices=FORMS, default=list(FORMS))
    result.add_argument("--sparsity", nargs="+", type=float, default=[0.0, 0.3, 0.6])
    result.add_argument("--attention", nargs="+", choices=["on", "off"], default=["on", "off"])
    result.add_argument("--batch", type=int, default=32 if cuda else 2)
    result.add_argument("--pixels", type=int, default=384 if cuda else 224)
    result.add_argument("--repeats", type=int, default=20 if cuda else 3)
    result.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if cuda else "cpu")
    result.add_argument("--dtype", choices=list(DTYPES), default="bf16" if cuda else "fp32")
    result.add_argument("--threads", type=int, default=1, help="CPU threads")
    result.add_argument("--student", default="efficientvlm")
    result.add_argument("--teacher", default="xvlm-clip-base")
    result.add_argument("--json", type=Path, default=ROOT / "benchmarks/results/prune_step.json")
    return result


def main() -> int:
    args = parser().parse_args()
    if "mask" not in args.forms:
        raise SystemExit("--forms: everything is compared with mask; keep it")
    args.forms = [form for form in FORMS if form in args.forms]
    torch.set_num_threads(args.threads)
    found: dict[str, Any] = {
        "what": "seconds of the student's part of one pruning step (VQA, distilled), gates applied "
        "in three forms at shares of gates that are 0; attention distillation on and off",
        "command": " ".join(["python", *sys.argv]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": device_name(torch.device(args.device)),
        "clock": "wall" if args.device == "cuda" else "processor time of the process",
        "provenance": provenance(1),
        "load_before": os.getloadavg(),
    } | {key: getattr(args, key) for key in SETTINGS}
    results: dict[str, Any] = {}
    for attention in args.attention:
        step = Step(args, attention)
        step.student.train()
        results[f"attention_{attention}"] = rows = {}
        for sparsity in args.sparsity:
            rows[str(sparsity)] = measured(step, sparsity, args)
            print(
                f"attention {attention}, {sparsity:.0%}:",
                json.dumps(rows[str(sparsity)]),
                flush=True,
            )
    found |= {"load_after": os.getloadavg(), "cores": os.cpu_count(), "results": results}
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
