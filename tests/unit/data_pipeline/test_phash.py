"""The perceptual hash on pictures that were changed, and its search against brute force."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data_pipeline.faults import SkipSample
from data_pipeline.phash import (
    MAX_DISTANCE,
    NO_HASH,
    _best_bands,
    hash_grey,
    nearest,
    picture_hash,
)
from tests.unit.data_pipeline.published import encode, photo


def cut(image: Image.Image, share: float) -> Image.Image:
    x, y = round(image.width * share), round(image.height * share)
    return image.crop((x, y, image.width - x, image.height - y))


def apart(one: int, other: int) -> int:
    return (one ^ other).bit_count()


CHANGES = {
    "png": lambda image: encode(image, "PNG"),
    "quality 30": lambda image: encode(image, quality=30),
    "half": lambda image: encode(image.resize((160, 120), Image.Resampling.BICUBIC), quality=80),
    "small": lambda image: encode(image.resize((64, 48), Image.Resampling.LANCZOS), quality=75),
    "square": lambda image: encode(image.resize((256, 256), Image.Resampling.BICUBIC)),
    "enlarged": lambda image: encode(image.resize((960, 720), Image.Resampling.NEAREST)),
    "grey": lambda image: encode(image.convert("L")),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_picture_that_was_stored_anew_keeps_its_hash(change):
    gaps = [
        apart(picture_hash(encode(photo(seed))), picture_hash(CHANGES[change](photo(seed))))
        for seed in range(12)
    ]
    assert max(gaps) <= MAX_DISTANCE, gaps


def test_what_a_cut_edge_does_to_the_hash():
    """1 % at each side is mostly found, a tenth never: so says the module's table."""
    whole = [picture_hash(encode(photo(seed))) for seed in range(20)]
    little = [apart(h, picture_hash(encode(cut(photo(s), 0.01)))) for s, h in enumerate(whole)]
    much = [apart(h, picture_hash(encode(cut(photo(s), 0.1)))) for s, h in enumerate(whole)]
    assert np.mean(np.array(little) <= MAX_DISTANCE) >= 0.8, little
    assert min(much) > MAX_DISTANCE, much


def test_different_pictures_are_far_apart():
    hashes = [picture_hash(encode(photo(seed))) for seed in range(60)]
    gaps = [apart(a, b) for n, a in enumerate(hashes) for b in hashes[:n]]
    assert min(gaps) > 3 * MAX_DISTANCE
    assert 30 < np.mean(gaps) < 34, "the bits are about fair and independent"


def test_every_bit_is_the_sign_of_its_frequency():
    """One cosine at a time, on top of a picture whose coefficients are all negative."""
    k = np.arange(32)
    seen = set()
    for u in range(12):
        for v in range(12):
            wave = np.cos(np.pi * (2 * k + 1) * u / 64)[:, None] * np.cos(
                np.pi * (2 * k + 1) * v / 64
            )
            below = -sum(
                np.cos(np.pi * (2 * k + 1) * a / 64)[:, None] * np.cos(np.pi * (2 * k + 1) * b / 64)
                for a in range(12)
                for b in range(12)
            )
            value = hash_grey(128 + below + 3 * wave)
            assert value.bit_count() <= 1
            seen.add((u, v, value)) if value else None
    assert len(seen) == 64 and len({value for *_, value in seen}) == 64
    used = {(u, v) for u, v, _ in seen}
    assert (0, 0) not in used and {(0, 1), (1, 0), (5, 5), (0, 9)} <= used and (0, 11) not in used


def test_blank_pictures_have_no_hash():
    ramp = Image.fromarray(np.tile(np.arange(0, 256, dtype=np.uint8), (200, 1)))
    blank = Image.new("RGB", (300, 200), (250, 250, 250))
    assert picture_hash(encode(blank)) == picture_hash(encode(ramp, "PNG")) == NO_HASH
    assert nearest(np.array([NO_HASH, 3]), np.array([NO_HASH, 3]))[0].tolist() == [-1, 1]


def test_transparent_pictures_are_hashed_as_they_are_shown():
    image = photo(1).convert("RGBA")
    image.putalpha(Image.fromarray(np.tile(np.linspace(0, 255, 320).astype(np.uint8), (240, 1))))
    ground = Image.new("RGBA", image.size, (255, 255, 255, 255))
    shown = Image.alpha_composite(ground, image).convert("RGB")
    assert picture_hash(encode(image, "PNG")) == picture_hash(encode(shown, "PNG"))


@pytest.mark.parametrize(
    "raw", [b"", b"GIF89a", encode(photo(0))[:3000], encode(photo(0), "PNG")[:3000]]
)
def test_damaged_pictures_are_told(raw):
    with pytest.raises(SkipSample):
        picture_hash(raw)


def test_a_header_that_claims_gigabytes_is_refused():
    raw = bytearray(encode(photo(0), "PNG"))
    raw[16:24] = (60000).to_bytes(4, "big") * 2
    with pytest.raises(SkipSample, match="60000x60000"):
        picture_hash(bytes(raw))


# -- the search -----------------------------------------------------------------------------------


def brute(hashes, queries, distance):
    index, gap = [], []
    for value in hashes:
        best = min(
            ((apart(value, q), n) for n, q in enumerate(queries) if q and value),
            default=(999, -1),
        )
        index.append(best[1] if best[0] <= distance else -1)
        gap.append(best[0] if best[0] <= distance else 255)
    return index, gap


@st.composite
def crowded(draw):
    """Hashes that lie around a few centres, so that all distances occur, and equal ones."""
    centres = draw(st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=3))
    bits = st.lists(st.integers(0, 63), max_size=12)
    values = st.builds(
        lambda centre, flips: centre ^ sum(1 << b for b in set(flips)),
        st.sampled_from(centres),
        bits,
    )
    some = st.lists(st.one_of(values, st.just(0)), max_size=25)
    return draw(some), draw(some)


@settings(max_examples=120, deadline=None)
@given(crowded(), st.integers(0, 16), st.sampled_from([None, 4, 5, 7, 10, 16]))
def test_search_equals_brute_force(sides, distance, bands):
    hashes, queries = sides
    if bands == 4 and distance > 8:
        distance = 8  # 16-bit bands with three flips and more are right but slow
    index, gap = nearest(np.array(hashes, np.uint64), np.array(queries, np.uint64), distance, bands)
    assert (index.tolist(), gap.tolist()) == brute(hashes, queries, distance)


@pytest.mark.parametrize("bands", [None, 3, 6])
def test_search_finds_what_was_hidden_among_many(bands, monkeypatch):
    monkeypatch.setattr("data_pipeline.phash._CANDIDATES", 1000)
    monkeypatch.setattr("data_pipeline.phash._PROBES", 3000)
    rng = np.random.default_rng(0)
    hashes = rng.integers(1, 2**64, 20_000, dtype=np.uint64)
    queries = rng.integers(1, 2**64, 500, dtype=np.uint64)
    hidden = rng.permutation(20_000)[:50]
    for number, place in enumerate(hidden):
        flips = rng.choice(64, number % 6, replace=False)
        hashes[place] = int(queries[number]) ^ sum(1 << int(bit) for bit in flips)
    index, gap = nearest(hashes, queries, 4, bands)
    expected = {int(p): n for n, p in enumerate(hidden) if n % 6 <= 4}
    assert {int(p): int(index[p]) for p in np.flatnonzero(index >= 0)} == expected
    assert all(gap[p] == n % 6 for p, n in expected.items())


def test_millions_are_searched_in_few_bands():
    """The cost model: long bands for millions of hashes, short ones where tables would cost."""
    assert _best_bands(4_000_000, 200_000, 4) == 3
    assert _best_bands(50, 50, 4) > 4


def test_search_refuses_what_it_cannot_do():
    with pytest.raises(ValueError, match="distance 17"):
        nearest(np.array([1]), np.array([1]), 17)
    with pytest.raises(ValueError, match="bands 2"):
        nearest(np.array([1]), np.array([1]), 4, 2)
