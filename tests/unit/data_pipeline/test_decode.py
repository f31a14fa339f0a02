"""Decoders agree, and everything that is not a whole picture is a fault."""

from __future__ import annotations

import io
import zlib

import numpy as np
import pytest
import simplejpeg
from PIL import Image

from data_pipeline import decode
from data_pipeline.decode import Picture, decode_image, image_size
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


@pytest.mark.parametrize("subsampling", [0, 1, 2])
def test_pixels_are_those_of_pil(subsampling):
    """Bit for bit, as both use libjpeg-turbo: no fast DCT, no fast upsampling."""
    pixels = np.random.default_rng(1).integers(0, 256, (50, 70, 3), dtype=np.uint8)
    raw = encode(Image.fromarray(pixels), "JPEG", quality=90, subsampling=subsampling)
    np.testing.assert_array_equal(decode_image(raw), np.asarray(Image.open(io.BytesIO(raw))))


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


def test_a_crop_shows_its_box():
    picture = Picture(encode(smooth(60, 44), "JPEG", quality=95))
    assert picture.shape == (44, 60, 3)
    whole = picture.pixels()
    np.testing.assert_array_equal(picture.crop(7, 9, 21, 30), whole[9:39, 7:28])
    np.testing.assert_array_equal(picture.crop(7, 9, 21, 30, least=11), whole[9:39, 7:28])


@pytest.mark.parametrize("size", [(60, 44), (61, 45), (64, 48)])
@pytest.mark.parametrize("box", [(0, 0, 40, 40), (7, 9, 41, 33), (8, 10, 40, 32)])
def test_half_size_crops_lie_where_full_ones_do(size, box):
    x, y, width, height = box
    picture = Picture(encode(smooth(*size), "JPEG", quality=98))
    half = picture.crop(x, y, width, height, least=16)
    left, top = x // 2, y // 2
    right, bottom = -(-(x + width) // 2), -(-(y + height) // 2)
    assert half.shape == (bottom - top, right - left, 3)
    # Pixel n of the half picture covers pixels 2n and 2n + 1 of the full one.
    full = picture.pixels().astype(float)
    full = np.pad(full, ((0, size[1] % 2), (0, size[0] % 2), (0, 0)), mode="edge")
    mean = full.reshape(full.shape[0] // 2, 2, full.shape[1] // 2, 2, 3).mean(axis=(1, 3))
    assert np.abs(half - mean[top:bottom, left:right]).max() <= 4


@pytest.mark.parametrize("kind", ["PNG", "no simplejpeg", "other scale"])
def test_full_size_where_half_cannot_be_had(kind, monkeypatch):
    raw = encode(smooth(60, 44), "PNG" if kind == "PNG" else "JPEG")
    if kind == "no simplejpeg":
        monkeypatch.setattr(decode, "_simplejpeg", lambda: None)
    elif kind == "other scale":

        class Stubborn:
            @staticmethod
            def decode_jpeg(raw, min_factor=1, min_height=0, min_width=0, **options):
                return simplejpeg.decode_jpeg(raw, **options)

        monkeypatch.setattr(decode, "_simplejpeg", lambda: Stubborn)
    assert Picture(raw).crop(2, 2, 50, 40, least=8).shape == (40, 50, 3)


def test_damaged_pictures_are_faults_before_anything_is_decoded():
    raw = encode(smooth(64, 64), "JPEG")
    for bad in (raw[:200], raw[: len(raw) // 2], b"", b"GIF89a"):
        with pytest.raises(SkipSample):
            Picture(bad)
    assert Picture(raw, max_pixels=64 * 64).shape == (64, 64, 3)
    with pytest.raises(SkipSample, match="64x64"):
        Picture(raw, max_pixels=64 * 64 - 1)


def test_size_comes_from_the_header():
    assert image_size(encode(smooth(40, 24), "JPEG")) == (40, 24)
    assert image_size(encode(smooth(40, 24), "PNG")) == (40, 24)


HEADER, END = 8 + 25, -12  # of a PNG: behind its first chunk, and before its last


def with_chunk(raw: bytes, kind: bytes, data: bytes, after: int) -> bytes:
    """A PNG with one more chunk at byte `after`."""
    chunk = len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")
    return raw[:after] + chunk + raw[after:]


@pytest.mark.parametrize("data", [b"", b"\0", b"name\0"])
def test_malformed_pngs_are_faults(data):
    """PIL raises IndexError for a colour profile that ends early."""
    with pytest.raises(SkipSample, match="cannot be decoded") as caught:
        decode_image(with_chunk(encode(smooth(8, 8), "PNG"), b"iCCP", data, END))
    assert caught.value.kind == "decode"


def test_a_second_header_is_a_fault():
    raw = encode(smooth(8, 8), "PNG")
    other = raw[16:20] + (4).to_bytes(4, "big") + raw[24:29]
    with pytest.raises(SkipSample, match="another size"):
        decode_image(with_chunk(raw, b"IHDR", other, HEADER))


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
