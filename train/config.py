"""RunConfig: one typed run file. Every section is a frozen dataclass; an unknown key is an error.

A recipe is YAML with the sections below. `a.b=c` on the command line overrides one key. Values are
resolved in the order: defaults here, recipe, overrides.
"""

from __future__ import annotations

from dataclasses import field, replace
from typing import Any, Literal

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

from train.data_config import DataConfig
from train.trim_config import TrimConfig

__all__ = [
    "BudgetConfig",
    "CheckpointConfig",
    "EngineConfig",
    "EvalConfig",
    "InitialiseConfig",
    "KdConfig",
    "LogConfig",
    "OptimConfig",
    "PruneConfig",
    "RunConfig",
    "TeacherConfig",
    "UserError",
    "per_rank",
]

Stage = Literal["pretrain", "distill", "finetune", "prune", "trim"]
TaskName = Literal[
    "pretrain", "vqa", "nlvr2_pretrain", "nlvr2", "retrieval", "captioning", "grounding"
]
Compile = Literal["none", "default", "reduce-overhead", "max-autotune"]
_STRICT = ConfigDict(extra="forbid")


class UserError(ValueError):
    """Bad input from the person at the keyboard: the message names file, key and remedy. Exit code
    2, no traceback.
    """


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class InitialiseConfig:
    """Where the student's first weights come from.

    Attributes:
        source: "random", "teacher" (cut by the layer map) or a model folder.
        task_vector: folder of the teacher BEFORE fine-tuning, from which `model` was distilled; what
            fine-tuning changed in the teacher is added to the student (models.initialise).
        vision_map, text_map, fusion_map, decoder_map: teacher layer of each student layer; None is
            1, 3, 5, ...
        add_positions: "sincos" adds 2D sine-cosine vectors to the positions of the patches, for a
            model that has not learned where things are (models.initialise.add_sincos_positions).
    """

    source: str = "random"
    task_vector: str | None = None
    vision_map: tuple[int, ...] | None = None
    text_map: tuple[int, ...] | None = None
    fusion_map: tuple[int, ...] | None = None
    decoder_map: tuple[int, ...] | None = None
    add_positions: Literal["sincos"] | None = None


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class TeacherConfig:
    """The frozen teacher.

    Attributes:
        path: model folder.   model: preset name, used by --dry-run while `path` does not exist yet.
        dtype: "auto" is fp16 where the device is fast at it, else bf16, else fp32; also the next
            one when a trial batch overflows.
        backend: "auto" is DeepSpeed's inference engine on a GPU, torch elsewhere.
        compile: torch.compile mode of the encoders ("reduce-overhead" captures CUDA graphs).
        overlap: run beside the student's forward on a second CUDA stream.
        inject: DeepSpeed's fused kernels in the text layers; needs a GPU and kd.attention=none.
            Refused where they differ from the model by more than `inject_bound` (relative).
    """

    path: str | None = None
    model: str | None = None
    dtype: Literal["auto", "fp16", "bf16", "fp32"] = "auto"
    backend: Literal["auto", "deepspeed", "torch"] = "auto"
    compile: Compile = "none"
    overlap: bool = False
    inject: bool = False
    inject_bound: float = 0.01


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class OptimConfig:
    """AdamW and its schedule.

    Attributes:
        new_lr_multiplier: for freshly initialised modules (published: 2).
        published_decay: weight decay also on the norms inside the heads and on the temperature,
            which the published rule for names misses.
        spike_factor: skip steps whose total loss is above this factor times the median of the last
            `spike_window` steps of their kind (general, region); 0 is off.
        skip_limit: steps skipped in a row (not finite or spikes) that end the run.
    """

    lr: float = 1e-4
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.98)
    eps: float = 1e-8
    clip: float = 1.0
    new_lr_multiplier: float = 1.0
    steps: int = 1000
    warmup_steps: int = 0
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    published_decay: bool = False
    spike_factor: float = 0.0
    spike_window: int = 100
    skip_limit: int = 20


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class KdConfig:
    """Distillation weights (EfficientVLM section 3.2; defaults are the published ones for
    pre-training).

    total = task_weight * task + kd_weight * sum of the weighted terms below.

    Attributes:
        vision_map, text_map, fusion_map, decoder_map: teacher layer that teaches each student layer;
            None spreads them evenly (1, 3, 5, ... for half the depth).
        temperature: divides the logits, and the similarities, of both models.
        contrastive: weight of the KL between the rows of image-text similarities over the global
            batch (pre-training; published: 0).
        attention: distance of attention maps. "probabilities": mean squared error of the maps,
            "kl": KL divergence, "scores": mean squared error before the softmax (not for
            decoders), "none".
        cross_attention: the maps of cross-attention are distilled, too.
    """

    task_weight: float = 0.6
    kd_weight: float = 0.4
    temperature: float = 1.0
    logits: float = 1.0
    text: float = 1.0
    image: float = 1.0
    image_hidden: float = 0.1
    fusion: float = 1.0
    decoder: float = 1.0
    contrastive: float = 0.0
    cross_attention: bool = False
    attention: Literal["probabilities", "kl", "scores", "none"] = "probabilities"
    vision_map: tuple[int, ...] | None = None
    text_map: tuple[int, ...] | None = None
    fusion_map: tuple[int, ...] | None = None
    decoder_map: tuple[int, ...] | None = None


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class BudgetConfig:
    """What pruning is to save, in place of parameters: give `macs` or `speedup`.

    Attributes:
        macs: share of the prunable multiply-accumulates of one example removed.
        speedup: how many times as fast as `against` the pruned model is to answer on this device.
        against: "teacher", or the dense "student" that is pruned.
        batch: examples in one pass; latency is that of the whole batch.
        text_tokens: of every text; None: data.max_tokens.   top_k: answers ranked (vqa); None:
            eval.top_k.   beams, max_length of captions are those of `eval`.
        dtype: of the weights and activations that are timed.   threads: of the CPU; None: torch's.
        tolerance: how far off the measured speed-up may be before the structure is corrected.
        repeats: rounds of a measurement.   cache: folder of latency tables.
    """

    macs: float | None = None
    speedup: float | None = None
    against: Literal["teacher", "student"] = "teacher"
    batch: int = 32
    text_tokens: int | None = None
    top_k: int | None = None
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    threads: int | None = None
    tolerance: float = 0.05
    repeats: int = 30
    cache: str = "~/.cache/espalier/latency"


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class PruneConfig:
    """Modal-adaptive L0 pruning (EfficientVLM section 3.3).

    Attributes:
        sparsity: target share of prunable parameters removed.
        budget: a target in multiply-accumulates or speed-up, which takes the place of `sparsity`.
        scope: "modal-adaptive" lets the losses share one budget out; baselines: "per-encoder" meets
            it within each modality, "uniform" takes the same share of every layer's units.
        constraint: "lagrangian" (published): multipliers that ascend hold the gates to the target,
            given about a thousand steps; "projection": every step ends on the target.
        round_to: FFN units that are kept come in multiples of it.
        ramp_steps: steps over which the target grows from 0.
        freeze_step: from here the structure is fixed (deterministic gates); None never.
        modalities: which encoders carry gates; image_fusion is the image's of two streams.
        gates: how a step applies them, all three exactly alike. "mask" multiplies activations,
            "fold" weights; "compact" folds and leaves units at 0 out of the products.
    """

    sparsity: float = 0.25
    budget: BudgetConfig | None = None
    scope: Literal["modal-adaptive", "per-encoder", "uniform"] = "modal-adaptive"
    constraint: Literal["lagrangian", "projection"] = "lagrangian"
    round_to: int = 1
    ramp_steps: int = 1000
    freeze_step: int | None = None
    lr: float = 0.01
    head_init: float = 10.0
    ffn_init_drop: float = 0.5
    modalities: tuple[Literal["vision", "text", "fusion", "image_fusion", "decoder"], ...] = (
        "vision",
        "text",
        "fusion",
        "image_fusion",
        "decoder",
    )
    gates: Literal["mask", "fold", "compact"] = "compact"


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class EngineConfig:
    """DeepSpeed.

    Attributes:
        config: a name in ds_configs/ or a path.
        precision: "fp32", "bf16" (autocast, fp32 parameters), "fp16" (engine mode, dynamic loss
            scale).
        max_loss_scale: where the fp16 loss scale starts and what it never exceeds (published:
            1024); 0 starts at 65536 without a limit.
        accumulate: micro-batches of an optimizer step.
        offload: "optimizer" keeps optimizer states in host memory (ZeRO 1 to 3), "parameters" the
            partitioned parameters too (ZeRO-3); "none" leaves it to `config`.
        activation_checkpointing: the student's blocks compute their activations again in the
            backward instead of keeping them.
        compile: torch.compile mode of the student's encoders (ZeRO 0 to 2).
        kernels: "auto" (CUDA kernels where they can run), "reference", "compiled" or "cuda"; single
            ops apart with "auto,ffn_act_mask=reference". ESPALIER_KERNELS comes before it.
        collective_timeout: minutes that a rank waits for the others in a step before the run fails;
            None: 10, or what DEEPSPEED_TIMEOUT says.
    """

    config: str = "zero1"
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    max_loss_scale: float = 0.0
    accumulate: int = 1
    offload: Literal["none", "optimizer", "parameters"] = "none"
    activation_checkpointing: bool = False
    compile: Compile = "none"
    kernels: str = "auto"
    collective_timeout: float | None = None


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class CheckpointConfig:
    """A checkpoint every `every` general steps (0: only at the end). The last `keep` stay, and those
    at multiples of `keep_every` (0: none), and the best by the validation metric `best`, which is
    saved when it is measured, and whose weights the run ends with (see checkpoint.selection for
    what counts where a model is pruned or trimmed). `asynchronous`: written by a thread while
    training goes on.
    """

    every: int = 500
    keep: int = 2
    keep_every: int = 0
    best: str | None = None
    asynchronous: bool = True


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class LogConfig:
    """What a run writes about itself, in general steps.

    Attributes:
        every: a record of the metrics.   histograms_every: distributions, and gates as heat maps.
        pictures_every: pictures of data, predictions, attention.
        wandb: project on Weights & Biases to log to as well; None: no.
        stall_minutes: without a finished step until each rank writes the stacks of its threads into
            its log; 0: never.
    """

    every: int = 20
    histograms_every: int = 200
    pictures_every: int = 500
    wandb: str | None = None
    stall_minutes: float = 15.0


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class EvalConfig:
    """Validation during training: every `every` general steps (0: only at the end), on `samples`
    samples (0: all). `top_k`: answers kept after the first token when VQA ranks its answer list, and
    candidates that retrieval ranks again by the matching head. `beams`, `max_length`, `min_length`:
    of captions, lengths in tokens with [CLS] and prompt. `annotators`: of a VQA question; 10 scores
    min(n/3, 1) as the official rule does, None by the annotators' share (`espalier eval
    --annotators`).
    """

    every: int = 0
    samples: int = 0
    batch: int = 64
    top_k: int = 128
    beams: int = 3
    max_length: int = 20
    min_length: int = 5
    annotators: int | None = None


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class RunConfig:
    """One training stage.

    Attributes:
        out: run directory.
        model: preset name, model folder, or inline ModelConfig values of the student (the model
            being trained).
        image_size: pixels; None: the model folder's, or the preset's for the task (domain stages
            of full-size models run at 224, fine-tuning at more).
        loss: weight of each task loss by name; a name left out has weight 1.
        negatives: ITM hard negatives come from the global batch, or from this rank's rows as
            published.
        itc_scaling: "published" divides the gradient of the contrastive features by the number of
            ranks, as the released code does; "exact" is the gradient of the global loss.
        label_smoothing: of captions (published: 0.1 in fine-tuning).
    """

    stage: Stage
    task: TaskName
    out: str
    data: DataConfig
    model: str | dict[str, Any]
    image_size: int | None = None
    seed: int = 0
    initialise: InitialiseConfig = InitialiseConfig()
    teacher: TeacherConfig = TeacherConfig()
    optim: OptimConfig = OptimConfig()
    loss: dict[str, float] = field(default_factory=dict)
    negatives: Literal["global", "local"] = "global"
    itc_scaling: Literal["exact", "published"] = "exact"
    label_smoothing: float = 0.0
    kd: KdConfig = KdConfig()
    prune: PruneConfig | None = None
    trim: TrimConfig | None = None
    engine: EngineConfig = EngineConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()
    eval: EvalConfig = EvalConfig()


def _share(value: int | None, key: str, ranks: int, otherwise: int) -> int:
    if value is None:
        return otherwise
    if value < ranks or value % ranks:
        near = max(1, value // ranks) * ranks
        raise UserError(
            f"{key}: {value} is not a multiple of {ranks} ranks; use {near}, or another number of "
            "ranks"
        )
    return value // ranks


def per_rank(config: RunConfig, ranks: int) -> RunConfig:
    """The configuration with sizes over all ranks (data.global_batch, data.region.global_*) turned
    into sizes of a rank.

    Raises:
        UserError: a size that the ranks do not divide, or only one of the two region sizes.
    """
    data, region = config.data, config.data.region
    if (region.global_images is None) != (region.global_rows is None):
        raise UserError("data.region: give global_images and global_rows together")
    region = replace(
        region,
        images=_share(region.global_images, "data.region.global_images", ranks, region.images),
        rows=_share(region.global_rows, "data.region.global_rows", ranks, region.rows),
    )
    batch = _share(data.global_batch, "data.global_batch", ranks, data.batch)
    return replace(config, data=replace(data, batch=batch, region=region))
