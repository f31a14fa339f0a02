"""Gates as pictures: which heads and how much of each feed-forward layer are open, per modality."""

from __future__ import annotations

from collections.abc import Mapping

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from train.monitor.pictures import as_tensor

__all__ = ["gate_heatmaps"]

_CELL, _GAP, _LABEL, _MARGIN, _TITLE = 22, 2, 96, 10, 24
_BAR = 260  # pixels of a feed-forward layer
_CLOSED, _OPEN = (236, 239, 237), (33, 115, 88)
_INK, _SOFT = (38, 48, 43), (104, 115, 109)


def _colour(value: float) -> tuple[int, int, int]:
    share = min(max(value, 0.0), 1.0)
    mixed = [round(a + (b - a) * share) for a, b in zip(_CLOSED, _OPEN, strict=True)]
    return mixed[0], mixed[1], mixed[2]


def _rows(slots: Mapping[str, Tensor], modality: str) -> list[tuple[str, str, list[float]]]:
    """(layer, kind, values) of each slot of a modality, in the order of the slots."""
    found = []
    for name, values in slots.items():
        part, layer, kind = name.split(".")
        if part == modality:
            found.append((layer, kind, values.detach().float().cpu().tolist()))
    return found


def _draw(modality: str, rows: list[tuple[str, str, list[float]]]) -> Image.Image:
    """Heads as one cell each; feed-forward as a bar whose filled part is the mean of its units."""
    font, small = ImageFont.load_default(size=14), ImageFont.load_default(size=12)
    cells = max((len(values) for _, kind, values in rows if kind != "ffn"), default=0)
    width = _LABEL + max(cells * (_CELL + _GAP), _BAR) + 60 + 2 * _MARGIN
    height = _TITLE + len(rows) * (_CELL + _GAP) + 2 * _MARGIN + 18
    picture = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(picture)
    draw.text((_MARGIN, _MARGIN - 2), f"{modality}: open gates", fill=_INK, font=font)
    y = _MARGIN + _TITLE
    for layer, kind, values in rows:
        mean = sum(values) / len(values)
        name = kind.replace("_", " ")
        draw.text((_MARGIN, y + 4), f"{layer} {name}", fill=_SOFT, font=small)
        x = _MARGIN + _LABEL
        if kind == "ffn":
            draw.rectangle((x, y, x + _BAR - 1, y + _CELL - 1), fill=_CLOSED)
            if filled := round(_BAR * min(max(mean, 0.0), 1.0)):
                draw.rectangle((x, y, x + filled - 1, y + _CELL - 1), fill=_OPEN)
            end = x + _BAR
        else:
            for value in values:
                draw.rectangle((x, y, x + _CELL - 1, y + _CELL - 1), fill=_colour(value))
                x += _CELL + _GAP
            end = x
        draw.text((end + 8, y + 4), f"{mean:.0%}", fill=_INK, font=small)
        y += _CELL + _GAP
    note = "a cell is a head, a bar the share of FFN units; dark is open"
    draw.text((_MARGIN, y + 4), note, fill=_SOFT, font=small)
    return picture


def gate_heatmaps(slots: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """ "gates/MODALITY" -> picture (3, H, W) uint8: layer by head, and layer by FFN share.

    Args:
        slots: "MODALITY.LAYER.KIND" -> (U,) how open each gate is, in [0, 1]
            (GateBank.split(GateBank.probabilities_open())).
    """
    modalities = dict.fromkeys(name.split(".")[0] for name in slots)
    return {
        f"gates/{modality}": as_tensor(_draw(modality, _rows(slots, modality)))
        for modality in modalities
    }
