"""A model as graphs of tensors: what each part takes and gives, for runtimes without this package.

    images ---- image_encoder -- image_states --+
    text_ids -- text_encoder --- text_states ---+-- fusion -- question_states, logits or a box
                                                              question_states -- decoder (vqa)
    captioning: image_states -- decoder_start (the prompt) -- decoder_step, token by token

Pictures come as uint8 and are normalised inside the graph, so nobody can do it twice or not at all.
Shapes are numbers or names; a name is the same size wherever it stands in a graph.

A trimmed model is written in mode "bucket", whose shapes do not depend on the input. Where its
trimmers want to know the text, text_encoder runs first, and image_encoder takes text_states as well
(captioning: the prompt, as text_ids).

Shape legend: B rows, L tokens, P image tokens, D width, A answers a question, La their tokens, V
vocabulary, H heads, d head size, T tokens so far.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from models.bert import DecoderCache
from models.config import HEADS, PAIRED
from train.export.ports import Graph, Port, Shape
from train.export.trimmed import check_trimming, image_tokens, read_tokens

if TYPE_CHECKING:
    from models.config import ModelConfig
    from models.xvlm import XVLM

__all__ = ["graphs_of"]


def graphs_of(model: XVLM) -> list[Graph]:
    """The graphs of a model's form, in the order in which they are run. A trimmed model is put into
    mode "bucket".

    Raises:
        ValueError: on a two-stream model with an answer decoder, or trimmers of which static shapes
            cannot be had.
    """
    config, form = model.config, model.config.form
    if config.image_fusion is not None and config.decoder is not None:
        raise ValueError(
            f"{config.name}: the answer decoder of two streams (image_fusion) reads pooled tokens, "
            "for which there is no graph; export another form, or the folder as it is (safetensors)"
        )
    if config.trimming is not None:
        check_trimming(config)
        model.set_trimming("bucket")
    image = _image_encoder(model)
    if form == "captioning":
        return [image, *_caption_decoder(model)]
    text, fusion = _text_encoder(model), _fusion(model)
    found = [text, image, fusion] if model.guided else [image, text, fusion]
    if config.decoder is not None:
        found.append(_answer_decoder(model))
    return found


# --- encoders -------------------------------------------------------------------------------------


class _ImageEncoder(nn.Module):
    """images (B, 3, S, S) uint8 -> states (B, P, D) and, where the form has one, a feature (B, E)."""

    mean: Tensor
    factor: Tensor

    def __init__(self, model: XVLM) -> None:
        super().__init__()
        self.model, self.projects = model, "image_projection" in HEADS[model.config.form]
        mean, std = (
            torch.tensor(values).view(1, 3, 1, 1)
            for values in (model.config.image_mean, model.config.image_std)
        )
        self.register_buffer("mean", mean * 255)
        self.register_buffer("factor", 1 / (std * 255))

    def encode(self, images: Tensor, guide: Tensor | None) -> tuple[Tensor, ...]:
        pixels = (images.float() - self.mean) * self.factor
        states = self.model.encode_image(pixels, guide=guide).last
        return (states, self.model.image_feature(states)) if self.projects else (states,)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        return self.encode(images, None)


class _GuidedImageEncoder(_ImageEncoder):
    """images (B, 3, S, S) uint8, text_states (B, L, D) -> states (B, P, D) and, where the form has one,
    a feature (B, E). The text chooses which patches stay.
    """

    def forward(self, images: Tensor, text_states: Tensor) -> tuple[Tensor, ...]:
        return self.encode(images, text_states[:, 0])


class _PromptedImageEncoder(_ImageEncoder):
    """images (B, 3, S, S) uint8, text_ids (B, L) the prompt without [SEP] -> states (B, P, D). The
    prompt chooses which patches stay.
    """

    def forward(self, images: Tensor, text_ids: Tensor) -> tuple[Tensor, ...]:
        seen = torch.ones_like(text_ids, dtype=torch.bool)
        return self.encode(images, self.model.encode_text(text_ids, seen).last[:, 0])


def _image_encoder(model: XVLM) -> Graph:
    config = model.config
    side = config.vision.image_size
    ports = [Port("images", ("batch", 3, side, side), "uint8")]
    kind = _ImageEncoder
    if model.guided and config.form == "captioning":
        kind = _PromptedImageEncoder
        ports.append(Port("text_ids", ("batch", "tokens"), "int64"))
    elif model.guided:
        kind = _GuidedImageEncoder
        ports.append(Port("text_states", ("batch", "tokens", config.text.width)))
    module = kind(model)
    outputs = ("image_states", "image_feature") if module.projects else ("image_states",)
    return Graph("image_encoder", module, tuple(ports), outputs, config.text.vocab_size)


class _TextEncoder(nn.Module):
    """text_ids (B, L), text_mask (B, L) -> states (B, L, D) and, with a projection, (B, E)."""

    def __init__(self, model: XVLM) -> None:
        super().__init__()
        self.model, self.projects = model, "text_projection" in HEADS[model.config.form]

    def forward(self, text_ids: Tensor, text_mask: Tensor) -> tuple[Tensor, ...]:
        states = self.model.encode_text(text_ids, text_mask).last
        return (states, self.model.text_feature(states)) if self.projects else (states,)


def _text_encoder(model: XVLM) -> Graph:
    module = _TextEncoder(model)
    outputs = ("text_states", "text_feature") if module.projects else ("text_states",)
    rows: Shape = ("batch", "tokens")
    ports = (Port("text_ids", rows, "int64"), Port("text_mask", rows, "bool"))
    return Graph("text_encoder", module, ports, outputs, model.config.text.vocab_size)


# Method of the model -> name of its output. Forms have the ones whose head they have.
_RESULTS = {
    "itm_head": ("match_logits", "match_logits"),
    "bbox_head": ("predict_box", "box"),
    "cls_head": ("truth_logits", "truth_logits"),
    "ta_head": ("assignment_logits", "assignment_logits"),
}


class _Fusion(nn.Module):
    """text_states (B, L, D), text_mask, image_states (one or two of (B, P, D)) -> what the heads of
    the form make of the fused text; the states themselves where a decoder goes on.
    """

    def __init__(self, model: XVLM) -> None:
        super().__init__()
        self.model = model
        self.heads = [name for name in HEADS[model.config.form] if name in _RESULTS]

    def forward(self, text_states: Tensor, text_mask: Tensor, *image_states: Tensor) -> Any:
        images = image_states if self.model.config.form in PAIRED else image_states[0]
        fused = self.model.fuse(text_states, text_mask, images).last
        if not self.heads:
            return (fused,)
        return tuple(getattr(self.model, _RESULTS[head][0])(fused) for head in self.heads)


def _fusion(model: XVLM) -> Graph:
    module, config = _Fusion(model), model.config
    images: Shape = ("batch", image_tokens(config), config.vision.width)
    names = ("left_states", "right_states") if config.form in PAIRED else ("image_states",)
    ports = (
        Port("text_states", ("batch", "tokens", config.text.width)),
        Port("text_mask", ("batch", "tokens"), "bool"),
        *(Port(name, images) for name in names),
    )
    outputs = tuple(_RESULTS[head][1] for head in module.heads) or ("question_states",)
    return Graph("fusion", module, ports, outputs, config.text.vocab_size)


# --- decoders -------------------------------------------------------------------------------------


class _AnswerDecoder(nn.Module):
    """Scores A candidates of each question, [CLS] answer [SEP] padded; see `evaluation.vqa`.

    first_log_p (B, V): log-probability of every token as an answer's first, which makes a shortlist.
    log_likelihood (B, A): of the whole sequences, [SEP] included; the largest is the answer.
    """

    def __init__(self, model: XVLM) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, answer_ids: Tensor, answer_mask: Tensor, question_states: Tensor, text_mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        shape = answer_ids.shape[:2]
        ids, mask = answer_ids.flatten(0, 1), answer_mask.flatten(0, 1)
        logits = self.model.decode(ids[:, :-1], mask[:, :-1], question_states, text_mask).logits
        log_p = logits.float().log_softmax(-1)
        own = log_p.gather(2, ids[:, 1:, None]).squeeze(2) * mask[:, 1:]
        return log_p.unflatten(0, shape)[:, 0, 0], own.sum(1).unflatten(0, shape)


def _answer_decoder(model: XVLM) -> Graph:
    config = model.config
    rows: Shape = ("batch", "answers", "answer_tokens")
    ports = (
        Port("answer_ids", rows, "int64"),
        Port("answer_mask", rows, "bool"),
        Port("question_states", ("batch", "tokens", config.text.width)),
        Port("text_mask", ("batch", "tokens"), "bool"),
    )
    outputs = ("first_log_p", "log_likelihood")
    return Graph("decoder", _AnswerDecoder(model), ports, outputs, config.text.vocab_size)


def _cached(config: ModelConfig) -> tuple[list[str], list[str], dict[str, int]]:
    """Names of the tensors of self- and of cross-attention that decoding keeps, and their heads.

    An attention without heads keeps nothing.
    """
    text, own, cross, heads = config.text, [], [], {}
    for layer, count in enumerate(text.heads):
        names = [f"{kind}_{layer}" for kind in ("keys", "values")] if count else []
        own += names
        heads |= dict.fromkeys(names, count)
    for place, count in enumerate(text.cross_heads):
        layer = text.text_layers + place
        names = [f"image_{kind}_{layer}" for kind in ("keys", "values")] if count else []
        cross += names
        heads |= dict.fromkeys(names, count)
    return own, cross, heads


def _held(cache: DecoderCache) -> tuple[list[Tensor], list[Tensor]]:
    """What a cache holds, self- and cross-attention, in the order of `_cached`."""
    own = [tensor for layer in cache.layers for tensor in layer.own.held or ()]
    return own, [tensor for layer in cache.layers for tensor in layer.cross.held or ()]


class _CaptionStart(nn.Module):
    """text_ids (B, L) the prompt without [SEP], image_states (B, P, D) -> next_logits (B, V), and the
    keys and values that `decoder_step` goes on with: (B, H, L, d) each, of the image (B, H, P, d).
    """

    def __init__(self, model: XVLM) -> None:
        super().__init__()
        self.model = model

    def forward(self, text_ids: Tensor, image_states: Tensor) -> tuple[Tensor, ...]:
        cache, seen = self.model.new_cache(), torch.ones_like(text_ids, dtype=torch.bool)
        # With a mask the causal order is a tensor too, not a constant of the traced length.
        logits = self.model.decode(text_ids, seen, image_states, None, cache=cache).logits
        own, cross = _held(cache)
        return (logits[:, -1].float(), *own, *cross)


class _CaptionStep(nn.Module):
    """text_ids (B, T + 1): all tokens so far, of which only the last is new -> next_logits (B, V),
    and the longer keys and values, in the order in which they came. Those of the image stay.
    """

    def __init__(self, model: XVLM) -> None:
        super().__init__()
        self.model = model

    def forward(self, text_ids: Tensor, *kept: Tensor) -> tuple[Tensor, ...]:
        text, tensors = self.model.config.text, list(kept)
        cache = self.model.new_cache()
        for layer, heads in zip(cache.layers, text.heads, strict=True):
            if heads:
                layer.own.held = (tensors.pop(0), tensors.pop(0))
        for layer, heads in zip(cache.layers[text.text_layers :], text.cross_heads, strict=True):
            if heads:
                layer.cross.held = (tensors.pop(0), tensors.pop(0))
            layer.seen = (None, None)  # what trimmers left of the image is held
        cache.length = text_ids.shape[1] - 1
        # Nobody reads the image's states: their keys and values are held.
        states = text_ids.new_zeros(text_ids.shape[0], 1, self.model.config.vision.width).float()
        logits = self.model.decode(text_ids[:, -1:], None, states, None, cache=cache).logits
        return (logits[:, -1].float(), *_held(cache)[0])


def _caption_decoder(model: XVLM) -> list[Graph]:
    config = model.config
    own, cross, heads = _cached(config)
    size, first = config.text.head_dim, config.text.text_layers
    read = read_tokens(config)
    vocabulary = config.text.vocab_size
    start = Graph(
        "decoder_start",
        _CaptionStart(model),
        (
            Port("text_ids", ("batch", "tokens"), "int64"),
            Port("image_states", ("batch", image_tokens(config), config.vision.width)),
        ),
        ("next_logits", *own, *cross),
        vocabulary,
    )
    step = Graph(
        "decoder_step",
        _CaptionStep(model),
        (
            Port("text_ids", ("batch", "past+1"), "int64"),
            *(Port(name, ("batch", heads[name], "past", size)) for name in own),
            *(
                Port(name, ("batch", heads[name], read[int(name.rpartition("_")[2]) - first], size))
                for name in cross
            ),
        ),
        # A graph cannot give a tensor the name that one of its inputs has.
        ("next_logits", *(f"longer_{name}" for name in own)),
        vocabulary,
    )
    return [start, step]
