"""Multiply-accumulates of one row of a `Workload`, from the configuration alone, and what each
gated unit adds to them.
"""

from __future__ import annotations

from models.config import PAIRED, ModelConfig
from models.pruning.surgery import widths, with_widths
from models.summary import generation_macs, head_macs, text_macs, vision_macs
from train.evaluation.macs import count_macs
from train.evaluation.workload import PROMPT_TOKENS, Workload

__all__ = ["macs_per_unit", "workload_macs"]


def workload_macs(config: ModelConfig, work: Workload) -> int:
    """What `train.evaluation.workload.calls_of` makes a model of this shape compute for one row."""
    if config.form == "vqa":
        counted = count_macs(
            config, text_tokens=work.text_tokens, top_k=min(work.top_k, work.answers)
        )
        return counted["total"]
    vision, image_tokens = vision_macs(config), config.vision.output_tokens
    if config.form == "captioning":
        return vision + generation_macs(
            config, PROMPT_TOKENS, work.caption_tokens, work.beams, image_tokens
        )
    images = 2 if config.form in PAIRED else 1
    text, fusion = text_macs(config, work.text_tokens, image_tokens)
    return images * vision + text + fusion + head_macs(config, work.text_tokens)


def macs_per_unit(config: ModelConfig, work: Workload) -> dict[str, float]:
    """Slot name -> multiply-accumulates of one row that removing one of its units saves.

    Exact: counts are straight lines in every width. Heads of a pair that shares keys and values
    (NLVR2) save half a shared row each, as with parameters.
    """
    whole, units, found = workload_macs(config, work), widths(config), {}
    pairs = config.text.pair_heads
    for name, count in units.items():
        modality, layer, kind = name.split(".")
        changes, shared = {name: 0}, None
        if modality == "fusion" and kind == "cross_heads" and pairs is not None:
            pair = int(layer) // 2
            changes = {f"fusion.{2 * pair + turn}.cross_heads": 0 for turn in (0, 1)}
            count, shared = sum(units[one] for one in changes), {pair: 0}
        without = workload_macs(with_widths(config, changes, shared), work)
        found[name] = (whole - without) / count if count else 0.0
    return found
