"""Adds trimmers to a trained model, and takes them off."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from models.config import ModelConfig
from models.trim_config import TrimmingConfig
from models.xvlm import XVLM

__all__ = ["default_trimming", "with_trimming", "without_trimming"]

_GUIDED = ("vqa", "nlvr2", "captioning", "grounding")
_PARTS = ("vision.trimmers.", "text.trimmers.")


def default_trimming(config: ModelConfig, **changes: Any) -> TrimmingConfig:
    """Sites for a model: every vision block but the first, and the first fusion layer.

    Guided by the text where an image is seen with one text (VQA, NLVR2, captions, grounding). For
    retrieval and pre-training the vision encoder trims by itself and the fusion layers do not:
    image features can be cached, and texts share an image's keys and values. Text tokens, a few per
    cent of the cost, are left alone.

    Of two streams both are trimmed in front of every fusion layer, in every form but pre-training:
    there the image stream is a third of the cost, and no two texts share an image's states.

    Args:
        changes: fields of `TrimmingConfig` that are to differ.
    """
    pairs = 1 if config.text.pair_heads is None else 2  # the first layer of each image
    one_text = config.form in _GUIDED
    text, streams = config.text, config.image_fusion is not None and config.form != "pretrain"
    values: dict[str, Any] = {
        "vision": tuple(range(1, config.vision.layers)),
        "fusion": tuple(range(min(pairs, config.text.fusion_layers))) if one_text else (),
        "text": (),
        "guided": one_text and config.vision.layers > 1,
    }
    if streams:
        values["fusion"] = tuple(range(text.fusion_layers))
        values["text"] = tuple(range(text.text_layers, text.layers))
    return TrimmingConfig(**(values | changes))


@torch.no_grad()
def with_trimming(model: XVLM, trimming: TrimmingConfig | None = None) -> XVLM:
    """A copy of `model` with fresh trimmers, which keep everything: in evaluation it computes what
    the model computes.

    Works on every form, dense, distilled or pruned; trimmers that were there are replaced. Their
    weights are drawn from torch's global generator.

    Args:
        trimming: None is `default_trimming(model.config)`.

    Returns:
        A model of the same class, device, dtype and train mode, in mode `trimming.mode`. The
        parameters are copies; gate values are not taken along.

    Raises:
        ValueError: when the sites do not fit the model.
    """
    trimming = default_trimming(model.config) if trimming is None else trimming
    made = _copy(model, replace(model.config, trimming=trimming))
    like = next(model.parameters())
    for trimmers in (made.vision.trimmers, made.text.trimmers):
        assert trimmers is not None
        trimmers.to_empty(device=like.device).to(like.dtype).reset()
    return made


@torch.no_grad()
def without_trimming(model: XVLM) -> XVLM:
    """A copy of `model` without its trimmers: the full model that training kept accurate beside."""
    return _copy(model, replace(model.config, trimming=None))


def _copy(model: XVLM, config: ModelConfig) -> XVLM:
    """The model with another `trimming`; its trimmers are left on the meta device."""
    state = {
        key: value.detach().clone()
        for key, value in model.state_dict().items()
        if not key.startswith(_PARTS)
    }
    with torch.device("meta"):  # no weights are drawn
        made = XVLM(config)
    made.load_state_dict(state, strict=False, assign=True)
    return made.train(model.training)
