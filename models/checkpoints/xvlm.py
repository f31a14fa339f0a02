"""Published X-VLM / EfficientVLM (CLIP variant) checkpoints: key names both ways, and their shape.

Covers the pre-training form, the retrieval and grounding forms (the same without the masked-token
head and without "bert." in the names) and the visual-question-answering form.
Source: https://github.com/zengyan-97/X-VLM and https://github.com/swaggy-TN/EfficientVLM.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from models.checkpoints.conversion import ConversionReport, load_converted
from models.config import DecoderConfig, ModelConfig, TextConfig, VisionConfig
from models.vision import resize_positions
from models.xvlm import XVLM

__all__ = ["config_of", "from_published", "load", "to_published"]

# (published, ours); a layer number is written {i} on both sides
_VISION = [
    ("vision_encoder.class_embedding", "vision.embeddings.class_token"),
    ("vision_encoder.patch_embed.{p}", "vision.embeddings.patch.proj.{p}"),
    ("vision_encoder.pos_embed.weight", "vision.embeddings.position"),
    ("vision_encoder.pre_layrnorm.{p}", "vision.embeddings.norm.{p}"),
    ("vision_encoder.post_layernorm.{p}", "vision.norm.{p}"),
    ("vision_encoder.encoder.layers.{i}.self_attn.q_proj.{p}", "vision.blocks.{i}.attention.q.{p}"),
    ("vision_encoder.encoder.layers.{i}.self_attn.k_proj.{p}", "vision.blocks.{i}.attention.k.{p}"),
    ("vision_encoder.encoder.layers.{i}.self_attn.v_proj.{p}", "vision.blocks.{i}.attention.v.{p}"),
    (
        "vision_encoder.encoder.layers.{i}.self_attn.out_proj.{p}",
        "vision.blocks.{i}.attention.out.{p}",
    ),
    ("vision_encoder.encoder.layers.{i}.layer_norm1.{p}", "vision.blocks.{i}.norm1.{p}"),
    ("vision_encoder.encoder.layers.{i}.layer_norm2.{p}", "vision.blocks.{i}.norm2.{p}"),
    ("vision_encoder.encoder.layers.{i}.mlp.fc1.{p}", "vision.blocks.{i}.ffn.fc1.{p}"),
    ("vision_encoder.encoder.layers.{i}.mlp.fc2.{p}", "vision.blocks.{i}.ffn.fc2.{p}"),
]
_LAYER = [
    ("attention.self.query.{p}", "attention.q.{p}"),
    ("attention.self.key.{p}", "attention.k.{p}"),
    ("attention.self.value.{p}", "attention.v.{p}"),
    ("attention.output.dense.{p}", "attention.out.{p}"),
    ("attention.output.LayerNorm.{p}", "attention_norm.{p}"),
    ("crossattention.self.query.{p}", "cross_attention.q.{p}"),
    ("crossattention.self.key.{p}", "cross_attention.k.{p}"),
    ("crossattention.self.value.{p}", "cross_attention.v.{p}"),
    ("crossattention.output.dense.{p}", "cross_attention.out.{p}"),
    ("crossattention.output.LayerNorm.{p}", "cross_norm.{p}"),
    ("intermediate.dense.{p}", "ffn.fc1.{p}"),
    ("output.dense.{p}", "ffn.fc2.{p}"),
    ("output.LayerNorm.{p}", "ffn_norm.{p}"),
]
_EMBEDDINGS = [
    ("word_embeddings.weight", "word.weight"),
    ("position_embeddings.weight", "position.weight"),
    ("token_type_embeddings.weight", "token_type.weight"),
    ("LayerNorm.{p}", "norm.{p}"),
]
_TOKEN_HEAD = [
    ("cls.predictions.bias", "bias"),
    ("cls.predictions.transform.dense.{p}", "dense.{p}"),
    ("cls.predictions.transform.LayerNorm.{p}", "norm.{p}"),
]
_HEADS = [
    ("temp", "contrastive.value"),
    ("vision_proj.{p}", "image_projection.linear.{p}"),
    ("text_proj.{p}", "text_projection.linear.{p}"),
    ("itm_head.0.{p}", "itm_head.linear.{p}"),
    ("itm_head.1.{p}", "itm_head.norm.{p}"),
    ("itm_head.3.{p}", "itm_head.output.{p}"),
    ("bbox_head.0.{p}", "bbox_head.linear.{p}"),
    ("bbox_head.1.{p}", "bbox_head.norm.{p}"),
    ("bbox_head.3.{p}", "bbox_head.output.{p}"),
]
_IGNORED = re.compile(
    r"(^|\.)(position_ids|cls\.predictions\.decoder\.(weight|bias))$|^l0_module\.|^(idx|image|text)_queue"
)


def _stack(published: str, ours: str) -> list[tuple[str, str]]:
    """Names of one BERT stack."""
    layers = [(f"{published}encoder.layer.{{i}}.{a}", f"{ours}layers.{{i}}.{b}") for a, b in _LAYER]
    return [
        (f"{published}embeddings.{a}", f"{ours}embeddings.{b}") for a, b in _EMBEDDINGS
    ] + layers


def _names(bert_prefix: str) -> list[tuple[str, str]]:
    return [
        *_VISION,
        *_HEADS,
        *_stack(f"text_encoder.{bert_prefix}", "text."),
        *((f"text_encoder.{a}", f"mlm_head.{b}") for a, b in _TOKEN_HEAD),
        *_stack("text_decoder.bert.", "decoder."),
        *((f"text_decoder.{a}", f"decoder.head.{b}") for a, b in _TOKEN_HEAD),
    ]


def _compile(names: Iterable[tuple[str, str]]) -> list[tuple[re.Pattern[str], str]]:
    """Patterns on the first name with templates of the second."""
    rules = []
    for source, target in names:
        pattern = re.escape(source).replace(r"\{i\}", r"(?P<i>\d+)")
        rules.append((re.compile(pattern.replace(r"\{p\}", "(?P<p>weight|bias)")), target))
    return rules


def _rename(key: str, rules: list[tuple[re.Pattern[str], str]]) -> str | None:
    for pattern, target in rules:
        match = pattern.fullmatch(key)
        if match:
            return target.format(**match.groupdict())
    return None


def from_published(
    state: Mapping[str, Tensor],
) -> tuple[dict[str, Tensor], ConversionReport]:
    """Renames a published state dict to our keys.

    Index buffers, tied copies of the output weight, and pruning modules are left out (see
    `ConversionReport.ignored`); the 0-dim temperature becomes (1,).
    """
    with_bert = any(key.startswith("text_encoder.bert.") for key in state)
    rules = _compile(_names("bert." if with_bert else ""))
    report, converted = ConversionReport(), {}
    for key, value in state.items():
        ours = _rename(key, rules)
        if ours is not None:
            converted[ours] = value.reshape(1) if value.ndim == 0 else value
            report.renamed[key] = ours
        elif _IGNORED.search(key):
            report.ignored.append(key)
        else:
            report.unexpected.append(key)
    return converted, report


def to_published(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our state dict under published names, with the tied copies and index buffers they store.

    Raises:
        ValueError: on a key that the published code has no name for.
    """
    form_vqa = any(key.startswith("decoder.") for key in state)
    rules = _compile((ours, published) for published, ours in _names("" if form_vqa else "bert."))
    result: dict[str, Tensor] = {}
    for key, value in state.items():
        published = _rename(key, rules)
        if published is None:
            raise ValueError(f"{key} has no name in the published format (a pruned or other model)")
        result[published] = value.reshape(()) if published == "temp" else value
    result["vision_encoder.position_ids"] = _index(state["vision.embeddings.position"])
    text = "text_encoder." if form_vqa else "text_encoder.bert."
    result[f"{text}embeddings.position_ids"] = _index(state["text.embeddings.position.weight"])
    if form_vqa:
        positions = state["decoder.embeddings.position.weight"]
        result["text_decoder.bert.embeddings.position_ids"] = _index(positions)
        _tie(result, "text_decoder.", state["decoder.embeddings.word.weight"])
    elif "mlm_head.bias" in state:
        _tie(result, "text_encoder.", state["text.embeddings.word.weight"])
    return result


def _index(positions: Tensor) -> Tensor:
    return torch.arange(positions.shape[0], device=positions.device).unsqueeze(0)


def _tie(result: dict[str, Tensor], prefix: str, word: Tensor) -> None:
    result[f"{prefix}cls.predictions.decoder.weight"] = word
    result[f"{prefix}cls.predictions.decoder.bias"] = result[f"{prefix}cls.predictions.bias"]


def config_of(
    state: Mapping[str, Tensor], *, head_dim: int = 64, region_layers: int | None = None
) -> ModelConfig:
    """The configuration that a published state dict belongs to, read off its shapes.

    Args:
        head_dim: not visible in the weights (64 in every published model).
        region_layers: not visible either; None takes a third of the layers, as published.
    """
    ours, _ = from_published(state)
    vision_ffn = _widths(ours, "vision.blocks.{}.ffn.fc1.bias")
    text_ffn = _widths(ours, "text.layers.{}.ffn.fc1.bias")
    cross = [w // head_dim for w in _widths(ours, "text.layers.{}.cross_attention.q.bias")]
    patch = ours["vision.embeddings.patch.proj.weight"]
    grid = round((ours["vision.embeddings.position"].shape[0] - 1) ** 0.5)
    word = ours["text.embeddings.word.weight"]
    heads = [w // head_dim for w in _widths(ours, "text.layers.{}.attention.q.bias")]
    decoder_ffn = _widths(ours, "decoder.layers.{}.ffn.fc1.bias")
    decoder = None
    if decoder_ffn:
        own = _widths(ours, "decoder.layers.{}.attention.q.bias")
        other = _widths(ours, "decoder.layers.{}.cross_attention.q.bias")
        decoder = DecoderConfig(
            heads=tuple(w // head_dim for w in own),
            cross_heads=tuple(w // head_dim for w in other),
            ffn=tuple(decoder_ffn),
        )
    projection = ours.get("image_projection.linear.bias")
    return ModelConfig(
        form="vqa" if decoder else "pretrain",
        embed_dim=256 if projection is None else projection.shape[0],
        decoder=decoder,
        vision=VisionConfig(
            image_size=grid * patch.shape[-1],
            patch_size=patch.shape[-1],
            width=patch.shape[0],
            head_dim=head_dim,
            heads=tuple(w // head_dim for w in _widths(ours, "vision.blocks.{}.attention.q.bias")),
            ffn=tuple(vision_ffn),
            region_layers=len(vision_ffn) // 3 if region_layers is None else region_layers,
        ),
        text=TextConfig(
            vocab_size=word.shape[0],
            max_positions=ours["text.embeddings.position.weight"].shape[0],
            type_vocab_size=ours["text.embeddings.token_type.weight"].shape[0],
            width=word.shape[1],
            head_dim=head_dim,
            text_layers=len(text_ffn) - len(cross),
            heads=tuple(heads),
            cross_heads=tuple(cross),
            ffn=tuple(text_ffn),
        ),
    )


def _widths(state: Mapping[str, Tensor], template: str) -> list[int]:
    """Lengths of the biases whose key fits the template, in the order of their layers."""
    pattern = re.compile(re.escape(template).replace(r"\{\}", r"(\d+)"))
    found = {int(m[1]): state[key].shape[0] for key in state if (m := pattern.fullmatch(key))}
    return [found[index] for index in sorted(found)]


def load(
    model: XVLM,
    state: Mapping[str, Tensor],
    *,
    allow_missing: Iterable[str] = (),
    allow_unexpected: bool = False,
    where: str = "checkpoint",
) -> ConversionReport:
    """Loads published weights into a model; positions are resampled to the model's image size.

    Raises:
        ValueError: naming keys that are missing (unless allowed), misshapen or unexpected.
    """
    converted, report = from_published(state)
    key = "vision.embeddings.position"
    vision = model.config.vision
    if key in converted and converted[key].shape[0] != vision.tokens:
        converted[key] = resize_positions(converted[key], vision.image_size // vision.patch_size)
        report.resized.append(key)
    return load_converted(
        model,
        converted,
        report,
        allow_missing=allow_missing,
        allow_unexpected=allow_unexpected,
        where=where,
    )
