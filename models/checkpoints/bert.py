"""BERT weights (transformers' BertModel or BertForMaskedLM) into the text and fusion stack.

bert-base-uncased stores LayerNorm scales as gamma and beta; both spellings are taken. BERT has no
cross-attention, so those layers stay fresh.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor

from models.checkpoints.conversion import ConversionReport, load_converted
from models.initialise import default_map
from models.xvlm import XVLM

__all__ = ["from_bert", "load"]

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


def from_bert(
    state: Mapping[str, Tensor], layer_map: Sequence[int]
) -> tuple[dict[str, Tensor], ConversionReport]:
    """Renames a BERT state dict to our keys.

    Args:
        layer_map: BERT layer of each of our layers, text and fusion in one list. A BERT layer may
            be taken more than once; layers that are not taken are reported as ignored.
    """
    report, converted = ConversionReport(), {}
    for key, value in state.items():
        name, _, kind = key.removeprefix("bert.").rpartition(".")
        kind = _KINDS.get(kind, kind)
        match = _LAYER_KEY.fullmatch(name)
        if name in _NAMES and not _IGNORED.fullmatch(key):
            targets = [f"{_NAMES[name]}.{kind}"]
        elif match is not None and match[2] in _LAYER:
            taken = [ours for ours, theirs in enumerate(layer_map) if theirs == int(match[1])]
            targets = [f"text.layers.{ours}.{_LAYER[match[2]]}.{kind}" for ours in taken]
            if not taken:
                report.ignored.append(key)
                continue
        else:
            ignored = _IGNORED.fullmatch(key.removeprefix("bert."))
            (report.ignored if ignored else report.unexpected).append(key)
            continue
        for target in targets:
            converted[target] = value
            report.renamed[key] = target
    return converted, report


def load(
    model: XVLM,
    state: Mapping[str, Tensor],
    layer_map: Sequence[int] | None = None,
    *,
    allow_missing: Iterable[str] = (),
    allow_unexpected: bool = False,
    where: str = "BERT checkpoint",
) -> ConversionReport:
    """Loads BERT weights into a model's text and fusion stack, and its masked-token head if both
    have one. Cross-attention and everything that is not text may be missing.

    Args:
        layer_map: as in `from_bert`; None spreads our layers over BERT's (1, 3, 5, ... for half).

    Raises:
        ValueError: naming keys that are missing (unless allowed), misshapen or unexpected.
    """
    depth = 1 + max(
        (int(m[1]) for key in state if (m := re.match(r"(?:bert\.)?encoder\.layer\.(\d+)\.", key))),
        default=-1,
    )
    if depth == 0:
        raise ValueError(f"{where}: holds no BERT layers (encoder.layer.N...)")
    layers = (
        default_map(model.config.text.layers, depth, "layer") if layer_map is None else layer_map
    )
    converted, report = from_bert(state, layers)
    has_head = "mlm_head.bias" in converted
    if model.config.form != "pretrain":
        converted = {key: v for key, v in converted.items() if not key.startswith("mlm_head.")}
    prefixes = tuple(allow_missing)

    def may_be_missing(key: str) -> bool:
        foreign = not key.startswith(("text.", "mlm_head.")) or ".cross_" in key
        return foreign or (key.startswith("mlm_head.") and not has_head) or key.startswith(prefixes)

    return load_converted(
        model,
        converted,
        report,
        allow_missing=may_be_missing,
        allow_unexpected=allow_unexpected,
        where=where,
    )
