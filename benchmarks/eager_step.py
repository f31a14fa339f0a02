"""The pre-training distillation step as the paper's algorithm reads, run eagerly: every attention
map of both models is materialised and kept.

It is what `distill_step.py` measures the project's step against, and a second opinion on its losses:
nothing of train/losses computes here, only the draw of hard negatives is shared. Weights are those of
the models' own modules; attention, passes and losses are written out again.

General batches of presets without pruning, gates and stochastic depth.
Source: EfficientVLM (2210.07795) section 3; its published GeneralDistill step, without the test for
masked scores that does nothing to probabilities.
Shape legend: B rows, N or L tokens, K keys, H heads, P image tokens, D width.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data_pipeline.batches import PretrainBatch
from models.attention import Attention
from models.layers import BertLayer, ViTBlock
from models.xvlm import XVLM
from train.losses import vl

__all__ = ["EagerStep", "Outputs", "Stack", "losses", "run", "total", "vision"]

_MASKED = -10000.0


@dataclass
class Stack:
    """What one pass through some layers computed, all of it.

    Attributes:
        states: the input and the output of each layer, (B, N, D).
        maps: self-attention of each layer, (B, H, N, N).   cross: of those layers that have it.
    """

    states: list[Tensor]
    maps: list[Tensor]
    cross: list[Tensor]

    @property
    def last(self) -> Tensor:
        return self.states[-1]


@dataclass
class Outputs:
    """Everything one model computed on a batch."""

    image: Stack
    text: Stack
    positive: Stack
    negative: Stack
    masked: Stack
    to_text: Tensor  # (B, B), similarities of images to texts
    to_image: Tensor
    match_logits: Tensor  # (3B, 2)
    mlm_logits: Tensor  # (B, M, V)
    negatives: vl.HardNegatives


# --- the models -----------------------------------------------------------------------------------


def attention(
    layer: Attention, x: Tensor, context: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """x (B, N, D) attends to context (B, K, .), mask (B, K) -> (B, N, D) and the map (B, H, N, K)."""

    def heads(projected: Tensor) -> Tensor:
        return projected.unflatten(-1, (layer.heads, layer.head_dim)).transpose(1, 2)

    q, k, v = heads(layer.q(x)), heads(layer.k(context)), heads(layer.v(context))
    scores = (q * layer.head_dim**-0.5) @ k.transpose(-1, -2)
    if mask is not None:
        scores = scores + (1.0 - mask.float())[:, None, None, :] * _MASKED
    probabilities = scores.softmax(dim=-1)
    mixed = F.dropout(probabilities, layer.dropout, layer.training) @ v
    return layer.out(mixed.transpose(1, 2).flatten(2)), probabilities


def vision(model: XVLM, images: Tensor) -> Stack:
    """(B, 3, S, S) uint8 -> all states and maps; the last state is before the final norm."""
    config = model.config
    mean, std = (
        torch.tensor(values, device=images.device).view(1, 3, 1, 1)
        for values in (config.image_mean, config.image_std)
    )
    x = model.vision.embeddings((images.float() / 255 - mean) / std)
    done = Stack([x], [], [])
    for block in model.vision.blocks:
        assert isinstance(block, ViTBlock)
        normed = block.norm1(x)
        mixed, probabilities = attention(block.attention, normed, normed, None)
        x = x + mixed
        x = x + block.ffn(block.norm2(x))
        done.states.append(x)
        done.maps.append(probabilities)
    return done


def bert(layers: Iterable[nn.Module], x: Tensor, mask: Tensor, image: Tensor | None) -> Stack:
    """x (B, L, D), mask (B, L), image (B, P, .) for layers with cross-attention."""
    done = Stack([x], [], [])
    for layer in layers:
        assert isinstance(layer, BertLayer)
        mixed, probabilities = attention(layer.attention, x, x, mask)
        x = layer.attention_norm(x + layer.dropout(mixed))
        done.maps.append(probabilities)
        if layer.has_cross:
            assert image is not None
            mixed, probabilities = attention(layer.cross_attention, x, image, None)
            x = layer.cross_norm(x + layer.dropout(mixed))
            done.cross.append(probabilities)
        x = layer.ffn_norm(x + layer.dropout(layer.ffn(x)))
        done.states.append(x)
    return done


def run(model: XVLM, batch: PretrainBatch, draw: torch.Generator | vl.HardNegatives) -> Outputs:
    """All passes of one model over a general batch.

    Args:
        draw: of the hard negatives by this model's similarities, or those already drawn.
    """
    layers, first = list(model.text.layers), model.config.text.text_layers
    image = vision(model, batch.images)
    pixels = model.vision.norm(image.last)
    text = bert(layers[:first], model.text.embeddings(batch.text_ids), batch.text_mask, None)
    seen, read = model.image_projection.linear(pixels[:, 0]), text.last[:, 0]
    seen = F.normalize(seen.float(), dim=-1)
    said = F.normalize(model.text_projection.linear(read).float(), dim=-1)
    to_text = seen @ said.t() / model.temperature()
    to_image = said @ seen.t() / model.temperature()
    if isinstance(draw, torch.Generator):
        found = vl.Similarities(to_text.float(), to_image.float())
        draw = vl.hard_negatives(found, draw)

    words, mask = text.last, batch.text_mask
    positive = bert(layers[first:], words, mask, pixels)
    negative = bert(
        layers[first:],
        torch.cat([words, words[draw.text_for_image]]),
        torch.cat([mask, mask[draw.text_for_image]]),
        torch.cat([pixels[draw.image_for_text], pixels]),
    )
    pairs = torch.cat([positive.last[:, :1], negative.last[:, :1]])
    masked = bert(layers, model.text.embeddings(batch.mlm_ids), mask, pixels)
    return Outputs(
        image,
        text,
        positive,
        negative,
        masked,
        to_text,
        to_image,
        match_logits=model.itm_head(pairs),
        mlm_logits=model.mlm_logits(masked.last, batch.mlm_positions),
        negatives=draw,
    )


# --- the losses -----------------------------------------------------------------------------------


def hidden(student: Stack, teacher: Stack, last: bool = True) -> Tensor:
    """Sum over student states i of the mean squared error to the teacher's state k i."""
    count, factor = len(student.maps), len(teacher.maps) // len(student.maps)
    states = range(count + 1 if last else count)
    errors = [F.mse_loss(student.states[i], teacher.states[factor * i]) for i in states]
    return torch.stack(errors).sum()


def maps(student: Stack, teacher: Stack) -> Tensor:
    """Sum over student layers i of keys * mean squared error to the map of layer k (i + 1) - 1."""
    factor = len(teacher.maps) // len(student.maps)
    errors = [
        ours.shape[-1] * F.mse_loss(ours, teacher.maps[factor * (i + 1) - 1])
        for i, ours in enumerate(student.maps)
    ]
    return torch.stack(errors).sum()


def kl(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(teacher || student) of logits, averaged over rows."""
    log_p = student.flatten(0, -2).float().log_softmax(-1)
    return F.kl_div(log_p, teacher.flatten(0, -2).float().softmax(-1), reduction="batchmean")


def losses(ours: Outputs, theirs: Outputs, batch: PretrainBatch) -> dict[str, Tensor]:
    """Every raw term, by the names of the project's pre-training task."""
    rows, device = batch.rows, batch.images.device
    own = torch.arange(rows, device=device)
    match = torch.cat([torch.ones_like(own), torch.zeros_like(own), torch.zeros_like(own)])
    fusion = [(getattr(ours, name), getattr(theirs, name)) for name in _FUSION]
    return {
        "itc": (F.cross_entropy(ours.to_text, own) + F.cross_entropy(ours.to_image, own)) / 2,
        "itm": F.cross_entropy(ours.match_logits, match),
        "mlm": F.cross_entropy(
            ours.mlm_logits.flatten(0, 1), batch.mlm_labels.flatten(), ignore_index=-100
        ),
        "kd_itm": kl(ours.match_logits, theirs.match_logits),
        "kd_mlm": kl(ours.mlm_logits, theirs.mlm_logits),
        "kd_image_hidden": hidden(ours.image, theirs.image, last=False),
        "kd_image_attention": maps(ours.image, theirs.image),
        "kd_text_hidden": hidden(ours.text, theirs.text),
        "kd_text_attention": maps(ours.text, theirs.text),
        "kd_fusion_hidden": torch.stack([hidden(*pair) for pair in fusion]).sum(),
        "kd_fusion_attention": torch.stack([maps(*pair) for pair in fusion]).sum(),
    }


_FUSION = ("positive", "negative", "masked")


def total(terms: dict[str, Tensor]) -> Tensor:
    """0.6 of the task losses and 0.4 of the distillation terms, image states at a tenth."""
    task = terms["itc"] + terms["itm"] + terms["mlm"]
    kd = [terms[name] for name in terms if name.startswith("kd_") and name != "kd_image_hidden"]
    return 0.6 * task + 0.4 * (torch.stack(kd).sum() + 0.1 * terms["kd_image_hidden"])


class EagerStep:
    """One optimizer step after another: forward of both models, backward, clipping, AdamW.

    Args:
        dtype: of autocast for both models, None computes in fp32. float16 with a dynamic loss scale is
            what the published code trains in.
        optimizer: over the student's parameters.   clip: of the global gradient norm.
    """

    def __init__(
        self,
        student: XVLM,
        teacher: XVLM,
        optimizer: torch.optim.Optimizer,
        dtype: torch.dtype | None,
        clip: float = 1.0,
    ) -> None:
        self.student, self.teacher = student, teacher.eval().requires_grad_(False)
        self.optimizer, self.clip = optimizer, clip
        self.device = next(student.parameters()).device
        self._autocast: dict[str, Any] | None = None
        if dtype is not None:
            self._autocast = {"device_type": self.device.type, "dtype": dtype}
        self._scaler = torch.amp.GradScaler(self.device.type, enabled=dtype == torch.float16)

    def forward(self, batch: PretrainBatch, generator: torch.Generator) -> dict[str, Tensor]:
        """The raw terms of a batch, with negatives drawn once by the student."""
        with nullcontext() if self._autocast is None else torch.autocast(**self._autocast):
            ours = run(self.student, batch, generator)
            with torch.no_grad():
                theirs = run(self.teacher, batch, ours.negatives)
            return losses(ours, theirs, batch)

    def __call__(self, batch: PretrainBatch, generator: torch.Generator) -> dict[str, Tensor]:
        """Trains on one batch and returns its raw terms and "total", detached."""
        terms = self.forward(batch, generator)
        loss = total(terms)
        self.optimizer.zero_grad()
        self._scaler.scale(loss).backward()
        self._scaler.unscale_(self.optimizer)
        nn.utils.clip_grad_norm_(self.student.parameters(), self.clip)
        self._scaler.step(self.optimizer)
        self._scaler.update()
        return {name: value.detach() for name, value in (terms | {"total": loss}).items()}
