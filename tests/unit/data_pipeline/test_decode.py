"""Decoders agree, and everything that is not a whole picture is a fault."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from data_pipeline import decode
from data_pipeline.decode import decode_image, image_size
from data_pipeline.faults import SkipSample


def smooth(width: int, height: int) -> Image.Image:
    rows, columns = np.mgrid[0:height, 0:width]
    pixels = np.stack([rows * 255 / height, columns * 255 / width, 0 * rows + 90], axis=-1)
    return Image.fromarray(pixels.astype(np.uint8))


def encode(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}])
def test_jpeg_close_to_pil(options):
    raw = encode(smooth(40, 24), "JPEG", quality=95, **options)
    found = decode_image(raw)
    assert found.shape == (24, 40, 3) and found.dtype == np.uint8
    expected = np.asarray(Image.open(io.BytesIO(raw)), np.int16)
    assert np.abs(found - expected).max() <= 6


@pytest.mark.parametrize("first", ["simplejpeg", "torchvision", "pil"])
def test_each_fallback_decodes(first, monkeypatch):
    raw = encode(smooth(32, 16), "JPEG", quality=95)
    expected = decode_image(raw).astype(np.int16)
    if first != "simplejpeg":
        monkeypatch.setattr(decode, "_simplejpeg", lambda: None)
    if first == "pil":
        monkeypatch.setattr(decode, "_torchvision_io", lambda: None)
    assert np.abs(decode_image(raw) - expected).max() <= 6


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA", "1"])
def test_png_modes(mode):
    image = smooth(20, 10).convert(mode)
    found = decode_image(encode(image, "PNG"))
    expected = np.asarray(image.convert("RGB"))
    np.testing.assert_array_equal(found, expected)


def test_transparent_pixels_are_white():
    image = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    assert (decode_image(encode(image, "PNG")) == 255).all()


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_grey_and_print_jpegs_become_rgb(mode):
    raw = encode(smooth(16, 16).convert(mode), "JPEG", quality=95)
    assert decode_image(raw).shape == (16, 16, 3)


def test_cut_jpegs_are_faults():
    raw = encode(smooth(64, 64), "JPEG")
    for length in range(0, len(raw) - 1, 37):
        with pytest.raises(SkipSample) as caught:
            decode_image(raw[:length])
        assert caught.value.kind == "decode"


def test_cut_pngs_are_faults():
    raw = encode(smooth(64, 64), "PNG")
    for length in range(0, len(raw) - 20, 97):
        with pytest.raises(SkipSample):
            decode_image(raw[:length])


def test_size_comes_from_the_header():
    assert image_size(encode(smooth(40, 24), "JPEG")) == (40, 24)
    assert image_size(encode(smooth(40, 24), "PNG")) == (40, 24)


def test_huge_claims_are_refused_before_decoding():
    raw = bytearray(encode(smooth(8, 8), "PNG"))
    raw[16:24] = (60_000).to_bytes(4, "big") * 2
    with pytest.raises(SkipSample, match="60000x60000") as caught:
        decode_image(bytes(raw))
    assert caught.value.kind == "pixels"


@pytest.mark.parametrize("raw", [b"", b"GIF89a", b"\xff\xd8\xff", b"<svg/>" * 10])
def test_other_files_are_faults(raw):
    with pytest.raises(SkipSample):
        decode_image(raw)
