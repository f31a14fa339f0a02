"""Memory that a training step takes on one device, found by running it on tensors without data.

The step itself runs: student, teacher, losses and backward, on fake tensors, which have shapes and
types but no storage. Every allocation is counted while it lives, so the estimate follows the code:
fused attention, activation checkpointing, autocast's copies of the weights and the buffers of
distillation are in it because they are in the step.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from data_pipeline.batches import Batch, PretrainBatch
from models.config import ModelConfig
from models.xvlm import XVLM
from train.config import RunConfig
from train.losses.attention import planned_on_gpu
from train.runtime.engine import engine_settings
from train.stages.full_batches import downstream_batch
from train.student import rest_trimmers
from train.tasks.base import StepContext, Task

__all__ = ["LiveBytes", "StepMemory", "stage_memory", "step_batch", "step_memory"]

_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


class LiveBytes(TorchDispatchMode):
    """Counts bytes of tensors made inside the context while they live.

    Attributes:
        live: now.   peak: the most so far.   ops: how many operations ran.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = self.ops = 0
        self._seen: set[weakref.ref] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        self.ops += 1
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._add(leaf.untyped_storage())
        return out

    def _add(self, storage: torch.UntypedStorage) -> None:
        size = storage.nbytes()

        def freed(reference: weakref.ref) -> None:
            self._seen.discard(reference)
            self.live -= size

        reference = weakref.ref(storage, freed)
        if reference in self._seen:  # a view of something counted
            return
        self._seen.add(reference)
        self.live += size
        self.peak = max(self.peak, self.live)

    def restart(self) -> None:
        """The peak is looked for from here on."""
        self.peak = self.live


@dataclass(frozen=True)
class StepMemory:
    """Bytes of one micro-batch on one device, besides weights, gradients and optimizer.

    Attributes:
        activations: peak of the student's own step.   kd: what distillation adds to that peak
            (states and maps of both models that wait to be compared, gradients kept of it).
        teacher: its weights.   gradients: of the parameters, when backward ends.
        beside: of `gradients`, what has grown by the time of the peak.
    """

    activations: int
    kd: int
    teacher: int
    gradients: int
    beside: int


class _FakeTeacher:
    """What the tasks use of `train.runtime.teacher.Teacher`, which would move and try its model."""

    overlaps = False

    def __init__(self, model: XVLM) -> None:
        self.model = model

    def inputs_ready(self) -> None:
        """Nothing runs beside anything here."""

    @contextmanager
    def running(self) -> Iterator[XVLM]:
        """As the teacher's."""
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            yield self.model


def step_memory(
    config: RunConfig,
    student: ModelConfig,
    teacher: ModelConfig | None,
    *,
    region: bool = False,
    on_gpu: bool = True,
) -> StepMemory:
    """What a micro-batch of `config` takes; `data.batch` and `data.region` are those of a rank.

    Args:
        region: a region step instead of a general one.
        on_gpu: attention distillation takes the way of a GPU: by `config.engine.kernels` the kernel
            attention_kd, which keeps q and k of both models, or a GPU's chunks, which keep gradients.
    """
    plain = _run(config, student, None, region, on_gpu)
    if teacher is None:
        return plain
    full = _run(config, student, teacher, region, on_gpu)
    return StepMemory(
        activations=plain.activations,
        kd=max(0, full.activations - plain.activations),
        teacher=full.teacher,
        gradients=full.gradients,
        beside=full.beside,
    )


def _run(
    config: RunConfig,
    student: ModelConfig,
    teacher: ModelConfig | None,
    region: bool,
    on_gpu: bool,
) -> StepMemory:
    from train.build import build_task  # it imports the stages' machinery

    device = planned_on_gpu(config.engine.kernels) if on_gpu else nullcontext()
    with FakeTensorMode(), device:
        model = _model(student, "fp16" if config.engine.precision == "fp16" else "fp32")
        model.set_activation_checkpointing(config.engine.activation_checkpointing)
        if config.trim is None:
            rest_trimmers(model)
        frozen = None
        if teacher is not None:
            name = config.teacher.dtype
            name = ("fp16" if on_gpu else "fp32") if name == "auto" else name
            frozen = _FakeTeacher(_model(teacher, name).eval().requires_grad_(False))
        task = build_task(config, model, None if frozen is None else frozen.model, None)
        batch = step_batch(config, student, region)
        return _watched(config, model, task, frozen, batch)


def _model(config: ModelConfig, precision: str) -> XVLM:
    """Made in its precision: fake parameters cannot be cast in place."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(_DTYPES[precision])
    try:
        return XVLM(config)
    finally:
        torch.set_default_dtype(before)


def _watched(config: RunConfig, model: XVLM, task: Task, teacher: Any, batch: Batch) -> StepMemory:
    """Forward and backward; the peak of everything that is neither a weight nor a gradient."""
    grown, best, seen = 0, (0, 0), set[int]()

    def note(parameter: Tensor) -> None:
        nonlocal grown, best
        assert parameter.grad is not None
        best = max(best, (live.peak - grown, grown))
        if id(parameter) not in seen:
            seen.add(id(parameter))
            grown += parameter.grad.nbytes
        live.restart()

    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(note)
    half = config.engine.precision == "bf16"
    autocast = torch.autocast("cpu", dtype=torch.bfloat16) if half else nullcontext()
    generator = torch.Generator().manual_seed(0)
    with LiveBytes() as live:
        with autocast:
            losses = task.losses(model.train(), teacher, batch, StepContext(0, 0, 1, generator))
        total = losses.total()
        del losses
        total.backward()
        best = max(best, (live.peak - grown, grown))
    weights = 0 if teacher is None else _bytes(teacher.model)
    return StepMemory(best[0], 0, weights, grown, best[1])


def _bytes(module: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in module.parameters())


def step_batch(config: RunConfig, student: ModelConfig, region: bool) -> Batch:
    """A full batch: every text as long as it may be, every slot used."""
    if config.task != "pretrain":
        return downstream_batch(config, student)
    data, side = config.data, student.vision.image_size
    images = data.region.images if region else data.batch
    rows = data.region.rows if region else images
    whole = {
        "images": torch.zeros(images, 3, side, side, dtype=torch.uint8),
        "image_index": torch.arange(rows) % images,
        "valid": torch.ones(rows, dtype=torch.bool),
        "keys": ("",) * rows,
    }
    ids = torch.zeros(rows, data.max_tokens, dtype=torch.int64)
    seen = torch.ones(rows, data.max_tokens, dtype=torch.bool)
    slots = torch.zeros(rows, data.mlm_max, dtype=torch.int64)
    regions: dict[str, Any] = {}
    if region:
        patches = student.vision.output_tokens
        regions = {
            "region_mask": torch.ones(rows, patches, dtype=torch.bool),
            "boxes": torch.ones(rows, 4),
            "is_region": torch.ones(rows, dtype=torch.bool),
        }
    return PretrainBatch(
        **whole, text_ids=ids, text_mask=seen, mlm_ids=ids, mlm_positions=slots, mlm_labels=slots,
        **regions,
    )  # fmt: skip


def stage_memory(
    config: RunConfig, step: StepMemory, parameters: int, stage: int, ranks: int
) -> dict[str, int]:
    """Bytes on one device by part, and "peak", at ZeRO stage `stage` over `ranks`.

    weights: as the forward needs them, whole at stages 0 to 2; stage 3 keeps a shard and gathers up
        to stage3_max_live_parameters.
    gradients: whole at stages 0 and 1, a shard at 2 and 3; and from stage 1 the buckets in which
        they are reduced, which are there from the start of the backward.
    optimizer: AdamW's two moments, and from stage 1 DeepSpeed's fp32 copy of the own shard, which it
        also makes of fp32 weights.
    peak: everything that lives at once, either when activations are complete or, at the update,
        gradients. Not the sum: gradients grow while activations go.
    """
    zero = engine_settings(config)["zero_optimization"]
    size = 2 if config.engine.precision == "fp16" else 4
    shard = -(-parameters // ranks)
    weights, gradients, optimizer = size * parameters, step.gradients, 8 * parameters
    buckets = flattened = 0
    if stage >= 1:
        optimizer = 0 if _offloaded(zero, "offload_optimizer") else 12 * shard
        count = 2 if zero.get("overlap_comm", True) else 1
        buckets = size * count * min(parameters, int(zero.get("reduce_bucket_size", 5e8)))
        gradients = gradients if stage == 1 else 4 * shard
        flattened = 4 * shard  # the update takes its shard in one piece
    if stage == 3:
        gathered = min(parameters, int(zero.get("stage3_max_live_parameters", 1e9)))
        kept = 0 if _offloaded(zero, "offload_param") else shard
        weights = size * (kept + gathered)  # on one rank, too
    forward = step.activations + step.kd + min(step.beside, gradients) + buckets
    update = gradients + buckets + flattened
    return {
        "weights": weights,
        "gradients": gradients + buckets,
        "optimizer": optimizer,
        "activations": step.activations,
        "teacher": step.teacher,
        "KD": step.kd,
        "peak": weights + optimizer + step.teacher + max(forward, update),
    }


def _offloaded(zero: dict[str, Any], key: str) -> bool:
    return (zero.get(key) or {}).get("device", "none") != "none"
