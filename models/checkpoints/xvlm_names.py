"""The key names of published X-VLM / EfficientVLM (CLIP variant) models, form by form.

Source: https://github.com/zengyan-97/X-VLM and https://github.com/swaggy-TN/EfficientVLM.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from models.config import HEADS, Form

__all__ = ["Rules", "names", "rename", "rules", "text_prefix"]

Rules = list[tuple[re.Pattern[str], str]]

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
# modules of ours by their name in `config.HEADS`
_HEADS: dict[str, list[tuple[str, str]]] = {
    "image_projection": [("vision_proj.{p}", "image_projection.linear.{p}")],
    "text_projection": [("text_proj.{p}", "text_projection.linear.{p}")],
    "contrastive": [("temp", "contrastive.value")],
    "mlm_head": [(f"text_encoder.{a}", f"mlm_head.{b}") for a, b in _TOKEN_HEAD],
    "lm_head": [(f"text_decoder.{a}", f"lm_head.{b}") for a, b in _TOKEN_HEAD],
    "ta_head": [("ta_head.{p}", "ta_head.{p}")],
    **{
        head: [
            (f"{head}.0.{{p}}", f"{head}.linear.{{p}}"),
            (f"{head}.1.{{p}}", f"{head}.norm.{{p}}"),
            (f"{head}.3.{{p}}", f"{head}.output.{{p}}"),
        ]
        for head in ("itm_head", "bbox_head", "cls_head")
    },
}
# where the one text stack lies in each form; elsewhere it is `text_encoder.`
_TEXT = {"pretrain": "text_encoder.bert.", "captioning": "text_decoder.bert."}


def text_prefix(form: Form) -> str:
    """What stands in front of the keys of the text stack."""
    return _TEXT.get(form, "text_encoder.")


def _stack(published: str, ours: str) -> list[tuple[str, str]]:
    """Names of one BERT stack."""
    layers = [(f"{published}encoder.layer.{{i}}.{a}", f"{ours}layers.{{i}}.{b}") for a, b in _LAYER]
    return [
        (f"{published}embeddings.{a}", f"{ours}embeddings.{b}") for a, b in _EMBEDDINGS
    ] + layers


def names(form: Form) -> list[tuple[str, str]]:
    """(published, ours) of every module of a form."""
    pairs = [*_VISION, *_stack(text_prefix(form), "text.")]
    for head in HEADS[form]:
        if head == "decoder":
            pairs += _stack("text_decoder.bert.", "decoder.")
            pairs += [(f"text_decoder.{a}", f"decoder.head.{b}") for a, b in _TOKEN_HEAD]
        else:
            pairs += _HEADS[head]
    return pairs


def rules(pairs: Iterable[tuple[str, str]]) -> Rules:
    """Patterns on the first name with templates of the second."""
    compiled = []
    for source, target in pairs:
        pattern = re.escape(source).replace(r"\{i\}", r"(?P<i>\d+)")
        compiled.append((re.compile(pattern.replace(r"\{p\}", "(?P<p>weight|bias)")), target))
    return compiled


def rename(key: str, compiled: Rules) -> str | None:
    """The new name of a key; None when no rule names it."""
    for pattern, target in compiled:
        match = pattern.fullmatch(key)
        if match:
            return target.format(**match.groupdict())
    return None
