"""JPEG and PNG bytes to (H, W, 3) uint8 RGB arrays: simplejpeg, then torchvision, then PIL.

The fast decoders are strict; PIL opens some odd files that they reject, so a JPEG is bad only when
all say so.
The number of pixels is read from the header first: a small file can claim gigabytes.
"""

from __future__ import annotations

import io
import warnings
from functools import cache
from types import ModuleType

import numpy as np

from data_pipeline.faults import SkipSample

__all__ = ["MAX_PIXELS", "Picture", "decode_image", "image_size"]

MAX_PIXELS = 64_000_000
_JPEG = b"\xff\xd8"
_PNG = b"\x89PNG\r\n\x1a\n"
# Start-of-frame markers; C4, C8 and CC are other tables.
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}


@cache
def _simplejpeg() -> ModuleType | None:
    try:
        import simplejpeg
    except ImportError:
        return None
    return simplejpeg


@cache
def _torchvision_io() -> ModuleType | None:
    try:
        import torchvision.io
    except (ImportError, RuntimeError):
        return None
    return torchvision.io


def image_size(raw: bytes) -> tuple[int, int]:
    """(width, height) from the header alone.

    Raises:
        SkipSample: neither JPEG nor PNG, or the header is cut.
    """
    if raw[:8] == _PNG and len(raw) >= 24:
        return int.from_bytes(raw[16:20], "big"), int.from_bytes(raw[20:24], "big")
    if raw[:2] != _JPEG:
        raise SkipSample("decode", "the image is neither JPEG nor PNG")
    position = 2
    while position + 9 <= len(raw):
        if raw[position] != 0xFF:
            break
        marker = raw[position + 1]
        if marker == 0xFF:  # fill byte
            position += 1
        elif marker in _FRAMES:
            height = int.from_bytes(raw[position + 5 : position + 7], "big")
            return int.from_bytes(raw[position + 7 : position + 9], "big"), height
        elif marker == 0x01 or 0xD0 <= marker <= 0xD7:
            position += 2
        else:
            position += 2 + int.from_bytes(raw[position + 2 : position + 4], "big")
    raise SkipSample("decode", "the JPEG header is damaged")


def _complete(raw: bytes) -> bool:
    """True when a JPEG has its end mark. Decoders fill a cut picture with grey and only warn."""
    return raw.rfind(b"\xff\xd9", max(0, len(raw) - 4096)) >= 0


def _decode_jpeg(raw: bytes) -> np.ndarray:
    if (module := _simplejpeg()) is not None:
        try:
            # The fast DCT and the fast upsampling would save a tenth of the time, and move pixels
            # by 1.7 of 255 on average (at most 56); without them the pixels are those of PIL.
            return module.decode_jpeg(raw, colorspace="RGB", fastdct=False, fastupsample=False)
        except ValueError:
            pass  # strict; the others decide
    if (module := _torchvision_io()) is not None:
        import torch

        try:
            data = torch.frombuffer(bytearray(raw), dtype=torch.uint8)
            decoded = module.decode_jpeg(data, mode=module.ImageReadMode.RGB)
            return decoded.permute(1, 2, 0).contiguous().numpy()
        except RuntimeError:
            pass
    return _decode_pil(raw)


def _decode_half(raw: bytes, width: int, height: int) -> np.ndarray | None:
    """A JPEG at half its size, rounded up; None where only the other decoders can read it."""
    if (module := _simplejpeg()) is None:
        return None
    half = (height + 1) // 2, (width + 1) // 2
    try:
        image = module.decode_jpeg(
            raw, colorspace="RGB", fastdct=False, fastupsample=False,
            min_height=half[0], min_width=half[1], min_factor=2,
        )  # fmt: skip
    except ValueError:
        return None
    return image if image.shape[:2] == half else None


def _decode_pil(raw: bytes) -> np.ndarray:
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(raw)) as image:
                # Transparent pictures are shown on white, as browsers do.
                if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
                    image = image.convert("RGBA")
                    ground = Image.new("RGBA", image.size, (255, 255, 255, 255))
                    image = Image.alpha_composite(ground, image)
                return np.array(image.convert("RGB"))
    except MemoryError:
        raise
    except Exception as error:  # of bad files PIL raises nearly everything, IndexError for instance
        reason = f"the image cannot be decoded: {error or type(error).__name__}"
        raise SkipSample("decode", reason) from None


class Picture:
    """An encoded picture whose header was checked; its pixels are decoded when they are asked for.

    By then the crop is known, and a large JPEG of which little is needed can be decoded at half
    size: the inverse DCT itself scales by 1/2, and both it and the resize have less to do.

    Args:
        raw: JPEG or PNG.   max_pixels: larger pictures are refused before anything is decoded.

    Attributes:
        shape: (height, width, 3) of the full picture.

    Raises:
        SkipSample: not an image, cut, or larger than `max_pixels`.
    """

    __slots__ = ("_raw", "shape")

    def __init__(self, raw: bytes, max_pixels: int = MAX_PIXELS) -> None:
        width, height = image_size(raw)
        if width * height > max_pixels:
            raise SkipSample("pixels", f"the image has {width}x{height} pixels, limit {max_pixels}")
        if width == 0 or height == 0:
            raise SkipSample("decode", "the image has no pixels")
        if raw[:2] == _JPEG and not _complete(raw):
            raise SkipSample("decode", "the JPEG is cut (no end mark)")
        self._raw = raw
        self.shape = (height, width, 3)

    def pixels(self) -> np.ndarray:
        """(H, W, 3) uint8 RGB.

        Raises:
            SkipSample: undecodable.
        """
        decoded = _decode_jpeg(self._raw) if self._raw[:2] == _JPEG else _decode_pil(self._raw)
        if decoded.shape != self.shape:  # a second header: decoders take the last one
            raise SkipSample("decode", "the image has another size than its header says")
        return decoded

    def crop(self, x: int, y: int, width: int, height: int, least: int = 0) -> np.ndarray:
        """The pixels of a box; half as many a side when it is at least 2 * `least` on both sides.

        A box with odd edges grows to the next even pixel. `least` 0 always gives all pixels.

        Raises:
            SkipSample: undecodable.
        """
        if least and min(width, height) >= 2 * least and self._raw[:2] == _JPEG:
            half = _decode_half(self._raw, self.shape[1], self.shape[0])
            if half is not None:
                return half[y // 2 : (y + height + 1) // 2, x // 2 : (x + width + 1) // 2]
        return self.pixels()[y : y + height, x : x + width]


def decode_image(raw: bytes, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """(H, W, 3) uint8 RGB.

    Raises:
        SkipSample: not an image, cut, undecodable, or larger than `max_pixels`.
    """
    return Picture(raw, max_pixels).pixels()
