"""BERT weights (transformers' BertModel or BertForMaskedLM) into the text and fusion stack.

bert-base-uncased stores LayerNorm scales as gamma and beta; both spellings are taken. BERT has no
cross-attention, so those layers stay fresh.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor

from models.checkpoints.conversion import (
    ConversionReport,
    check_tied,
    load_converted,
    matches,
    spread,
)
from models.initialise import default_map
from models.part_configs import TextConfig
from models.xvlm import XVLM

__all__ = ["config_of", "from_bert", "load"]

_NAMES = {
    "embeddings.word_embeddings": "text.embeddings.word",
    "embeddings.position_embeddings": "text.embeddings.position",
    "embeddings.token_type_embeddings": "text.embeddings.token_type",
    "embeddings.LayerNorm": "text.embeddings.norm",
    "cls.predictions.transform.dense": "mlm_head.dense",
    "cls.predictions.transform.LayerNorm": "mlm_head.norm",
    "cls.predictions": "mlm_head",
}
_LAYER = {
    "attention.self.query": "attention.q",
    "attention.self.key": "attention.k",
    "attention.self.value": "attention.v",
    "attention.output.dense": "attention.out",
    "attention.output.LayerNorm": "attention_norm",
    "intermediate.dense": "ffn.fc1",
    "output.dense": "ffn.fc2",
    "output.LayerNorm": "ffn_norm",
}
_LAYER_KEY = re.compile(r"encoder\.layer\.(\d+)\.(.+)")
_IGNORED = re.compile(
    r"pooler\..*|cls\.seq_relationship\..*|.*position_ids|cls\.predictions\.decoder\..*"
)
_KINDS = {"gamma": "weight", "beta": "bias"}
_WORD = "embeddings.word_embeddings.weight"
_HEAD = "cls.predictions"


def from_bert(
    state: Mapping[str, Tensor], layer_map: Sequence[int], where: str = "BERT checkpoint"
) -> tuple[dict[str, Tensor], ConversionReport]:
    """Renames a BERT state dict to our keys.

    Args:
        layer_map: BERT layer of each of our layers, text and fusion in one list. A BERT layer may
            be taken more than once; layers that are not taken are reported as ignored.

    Raises:
        ValueError: when the output layer is not tied to the word embeddings.
    """
    report, converted = ConversionReport(), {}
    plain = {key.removeprefix("bert."): value for key, value in state.items()}
    check_tied(plain, f"{_HEAD}.decoder.weight", _WORD, where)
    check_tied(plain, f"{_HEAD}.decoder.bias", f"{_HEAD}.bias", where)
    for key, value in state.items():
        targets = _targets(key.removeprefix("bert."), layer_map, f"{_HEAD}.bias" in plain)
        if targets is None:
            report.unexpected.append(key)
        elif not targets:
            report.ignored.append(key)
        for target in targets or ():
            converted[target] = value
            report.took(key, target)
    return converted, report


def _targets(key: str, layer_map: Sequence[int], has_bias: bool) -> list[str] | None:
    """Our keys of a BERT key, none for one that is left out on purpose; None for a foreign key."""
    if key == f"{_HEAD}.decoder.bias" and not has_bias:  # files that store a shared tensor once
        return ["mlm_head.bias"]
    if _IGNORED.fullmatch(key):
        return []
    name, _, kind = key.rpartition(".")
    kind = _KINDS.get(kind, kind)
    if name in _NAMES:
        return [f"{_NAMES[name]}.{kind}"]
    match = _LAYER_KEY.fullmatch(name)
    if match is None or match[2] not in _LAYER:
        return None
    return [
        f"text.layers.{ours}.{_LAYER[match[2]]}.{kind}" for ours in spread(layer_map, int(match[1]))
    ]


def _depth(state: Mapping[str, Tensor], where: str) -> int:
    """The number of layers.

    Raises:
        ValueError: when there are none.
    """
    numbers = [
        int(match[1])
        for key in state
        if (match := re.match(r"(?:bert\.)?encoder\.layer\.(\d+)\.", key))
    ]
    if not numbers:
        raise ValueError(f"{where}: holds no BERT layers (encoder.layer.N...)")
    return 1 + max(numbers)


def config_of(
    state: Mapping[str, Tensor], *, head_dim: int = 64, where: str = "BERT checkpoint"
) -> TextConfig:
    """The text configuration of a BERT state dict, its upper half as fusion layers.

    Args:
        head_dim: not visible in the weights (64 in every published BERT but the smallest).

    Raises:
        ValueError: when the state dict is not BERT's, or the width is not a multiple of `head_dim`.
    """
    layers = _depth(state, where)
    plain = {key.removeprefix("bert."): value for key, value in state.items()}
    word, positions, types = (
        plain.get(f"embeddings.{name}_embeddings.weight")
        for name in ("word", "position", "token_type")
    )
    query = plain.get("encoder.layer.0.attention.self.query.weight")
    if word is None or positions is None or query is None:
        raise ValueError(
            f"{where}: not the weights of a BERT (embeddings.word_embeddings, "
            "embeddings.position_embeddings, encoder.layer.0.attention.self.query)"
        )
    width, tables = query.shape[1], word.shape[1]
    if width % head_dim:
        raise ValueError(
            f"{where}: width {width} is not a multiple of head size {head_dim}; give text.head_dim"
        )
    units = [plain.get(f"encoder.layer.{index}.intermediate.dense.bias") for index in range(layers)]
    heads, fusion = width // head_dim, layers // 2
    return TextConfig(
        vocab_size=word.shape[0],
        max_positions=positions.shape[0],
        type_vocab_size=0 if types is None else types.shape[0],
        width=width,
        word_width=None if tables == width else tables,
        head_dim=head_dim,
        text_layers=layers - fusion,
        heads=(heads,) * layers,
        cross_heads=(heads,) * fusion,
        ffn=tuple(4 * width if unit is None else unit.shape[0] for unit in units),
    )


def load(
    model: XVLM,
    state: Mapping[str, Tensor],
    layer_map: Sequence[int] | None = None,
    *,
    allow_missing: Iterable[str] = (),
    allow_unexpected: bool | Iterable[str] = False,
    where: str = "BERT checkpoint",
) -> ConversionReport:
    """Loads BERT weights into a model's text and fusion stack, and its masked-token head if both
    have one. Cross-attention and everything that is not text may be missing.

    Args:
        layer_map: as in `from_bert`, or of the text layers alone: the fusion layers then stay as
            they are. None spreads our layers over BERT's (1, 3, 5, ... for half).
        allow_missing, allow_unexpected: keys, modules or globs, as in `load_converted`.

    Raises:
        ValueError: naming keys that are missing (unless allowed), misshapen or unexpected.
    """
    depth, ours = _depth(state, where), model.config.text.layers
    first = model.config.text.text_layers
    layers = default_map(ours, depth, "layer") if layer_map is None else layer_map
    if len(layers) not in (first, ours) or not all(0 <= index < depth for index in layers):
        raise ValueError(
            f"{where}: layer map {tuple(layers)} needs {ours} entries from 0 to {depth - 1}, or "
            f"{first} to leave the fusion layers fresh"
        )
    converted, report = from_bert(state, layers, where)
    has_head = "mlm_head.bias" in converted
    if model.config.form != "pretrain":
        for key, targets in list(report.renamed.items()):
            if targets[0].startswith("mlm_head."):
                del converted[targets[0]], report.renamed[key]
                report.ignored.append(key)
    allowed = (*allow_missing, *(f"text.layers.{index}" for index in range(len(layers), ours)))

    def may_be_missing(key: str) -> bool:
        foreign = not key.startswith(("text.", "mlm_head.")) or ".cross_" in key
        return foreign or (key.startswith("mlm_head.") and not has_head) or matches(key, allowed)

    return load_converted(
        model,
        converted,
        report,
        allow_missing=may_be_missing,
        allow_unexpected=allow_unexpected,
        where=where,
    )
