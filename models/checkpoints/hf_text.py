"""BERT-like encoders of transformers into the text and fusion stack: RoBERTa (XLM-R, CamemBERT),
DistilBERT and ELECTRA beside BERT itself.

Their names become BERT's, and `models.checkpoints.bert` does the rest. Shapes come from
`models.backbones.hf_fields`. The masked-token head keeps the exact gelu, which all of them have
but a BERT whose layers have another activation.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor, nn

from models.checkpoints import bert
from models.checkpoints.conversion import ConversionReport, load_converted
from models.xvlm import XVLM

__all__ = ["bert_names", "load"]

_PREFIX = re.compile(r"(bert|roberta|electra|distilbert)\.")
_HEAD = "cls.predictions"
_MODULES = {
    # RoBERTa's masked-token head
    "lm_head": _HEAD,
    "lm_head.dense": f"{_HEAD}.transform.dense",
    "lm_head.layer_norm": f"{_HEAD}.transform.LayerNorm",
    "lm_head.decoder": f"{_HEAD}.decoder",
    # DistilBERT's
    "vocab_transform": f"{_HEAD}.transform.dense",
    "vocab_layer_norm": f"{_HEAD}.transform.LayerNorm",
    # ELECTRA's (its generator; the discriminator has none)
    "generator_predictions.dense": f"{_HEAD}.transform.dense",
    "generator_predictions.LayerNorm": f"{_HEAD}.transform.LayerNorm",
}
_TENSORS = {
    f"{head}.{kind}": f"{_HEAD}.{name}"
    for head in ("vocab_projector", "generator_lm_head")
    for kind, name in (("weight", "decoder.weight"), ("bias", "bias"))
}
_DISTIL_LAYER = {
    "attention.q_lin": "attention.self.query",
    "attention.k_lin": "attention.self.key",
    "attention.v_lin": "attention.self.value",
    "attention.out_lin": "attention.output.dense",
    "sa_layer_norm": "attention.output.LayerNorm",
    "ffn.lin1": "intermediate.dense",
    "ffn.lin2": "output.dense",
    "output_layer_norm": "output.LayerNorm",
}
_DISTIL_KEY = re.compile(r"transformer\.(layer\.\d+)\.(.+)")
_PROJECTION = "embeddings_project"
_OURS = "text.embeddings.projection"
# tells replaced tokens from real ones; nothing here does
_IGNORED = "discriminator_predictions."


def bert_names(keys: Iterable[str]) -> dict[str, str]:
    """Foreign key -> the key that BERT has for it; keys that BERT has nothing for are kept."""
    return {key: _bert_name(key) for key in keys}


def _bert_name(key: str) -> str:
    plain = _PREFIX.sub("", key, count=1) if _PREFIX.match(key) else key
    if plain in _TENSORS:
        return _TENSORS[plain]
    module, _, kind = plain.rpartition(".")
    if module in _MODULES:
        return f"{_MODULES[module]}.{kind}"
    match = _DISTIL_KEY.fullmatch(module)
    if match is not None and match[2] in _DISTIL_LAYER:
        return f"encoder.{match[1]}.{_DISTIL_LAYER[match[2]]}.{kind}"
    return plain


def load(
    model: XVLM,
    state: Mapping[str, Tensor],
    layer_map: Sequence[int] | None = None,
    *,
    allow_missing: Iterable[str] = (),
    allow_unexpected: bool | Iterable[str] = False,
    where: str = "text checkpoint",
) -> ConversionReport:
    """Loads a BERT-like encoder's weights into a model's text and fusion stack, and its masked-token
    head if both have one; arguments as in `bert.load`. Cross-attention stays fresh.

    Raises:
        ValueError: naming keys that are missing (unless allowed), misshapen or unexpected.
    """
    names = bert_names(state)
    projection = {
        name.removeprefix(f"{_PROJECTION}."): state[key]
        for key, name in names.items()
        if name.startswith(f"{_PROJECTION}.")
    }
    ignored = sorted(key for key, name in names.items() if name.startswith(_IGNORED))
    layers = {
        name: state[key]
        for key, name in names.items()
        if not name.startswith((f"{_PROJECTION}.", _IGNORED))
    }
    report = bert.load(
        model,
        layers,
        layer_map,
        allow_missing=[*allow_missing, _OURS],
        allow_unexpected=allow_unexpected,
        where=where,
    )
    place = model.text.embeddings.projection
    if projection or isinstance(place, nn.Linear):
        extra = load_converted(place, projection, ConversionReport(), where=f"{where}: {_OURS}")
        report.loaded = sorted([*report.loaded, *(f"{_OURS}.{key}" for key in extra.loaded)])
        report.missing = [key for key in report.missing if not key.startswith(f"{_OURS}.")]
        for kind in projection:
            report.took(f"{_PROJECTION}.{kind}", f"{_OURS}.{kind}")
    return _in_their_names(report, names, ignored)


def _in_their_names(
    report: ConversionReport, names: Mapping[str, str], ignored: list[str]
) -> ConversionReport:
    """The report with the file's own keys instead of BERT's."""
    back = {name: key for key, name in names.items()}
    report.renamed = {back.get(name, name): ours for name, ours in report.renamed.items()}
    report.unexpected = sorted(back.get(name, name) for name in report.unexpected)
    report.ignored = sorted([*(back.get(name, name) for name in report.ignored), *ignored])
    return report
