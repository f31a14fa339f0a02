"""Shapes of other people's encoders: `vision.backbone: timm/NAME`, `text.backbone: hf/PATH`.

A backbone's name stands for fields of the configuration. They are written out when a
configuration is read, fields that are given explicitly win, and the name stays as a note, so a
saved config.json needs neither timm nor the file again. Weights come by `models.checkpoints`.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import nn

from models.part_configs import TextConfig, VisionConfig

__all__ = ["hf_fields", "resolve", "timm_fields", "timm_module_fields"]

_VIT = (
    "supported are plain ViTs (timm's VisionTransformer and distilled DeiT: ViT, DeiT, CLIP, "
    "SigLIP, DINOv2): learned absolute positions, LayerNorm, one gelu feed-forward part a block, "
    "with or without class token, register tokens, layer scale, norm before the blocks and biases "
    "of patches, queries, keys and values; pooling by class token, mean or attention"
)
_ACTIVATIONS = {"GELU": "gelu", "GELUTanh": "gelu_tanh", "QuickGELU": "quick_gelu"}
_POOLING = {"token": "class", "avg": "mean", "map": "map"}

_BERT_LIKE = ("bert", "roberta", "xlm-roberta", "camembert", "distilbert", "electra")
_NOT_BERT = {
    "albert": "its layers share their weights",
    "deberta": "disentangled attention",
    "deberta-v2": "disentangled attention",
    "longformer": "sparse attention",
    "megatron-bert": "norms before the sub-layers",
    "mobilebert": "bottleneck layers",
    "modernbert": "rotary positions and gated feed-forward parts",
    "mpnet": "relative positions",
    "nomic_bert": "rotary positions and gated feed-forward parts",
    "roberta-prelayernorm": "norms before the sub-layers",
    "roformer": "rotary positions",
    "squeezebert": "grouped convolutions",
    "xlm-roberta-xl": "norms before the sub-layers",
    "xlnet": "relative positions",
}
_HF_ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu",
}


def resolve(values: Mapping[str, Any], where: str = "model config") -> dict[str, Any]:
    """The values of a ModelConfig with the fields that its backbones stand for written out.

    Explicit fields win. The split of layers follows the depth: a third of the vision layers apply
    region masks, half of the text layers are fusion layers. timm's image mean and deviation come
    along. A section in which every field is given, like a saved one, is left as it is.

    Raises:
        ValueError, FileNotFoundError: naming `where`, on backbones that are unknown or do not fit.
    """
    result = dict(values)
    for section, kind in (("vision", VisionConfig), ("text", TextConfig)):
        given = result.get(section)
        if not isinstance(given, Mapping) or not given.get("backbone"):
            continue
        if given.keys() >= {field.name for field in fields(kind)}:
            continue
        name = given["backbone"]
        place = f"{where}: {section}.backbone {name!r}"
        source, _, rest = str(name).partition("/")
        if source != {"vision": "timm", "text": "hf"}[section] or not rest:
            wanted = "timm/NAME" if section == "vision" else "hf/PATH of a config.json"
            raise ValueError(f"{place}: write {wanted}")
        try:
            found = timm_fields(rest) if section == "vision" else hf_fields(Path(rest))
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{place}: {error}") from error
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from error
        if section == "vision":
            for key in ("image_mean", "image_std"):
                result.setdefault(key, found.pop(key))
        result[section] = _split_layers(section, found, given)
    return result


def _split_layers(section: str, found: dict[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Given fields over found ones; what depends on the depth follows the depth of the result."""
    merged = {**found, **given}
    depth = len(merged["ffn"])
    if section == "vision":
        merged.setdefault("region_layers", depth // 3)
        return merged
    merged.setdefault("text_layers", depth // 2)
    merged.setdefault("cross_heads", tuple(merged["heads"])[merged["text_layers"] :])
    return merged


# --- timm ---------------------------------------------------------------------------------------


def timm_fields(name: str) -> dict[str, Any]:
    """Fields of VisionConfig (and image_mean, image_std) of a timm model; no weights are made.

    Args:
        name: as for `timm.create_model`, with or without the tag of its weights.

    Raises:
        ValueError: on an unknown name, or an architecture that does not fit (see
            `timm_module_fields`).
    """
    import timm
    from timm.models import is_model, split_model_name_tag

    plain, _ = split_model_name_tag(name)
    if not is_model(plain):
        near = difflib.get_close_matches(plain, timm.list_models(), n=3)
        hint = f"; did you mean {', '.join(near)}?" if near else ""
        raise ValueError(f"timm has no model {plain!r}{hint}")
    with torch.device("meta"):
        module = timm.create_model(name, pretrained=False)
    pixels: Any = module.pretrained_cfg
    return timm_module_fields(module) | {
        "image_mean": tuple(pixels["mean"]),
        "image_std": tuple(pixels["std"]),
    }


def timm_module_fields(module: nn.Module) -> dict[str, Any]:
    """Fields of VisionConfig of a timm module, read off its parts.

    Raises:
        ValueError: naming every part that the encoder here does not have, and what is supported.
    """
    from timm.models.deit import VisionTransformerDistilled
    from timm.models.vision_transformer import VisionTransformer

    if type(module) not in (VisionTransformer, VisionTransformerDistilled):
        raise ValueError(f"{type(module).__name__} is no plain ViT; {_VIT}")
    problems = _vit_problems(module)
    if problems:
        raise ValueError(f"{'; '.join(dict.fromkeys(problems))}: not supported; {_VIT}")
    vit: Any = module
    first, blocks = vit.blocks[0], list(vit.blocks)
    pooling = _POOLING.get(vit.global_pool, "class" if vit.has_class_token else "mean")
    scale = getattr(first.ls1, "init_values", 1e-5) if _named(first.ls1) == "LayerScale" else None
    return {
        "image_size": vit.patch_embed.img_size[0],
        "patch_size": vit.patch_embed.patch_size[0],
        "width": vit.embed_dim,
        "head_dim": first.attn.head_dim,
        "heads": tuple(block.attn.num_heads for block in blocks),
        "ffn": tuple(block.mlp.fc1.out_features for block in blocks),
        "activation": _ACTIVATIONS[_named(first.mlp.act)],
        "norm_eps": first.norm1.eps,
        "class_token": vit.has_class_token,
        "register_tokens": vit.num_prefix_tokens - int(vit.has_class_token),
        "prefix_positions": not vit.no_embed_class,
        "pooling": pooling,
        "pool_ffn": vit.attn_pool.mlp.fc1.out_features if pooling == "map" else 0,
        "pre_norm": _is_norm(vit.norm_pre),
        "final_norm": "tokens"
        if _is_norm(vit.norm)
        else "pooled"
        if _is_norm(vit.fc_norm)
        else "none",
        "patch_bias": vit.patch_embed.proj.bias is not None,
        "qkv_bias": first.attn.qkv.bias is not None,
        "layer_scale": scale,
    }


def _named(module: object) -> str:
    return type(module).__name__


def _is_norm(module: object) -> bool:
    return isinstance(module, nn.LayerNorm)


def _vit_problems(vit: Any) -> list[str]:
    """What a VisionTransformer has that the encoder here has not."""
    found = []
    patch = vit.patch_embed
    if _named(patch) != "PatchEmbed" or not isinstance(patch.norm, nn.Identity):
        found.append(f"patch embedding {_named(patch)} with {_named(patch.norm)}")
    elif len(set(patch.img_size)) != 1 or len(set(patch.patch_size)) != 1:
        found.append(f"images of {patch.img_size} with patches of {patch.patch_size}, not square")
    elif patch.proj.in_channels != 3:
        found.append(f"{patch.proj.in_channels} image channels")
    if vit.pos_embed is None:
        found.append("no learned positions")
    if vit.global_pool not in ("", *_POOLING):
        found.append(f"pooling {vit.global_pool!r}")
    elif vit.global_pool in ("avg", "map") and vit.pool_include_prefix and vit.num_prefix_tokens:
        found.append("pooling that includes class or register tokens")
    if vit.global_pool == "map":
        found += _pool_problems(vit.attn_pool)
    for block in vit.blocks:
        found += _block_problems(block)
    norms = [vit.norm_pre, vit.norm, vit.fc_norm]
    norms += [
        norm for block in vit.blocks for norm in (_part(block, "norm1"), _part(block, "norm2"))
    ]
    present = [norm for norm in norms if norm is not None and not isinstance(norm, nn.Identity)]
    kinds = {_named(norm) for norm in present if not _is_norm(norm)}
    found += [f"norms of kind {kind}" for kind in sorted(kinds)]
    if len({norm.eps for norm in present if _is_norm(norm)}) > 1:
        found.append("norms with different eps")
    return found


def _part(block: nn.Module, name: str) -> nn.Module | None:
    return getattr(block, name, None)


def _pool_problems(pool: Any) -> list[str]:
    plain = (pool.latent_len, pool.pool, pool.pos_embed, type(pool.q_norm)) == (
        1,
        "token",
        None,
        nn.Identity,
    )
    return (
        [] if plain and pool.mlp is not None and _is_norm(pool.norm) else ["its attention pooling"]
    )


def _block_problems(block: Any) -> list[str]:
    if _named(block) != "Block":
        return [f"blocks of kind {_named(block)}"]
    attention, mlp, found = block.attn, block.mlp, []
    if _named(attention) != "Attention":
        found.append(f"attention of kind {_named(attention)}")
    else:
        if not isinstance(attention.q_norm, nn.Identity):
            found.append("norms of queries and keys")
        if not isinstance(attention.norm, nn.Identity) or getattr(attention, "gate", None):
            found.append("a norm or gate inside the attention")
        if attention.proj.bias is None:
            found.append("attention output without bias")
    if _named(mlp) != "Mlp":
        found.append(f"feed-forward part of kind {_named(mlp)}")
    elif not isinstance(mlp.norm, nn.Identity):
        found.append("a norm inside the feed-forward part")
    elif _named(mlp.act) not in _ACTIVATIONS:
        found.append(f"activation {_named(mlp.act)}")
    elif mlp.fc1.bias is None:
        found.append("feed-forward part without biases")
    return found


# --- Hugging Face ---------------------------------------------------------------------------------


def hf_fields(path: Path) -> dict[str, Any]:
    """Fields of TextConfig of a BERT-like encoder's config.json; the layers are not split yet.

    Args:
        path: the file, or the folder that holds it.

    Raises:
        FileNotFoundError: naming the missing file.
        ValueError: naming the file and what does not fit.
    """
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file; name a folder with a config.json, or one")
    try:
        values = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"{file}: not a readable JSON file: {error}") from error
    kind = values.get("model_type") if isinstance(values, dict) else None
    if kind not in _BERT_LIKE:
        reason = f" ({_NOT_BERT[kind]})" if kind in _NOT_BERT else ""
        raise ValueError(
            f"{file}: model_type {kind!r}{reason} is not supported; BERT-like encoders are: "
            f"{', '.join(_BERT_LIKE)}"
        )
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    given = {key: value for key, value in values.items() if key != "model_type"}
    try:
        config: Any = AutoConfig.for_model(kind, **given)
    except (StrictDataclassError, TypeError, ValueError) as error:
        raise ValueError(f"{file}: {error}") from error
    return _bert_fields(kind, config, str(file))


def _bert_fields(kind: str, config: Any, where: str) -> dict[str, Any]:
    distil = kind == "distilbert"
    activation = config.activation if distil else config.hidden_act
    width, heads, depth = (
        config.hidden_size,
        config.num_attention_heads,
        config.num_hidden_layers,
    )
    positions = getattr(config, "position_embedding_type", None) or "absolute"
    problems = {
        f"activation {activation!r}": activation not in _HF_ACTIVATIONS,
        f"position_embedding_type {positions!r}": positions != "absolute",
        "is_decoder": bool(getattr(config, "is_decoder", False)),
        "add_cross_attention": bool(getattr(config, "add_cross_attention", False)),
        f"hidden size {width} for {heads} heads": bool(width % heads),
    }
    wrong = [name for name, found in problems.items() if found]
    if wrong:
        raise ValueError(f"{where}: {', '.join(wrong)} is not supported")
    # RoBERTa counts positions from behind the pad id
    offset = config.pad_token_id + 1 if kind in ("roberta", "xlm-roberta", "camembert") else 0
    tables = getattr(config, "embedding_size", width)
    return {
        "vocab_size": config.vocab_size,
        "max_positions": config.max_position_embeddings - offset,
        "position_offset": offset,
        "type_vocab_size": 0 if distil else config.type_vocab_size,
        "width": width,
        "word_width": None if tables == width else tables,
        "head_dim": width // heads,
        "heads": (heads,) * depth,
        "ffn": (config.hidden_dim if distil else config.intermediate_size,) * depth,
        "activation": _HF_ACTIVATIONS[activation],
        "norm_eps": 1e-12 if distil else config.layer_norm_eps,
        "dropout": config.dropout if distil else config.hidden_dropout_prob,
        "attention_dropout": config.attention_dropout
        if distil
        else config.attention_probs_dropout_prob,
        "pad_id": config.pad_token_id,
        "init_std": config.initializer_range,
    }
