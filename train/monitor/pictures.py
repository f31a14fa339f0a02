"""Example pictures with their text below them, as one image."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

__all__ = [
    "answer_caption",
    "as_tensor",
    "caption_grid",
    "draw_boxes",
    "framed",
    "kept_patches",
    "overlay",
]

_FONT_SIZE = 14
_LINE = 18
_MARGIN = 6
# Smaller pictures are enlarged, or the text below them would not fit.
_MIN_SIDE = 192
_MAX_LINES = 6
_DARK, _VEIL, _EDGE = 0.2, (34, 38, 62), "#9aa5a0"  # what is left of a dropped patch


def answer_caption(question: str, prediction: str, answer: str) -> str:
    """Question, prediction and right answer on three lines."""
    verdict = "right" if prediction == answer else "wrong"
    return f"{question}\nsays: {prediction} ({verdict})\nanswer: {answer}"


def _wrap(text: str, font: ImageFont.ImageFont | ImageFont.FreeTypeFont, width: int) -> list[str]:
    """Breaks text at spaces, or inside longer words, into lines of at most `width` pixels."""
    lines: list[str] = []
    for paragraph in text.split("\n"):
        line = ""
        for word in paragraph.split(" "):
            longer = f"{line} {word}" if line else word
            if font.getlength(longer) <= width:
                line = longer
                continue
            if line:
                lines.append(line)
            while len(word) > 1 and font.getlength(word) > width:
                cut = max(1, int(len(word) * width / font.getlength(word)))
                lines.append(word[:cut])
                word = word[cut:]
            line = word
        lines.append(line)
    if len(lines) > _MAX_LINES:
        lines = [*lines[: _MAX_LINES - 1], lines[_MAX_LINES - 1] + " ..."]
    return lines


def draw_boxes(image: Tensor, boxes: Sequence[tuple[Sequence[float], str]]) -> Tensor:
    """The picture (3, H, W) uint8 with frames drawn into it, enlarged where it is small.

    Args:
        boxes: normalised (cx, cy, w, h), and the frame's colour; later ones lie on top.
    """
    picture = _picture(_enlarged(image))
    width, height = picture.size
    draw, line = ImageDraw.Draw(picture), max(2, width // 96)
    for (cx, cy, w, h), colour in boxes:
        left, right = sorted(((cx - w / 2) * width, (cx + w / 2) * width))
        top, bottom = sorted(((cy - h / 2) * height, (cy + h / 2) * height))
        corners = (max(0, left), max(0, top), min(width - 1, right), min(height - 1, bottom))
        if corners[0] <= corners[2] and corners[1] <= corners[3]:  # some of it is in the picture
            draw.rectangle(corners, outline=colour, width=line)
    return as_tensor(picture)


def overlay(image: Tensor, weights: Tensor) -> Tensor:
    """The picture (3, H, W) uint8 in grey, with weights (g, g) >= 0 of its patches in colour above.

    The largest weight is red whatever its size: the picture shows where, not how much.
    """
    large = _enlarged(image).float()
    heat = weights.detach().float().cpu()
    heat = heat / heat.max().clamp_min(1e-12)
    heat = F.interpolate(heat[None, None], size=large.shape[1:], mode="bilinear")[0, 0]
    grey = large.mean(dim=0, keepdim=True).expand(3, -1, -1) * 0.6 + 60
    # From yellow to red; as opaque as the weight is large.
    colour = torch.stack(
        [torch.full_like(heat, 225), 190 * (1 - heat) + 20, torch.zeros_like(heat)]
    )
    opacity = 0.85 * heat**1.5
    return (grey * (1 - opacity) + colour * opacity).clamp(0, 255).to(torch.uint8)


def kept_patches(image: Tensor, kept: Tensor, label: str = "") -> Tensor:
    """The picture (3, H, W) uint8, enlarged where it is small, its patches dark and bluish that
    are not in `kept` (g, g) bool, with a label in its corner.
    """
    large = _enlarged(image)
    mask = F.interpolate(kept.detach().cpu().float()[None, None], size=large.shape[1:])[0] > 0
    veil = torch.tensor(_VEIL).view(3, 1, 1)  # dark pictures have dark patches that stay
    dark = (large.float() * _DARK + veil).to(torch.uint8)
    picture = _picture(torch.where(mask, large, dark))
    if label:
        draw, font = ImageDraw.Draw(picture), ImageFont.load_default(size=_FONT_SIZE)
        box = draw.textbbox((3, 1), label, font=font)
        draw.rectangle((0, 0, box[2] + 3, box[3] + 3), fill="white")
        draw.text((3, 1), label, fill="black", font=font)
    line = ImageDraw.Draw(picture)
    line.rectangle((0, 0, picture.width - 1, picture.height - 1), outline=_EDGE)
    return as_tensor(picture)


def framed(image: Tensor, colour: str) -> Tensor:
    """The picture (3, H, W) uint8 inside a frame of its own size, enlarged where it is small."""
    return draw_boxes(image, [((0.5, 0.5, 1.0, 1.0), colour)])


def _enlarged(image: Tensor) -> Tensor:
    """(3, H, W) uint8 on the CPU, whole-number times as large so that details can be drawn."""
    times = max(1, math.ceil(_MIN_SIDE / image.shape[2]))
    return image.cpu().repeat_interleave(times, 1).repeat_interleave(times, 2)


def _picture(image: Tensor) -> Image.Image:
    return Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())


def as_tensor(picture: Image.Image) -> Tensor:
    """A picture as (3, H, W) uint8."""
    flat = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
    return flat.view(picture.height, picture.width, 3).permute(2, 0, 1).contiguous()


def caption_grid(images: Tensor, captions: Sequence[str], columns: int | None = None) -> Tensor:
    """Pictures in rows, each with its caption below.

    Args:
        images: (N, 3, H, W) uint8.   captions: N strings; newlines are kept, long lines are
            wrapped.
        columns: default the square root of N, rounded up.

    Returns:
        (3, height, width) uint8 on the CPU.

    Raises:
        ValueError: no picture, another shape or type, or not one caption a picture.
    """
    if images.ndim != 4 or images.shape[1] != 3 or images.dtype != torch.uint8 or not len(images):
        raise ValueError(
            f"pictures must be (N, 3, H, W) uint8, N > 0, got {tuple(images.shape)} {images.dtype}"
        )
    if len(captions) != len(images):
        raise ValueError(f"{len(images)} pictures but {len(captions)} captions")
    count, _, height, width = images.shape
    columns = min(count, columns or math.ceil(math.sqrt(count)))
    enlarge = max(1, math.ceil(_MIN_SIDE / width))
    cell_w, cell_h = width * enlarge, height * enlarge
    font = ImageFont.load_default(size=_FONT_SIZE)
    wrapped = [_wrap(caption, font, cell_w) for caption in captions]
    row_h = cell_h + max(len(lines) for lines in wrapped) * _LINE + 2 * _MARGIN
    rows = math.ceil(count / columns)
    canvas = Image.new(
        "RGB", (columns * (cell_w + _MARGIN) + _MARGIN, rows * row_h + _MARGIN), "white"
    )
    draw = ImageDraw.Draw(canvas)
    pixels = images.cpu().permute(0, 2, 3, 1).contiguous().numpy()
    for i, lines in enumerate(wrapped):
        x = _MARGIN + (i % columns) * (cell_w + _MARGIN)
        y = _MARGIN + (i // columns) * row_h
        picture = Image.fromarray(pixels[i]).resize((cell_w, cell_h), Image.Resampling.NEAREST)
        canvas.paste(picture, (x, y))
        for n, line in enumerate(lines):
            draw.text((x, y + cell_h + 4 + n * _LINE), line, fill="black", font=font)
    return as_tensor(canvas)
