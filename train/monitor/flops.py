"""What a training step costs in floating-point operations, and what devices can do at most.

MFU (2204.02311, appendix B) is the work that the models ask for over the work that the device could
have done in the time: operations that are done again under activation checkpointing, and those of
the losses, do not count.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

import torch

from models.config import ModelConfig
from models.summary import decoder_macs, head_macs, text_macs, vision_macs
from train.config import RunConfig

__all__ = ["StepCost", "device_peak", "peak_flops", "step_cost"]

# Dense peaks in TFLOP/s (without sparsity) from the makers' public data sheets: half precision with
# fp32 accumulation, TF32, fp32. None: the device does not have it. Tried in order; the pattern is
# searched in the device's name.
_PEAKS: tuple[tuple[str, float | None, float | None, float], ...] = (
    (r"\bGB200\b", 2500, 1250, 80),
    (r"\bB200\b", 2250, 1125, 75),
    (r"\bH200 NVL\b", 835.5, 417.7, 60),
    (r"\bH200\b", 989.4, 494.7, 67),
    (r"\bGH200\b", 989.4, 494.7, 67),
    (r"\bH100 NVL\b", 835.5, 417.7, 60),
    (r"\bH100 PCIe\b", 756.5, 378, 51),
    (r"\bH100\b", 989.4, 494.7, 67),
    (r"\bA100\b", 312, 156, 19.5),
    (r"\bA40\b", 149.7, 74.8, 37.4),
    (r"\bA30\b", 165, 82, 10.3),
    (r"\bA10\b", 125, 62.5, 31.2),
    (r"\bL40S\b", 362, 183, 91.6),
    (r"\bL40\b", 181, 90.5, 90.5),
    (r"\bL4\b", 121, 60, 30.3),
    (r"\bRTX 6000 Ada\b", 364.2, 182.1, 91.1),
    (r"\bRTX A6000\b", 154.8, 77.4, 38.7),
    (r"\bRTX 4090\b", 165.2, 82.6, 82.6),
    (r"\bRTX 3090\b(?! Ti)", 71, 35.6, 35.6),
    (r"\bV100S\b", 130, None, 16.4),
    (r"\bV100-(SXM2|SXM3)", 125, None, 15.7),
    (r"\bV100-PCIE\b", 112, None, 14),
    (r"\bT4\b", 65, None, 8.1),
    (r"\bMI300X\b", 1307.4, 653.7, 163.4),
)
_NO_BF16 = re.compile(r"\b(V100S?|T4)\b")  # their tensor cores take fp16 only


def peak_flops(device: str, precision: str, tf32: bool = False) -> float | None:
    """Dense peak in FLOP/s of a device by its name, or None where the table does not have it.

    Args:
        device: as torch.cuda.get_device_name says it. A share of a device (MIG) is not in the table.
        precision: "fp32", "bf16" or "fp16", of the matrix products.
        tf32: fp32 products may go through TF32.
    """
    if "MIG" in device or (precision == "bf16" and _NO_BF16.search(device)):
        return None
    for pattern, half, tensor, single in _PEAKS:
        if re.search(pattern, device, re.IGNORECASE):
            value = half if precision != "fp32" else (tensor if tf32 and tensor else single)
            return None if value is None else value * 1e12
    return None


def device_peak(device: torch.device, precision: str) -> float | None:
    """`peak_flops` of a device here; None for a CPU."""
    if device.type != "cuda":
        return None
    tf32 = bool(torch.backends.cuda.matmul.allow_tf32)
    return peak_flops(torch.cuda.get_device_name(device), precision, tf32)


@dataclass(frozen=True)
class StepCost:
    """FLOPs of one micro-batch on one rank: the student's forward and backward (stage trim: of both
    passes), and the teacher's forward. `region` is None for runs without region steps.
    """

    general: float
    region: float | None = None

    def of(self, general: int, region: int) -> float:
        """FLOPs of so many micro-batches of each kind."""
        return general * self.general + region * (self.region or 0.0)

    def expected(self, probability: float) -> float:
        """FLOPs of a general micro-batch and the region ones that fall on it on average."""
        return self.general + probability * (self.region or 0.0)


def step_cost(config: RunConfig, student: ModelConfig, teacher: ModelConfig | None) -> StepCost:
    """The cost of a run's steps; `config.data` holds the sizes of a rank (`per_rank`).

    Backward costs twice the forward. Counted are matrix products of the models (models.summary).
    Stage trim makes two passes: the trimmed one masks, so it computes everything, and the full one
    has a backward only where its losses count. Trimmers themselves are small and left out.
    """
    trim = config.trim

    def cost(region: bool) -> float:
        full = _forward(config, student, region, boxes=True)
        macs = 3 * full
        if trim is not None:
            macs = 3 * (full + _guided_vision(config, student))
            macs += 3 * full if trim.full_weight else full if trim.distil_weight else 0
        if teacher is not None:
            macs += _forward(config, teacher, region, boxes=False)
        return 2.0 * macs

    regions = config.task == "pretrain" and config.data.region.probability > 0
    return StepCost(cost(False), cost(True) if regions else None)


def _forward(config: RunConfig, model: ModelConfig, region: bool, boxes: bool) -> int:
    """MACs of one model's passes over a micro-batch."""
    data = config.data
    text, fusion = text_macs(model, data.max_tokens, model.vision.output_tokens)
    if config.task != "pretrain":
        rows, pictures = data.batch * data.rows_per_image, 2 if config.task == "nlvr2" else 1
        # Retrieval matches each text with its own picture and two others, in one pass each.
        passes = 3 if config.task == "retrieval" else 1
        row = text + passes * fusion + head_macs(model, data.max_tokens)
        if passes == 3:
            row += 2 * _mlp_head(model, 2)
        answer = decoder_macs(model, data.max_answer_tokens, data.max_tokens)
        return pictures * data.batch * vision_macs(model) + rows * (row + answer)
    rows = data.region.rows if region else data.batch
    images = _region_vision(config, model) if region else rows * vision_macs(model)
    # Each head once, without the box head, and with ITM on three pairs a row.
    box = _mlp_head(model, 4)
    heads = head_macs(model, data.max_tokens, data.mlm_max) - box + 2 * _mlp_head(model, 2)
    # Clean and masked text; fusion of a matching and two other pairs, and of the masked text.
    total = images + rows * (2 * text + 4 * fusion + heads)
    return total + rows * (fusion + box) if region and boxes else total


def _mlp_head(model: ModelConfig, outputs: int) -> int:
    width = model.text.width
    return 2 * width * width * model.fused_tokens + 2 * width * outputs


def _region_vision(config: RunConfig, model: ModelConfig) -> int:
    """Layers before the last `region_layers` see pictures, those see rows and pictures."""
    region, vision = config.data.region, model.vision
    above = _blocks_from(model, max(0, vision.layers - vision.region_layers))
    return region.images * vision_macs(model) + region.rows * above


def _blocks_from(model: ModelConfig, first: int) -> int:
    """MACs of the vision blocks from `first` on, for one picture."""
    vision = model.vision
    early = replace(vision, heads=vision.heads[:first], ffn=vision.ffn[:first])
    return vision_macs(model) - vision_macs(replace(model, vision=early, trimming=None))


def _guided_vision(config: RunConfig, model: ModelConfig) -> int:
    """What a trimmed pass computes more than a full one: from the first guided site on, each text has
    a copy of its picture.
    """
    trimming, data = model.trimming, config.data
    if trimming is None or not trimming.guided:
        return 0
    pictures = 2 if config.task == "nlvr2" else 1
    more = pictures * data.batch * (data.rows_per_image - 1)
    return more * _blocks_from(model, trimming.vision[0])
