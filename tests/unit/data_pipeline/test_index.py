"""The index: every tar dialect is read, and every damage is reported."""

from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path

import pytest
import xxhash
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_pipeline import tar_headers
from data_pipeline.index import (
    INDEX_VERSION,
    MAX_MEMBER_BYTES,
    ShardError,
    build_index,
    checksum,
    current_index,
    index_path,
    load_index,
    open_index,
)


def write_tar(
    path: Path, members: list[tuple[str, bytes]], kind: int = tarfile.USTAR_FORMAT, **pax
):
    with tarfile.open(path, "w", format=kind) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            info.pax_headers = pax
            tar.addfile(info, io.BytesIO(data))


def read_back(path: Path) -> dict[str, dict[str, bytes]]:
    """Samples by slicing the file where the index says; their checksums must be right."""
    index = load_index(path)
    raw = path.read_bytes()
    assert index.xxh3 == xxhash.xxh3_64_hexdigest(raw)
    samples: dict[str, dict[str, bytes]] = {}
    for number in range(len(index)):
        sample = samples.setdefault(index.key(number), {})
        for extension, offset, size, check in index.members(number):
            sample[extension] = raw[offset : offset + size]
            assert check == xxhash.xxh3_64_intdigest(sample[extension]) % 2**32
    return samples


SAMPLES = [
    (f"s{number}.{extension}", bytes([number + 1]) * size)
    for number in range(8)
    for extension, size in (("cls", 0), ("jpg", 700 + number), ("json", 30))
]


@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("prefix", ["", "folder/" * 14, "deep_folder_name/" * 20])
def test_all_dialects_and_long_names(tmp_path, kind, prefix):
    if kind == tarfile.USTAR_FORMAT and len(prefix) > 150:
        pytest.skip("ustar cannot hold such a name")
    path = tmp_path / "x.tar"
    write_tar(path, [(prefix + name, data) for name, data in SAMPLES], kind)
    build_index(path)
    expected: dict[str, dict[str, bytes]] = {}
    for name, data in SAMPLES:
        key, extension = name.split(".")
        expected.setdefault(prefix + key, {})[extension] = data
    assert read_back(path) == expected


def test_pax_headers_with_float_times(tmp_path):
    path = tmp_path / "x.tar"
    write_tar(path, SAMPLES, tarfile.PAX_FORMAT, mtime="1700000000.25", comment="\u00e4 = b")
    build_index(path)
    assert len(read_back(path)) == 8


def sign(header: bytearray, signed: bool = False) -> None:
    """Write the checksum of a header, as old writers summed it if `signed`."""
    header[148:156] = b" " * 8
    total = sum(byte - 256 if signed and byte > 127 else byte for byte in header)
    header[148:156] = b"%06o\0 " % (total % 8**6)


def change_header(path: Path, place: int, content: bytes, signed: bool = False) -> None:
    """Change the first header of a tar and sign it again."""
    raw = bytearray(path.read_bytes())
    header = raw[:512]
    header[place : place + len(content)] = content
    sign(header, signed)
    path.write_bytes(bytes(header) + raw[512:])


def test_base_256_size(tmp_path):
    path = tmp_path / "x.tar"
    write_tar(path, [("a.bin", b"y" * 600)])
    change_header(path, 124, b"\x80" + (600).to_bytes(11, "big"))
    build_index(path)
    assert read_back(path) == {"a": {"bin": b"y" * 600}}


def test_pax_size_wins_over_the_header(tmp_path):
    path = tmp_path / "x.tar"
    write_tar(path, [("a.bin", b"y" * 600), ("b.bin", b"z")], tarfile.PAX_FORMAT, comment="c")
    raw = bytearray(path.read_bytes())
    record = b"12 size=600\n"
    raw[124:136] = b"%011o\0" % len(record)
    raw[512:1024] = record.ljust(512, b"\0")
    header = raw[1024:1536]
    header[124:136] = b"%011o\0" % 0
    for start, block in ((0, raw[:512]), (1024, header)):
        sign(block)
        raw[start : start + 512] = block
    path.write_bytes(raw)
    build_index(path)
    assert read_back(path) == {"a": {"bin": b"y" * 600}, "b": {"bin": b"z"}}
    raw[512:524] = b"12 size=6x0\n"
    path.write_bytes(raw)
    with pytest.raises(ShardError, match="PAX size"):
        build_index(path)


@pytest.mark.parametrize("signed", [False, True])
def test_header_sums_of_old_and_new_writers(tmp_path, signed):
    path = tmp_path / "x.tar"
    write_tar(path, [("a.bin", b"y")])
    change_header(path, 0, ("\u00ff" * 20).encode() + b"x.bin", signed)
    build_index(path)
    assert [len(sample) for sample in read_back(path).values()] == [1]


def test_folders_links_and_notes_are_passed_over(tmp_path):
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w") as tar:
        for kind, name in ((tarfile.DIRTYPE, "d"), (tarfile.SYMTYPE, "d/link.jpg")):
            info = tarfile.TarInfo(name)
            info.type = kind
            info.linkname = "a.jpg"
            tar.addfile(info)
        for name in ("__meta__", "README", "d/a.JPG"):
            info = tarfile.TarInfo(name)
            info.size = 3
            tar.addfile(info, io.BytesIO(b"abc"))
    build_index(path)
    assert read_back(path) == {"d/a": {"jpg": b"abc"}}


def test_every_cut_is_reported(tmp_path):
    whole = tmp_path / "x.tar"
    write_tar(whole, SAMPLES)
    raw = whole.read_bytes()
    end = len(raw.rstrip(b"\0"))
    end += -end % 512
    cut = tmp_path / "cut.tar"
    for length in [*range(0, end + 1, 512), 100, 513, 1200, end - 1]:
        cut.write_bytes(raw[:length])
        with pytest.raises(ShardError, match="cut.tar"):
            build_index(cut)
        assert not index_path(cut).exists()


def test_every_zeroed_or_changed_header_is_reported(tmp_path):
    path = tmp_path / "x.tar"
    write_tar(path, SAMPLES)
    raw = path.read_bytes()
    with tarfile.open(path) as tar:
        headers = [member.offset for member in tar.getmembers()]
    for offset in headers:
        for damage in (bytes(512), b"\0" * 100, b"Z" * 10):
            broken = raw[:offset] + damage + raw[offset + len(damage) :]
            path.write_bytes(broken)
            with pytest.raises(ShardError):
                build_index(path)


@given(st.one_of(st.binary(min_size=512, max_size=512), st.just(b"\xff" * 512)))
def test_the_fast_header_sum_is_the_plain_one(block):
    assert tar_headers._sum(block) == sum(block[:148]) + 8 * 32 + sum(block[156:])


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(place=st.integers(0, 511), bit=st.integers(0, 7), header=st.integers(0, 23))
def test_no_flipped_header_bit_changes_the_samples_unnoticed(tmp_path, place, bit, header):
    path = tmp_path / "x.tar"
    write_tar(path, SAMPLES)
    with tarfile.open(path) as tar:
        offset = tar.getmembers()[header].offset
    raw = bytearray(path.read_bytes())
    build_index(path)
    before = read_back(path)
    raw[offset + place] ^= 1 << bit
    path.write_bytes(raw)
    try:
        build_index(path)
    except ShardError:
        return
    assert read_back(path) == before  # only in the spare bytes of the checksum field


@pytest.mark.parametrize(
    "name", ["/etc/a.jpg", "../a.jpg", "a/../../b.jpg", "..", "a/..", "/README"]
)
def test_names_that_leave_the_folder_are_refused(tmp_path, name):
    path = tmp_path / "x.tar"
    write_tar(path, [("a..b/c..jpg", b"1"), ("..d.jpg", b"2")])
    assert len(build_index(path)) == 1  # dots in names are harmless
    index_path(path).unlink()
    write_tar(path, [("a.jpg", b"1"), (name, b"2")])
    with pytest.raises(ShardError, match=r"x\.tar: member .* path"):
        build_index(path)
    assert not index_path(path).exists()


def test_huge_members_are_refused(tmp_path):
    path = tmp_path / "x.tar"
    info = tarfile.TarInfo("a.jpg")
    for size, refused in ((MAX_MEMBER_BYTES, False), (MAX_MEMBER_BYTES + 1, True)):
        info.size = size
        path.write_bytes(info.tobuf(tarfile.USTAR_FORMAT))
        os.truncate(path, 512 + size + -size % 512 + 1024)  # a hole: nothing is written
        if refused:
            with pytest.raises(ShardError, match=r"'a\.jpg' has 268435457 bytes, the limit is"):
                build_index(path)
        else:
            assert build_index(path).members(0)[0].size == size


def test_extended_headers_have_a_limit(tmp_path):
    path = tmp_path / "x.tar"
    write_tar(path, [("a.jpg", b"y" * (3 << 20))])
    change_header(path, 156, b"x")
    with pytest.raises(ShardError, match="extended header of 3145728 bytes"):
        build_index(path)


def test_unknown_kinds_of_members_are_refused(tmp_path):
    path = tmp_path / "x.tar"
    write_tar(path, [("a.jpg", b"y")])
    for kind in (b"S", b"M", b"Q"):
        change_header(path, 156, kind)
        with pytest.raises(ShardError, match=f"type {kind!r}"):
            build_index(path)


def test_a_long_tail_of_zeros_is_reported(tmp_path):
    path = tmp_path / "x.tar"
    write_tar(path, SAMPLES)
    end = len(path.read_bytes().rstrip(b"\0"))
    end += -end % 512
    os.truncate(path, end + (1 << 20))
    assert len(build_index(path)) == 8
    os.truncate(path, end + (1 << 20) + 2048)
    with pytest.raises(ShardError, match=rf"truncate -s {end + 1024} .*x\.tar$"):
        build_index(path)


def test_split_and_repeated_samples_are_refused(tmp_path):
    path = tmp_path / "x.tar"
    write_tar(path, [("a.jpg", b"1"), ("b.jpg", b"2"), ("a.json", b"{}")])
    with pytest.raises(ShardError, match="not adjacent"):
        build_index(path)
    write_tar(path, [("a.jpg", b"1"), ("a.jpg", b"2")])
    with pytest.raises(ShardError, match="two members"):
        build_index(path)


@pytest.mark.parametrize(
    ("raw", "suffix", "tool"),
    [
        (b"\x1f\x8b\x08", ".gz", "gunzip"),
        (b"\x28\xb5\x2f\xfd", ".zst", "zstd -d --rm"),
        (b"BZh9", ".bz2", "bunzip2"),
        (b"\xfd7zXZ\0", ".xz", "unxz"),
    ],
)
def test_compressed_shards_are_refused_with_the_command(tmp_path, raw, suffix, tool):
    path = tmp_path / "x.tar"
    path.write_bytes(raw + bytes(600))
    with pytest.raises(ShardError) as refused:
        build_index(path)
    command = f"mv {path} {path}{suffix} && {tool} {path}{suffix}"
    assert str(refused.value).endswith(f"{command} && espalier data index {tmp_path}")


def test_missing_shards(tmp_path):
    with pytest.raises(FileNotFoundError, match="none.tar"):
        build_index(tmp_path / "none.tar")


def test_an_index_of_another_shard_is_refused(tmp_path):
    path = tmp_path / "x.tar"
    with pytest.raises(FileNotFoundError, match="no such shard"):
        load_index(path)
    write_tar(path, SAMPLES)
    with pytest.raises(ShardError, match="espalier data index"):
        load_index(path)
    build_index(path)
    path.write_bytes(path.read_bytes() + bytes(512))
    with pytest.raises(ShardError, match="indexed at"):
        load_index(path)
    build_index(path)
    index = index_path(path)
    whole = index.read_bytes()
    for damaged in (b"", whole[:8], whole[:40], whole[:-1], b"other" + whole[5:], whole + b"\0"):
        index.write_bytes(damaged)
        with pytest.raises(ShardError, match="espalier data index"):
            load_index(path)


def test_any_flipped_bit_of_an_index_is_noticed(tmp_path):
    path = tmp_path / "x.tar"
    write_tar(path, SAMPLES[:6])
    build_index(path)
    index = index_path(path)
    whole = index.read_bytes()
    for place in range(len(whole)):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << place % 8
        index.write_bytes(damaged)
        with pytest.raises(ShardError, match="espalier data index"):
            load_index(path)


def test_the_first_version_is_refused_by_its_number(tmp_path):
    path = tmp_path / "x.tar"
    write_tar(path, SAMPLES)
    header = b'{"version": 1, "tar_bytes": 20480, "extensions": [], "arrays": {}}'
    index_path(path).write_bytes(b"ESPTARIX" + len(header).to_bytes(8, "little") + header)
    with pytest.raises(ShardError, match="index version 1.*espalier data index"):
        load_index(path)
    assert INDEX_VERSION == 2
    assert current_index(path) is None


def test_an_index_somewhere_else(tmp_path):
    path = tmp_path / "x.tar"
    write_tar(path, SAMPLES)
    members = build_index(path).members(3)
    copy = tmp_path / "cached.idx"
    copy.write_bytes(index_path(path).read_bytes())
    size = path.stat().st_size
    path.unlink()
    index = open_index(copy, "https://host/data/x.tar", size)
    assert (index.name, index.members(3)) == ("https://host/data/x.tar", members)
    with pytest.raises(ShardError, match="https://host/data/x.tar: 5 bytes, but indexed at"):
        open_index(copy, "https://host/data/x.tar", 5)


def test_a_shard_rewritten_in_place_is_not_current(tmp_path):
    path = tmp_path / "x.tar"
    write_tar(path, SAMPLES)
    os.utime(path, ns=(10**18, 10**18))
    build_index(path)
    assert current_index(path) is not None
    raw = bytearray(path.read_bytes())
    raw[512 + 512] ^= 1
    path.write_bytes(raw)
    assert load_index(path) is not None  # its size is the same
    assert current_index(path) is None


def test_a_shard_too_young_to_tell_is_not_current(tmp_path):
    path = tmp_path / "x.tar"
    write_tar(path, SAMPLES)
    os.utime(path, ns=(4 * 10**18, 4 * 10**18))  # in the year 2096
    build_index(path)
    assert current_index(path) is None


def test_the_index_depends_on_the_shard_alone(tmp_path):
    raws = []
    for name, time in (("a", 10**18), ("b", 11 * 10**17)):
        path = tmp_path / name / "x.tar"
        path.parent.mkdir()
        write_tar(path, SAMPLES)
        os.utime(path, ns=(time, time))
        build_index(path)
        raws.append(index_path(path).read_bytes())
    assert raws[0] == raws[1]


def test_checksum_is_the_low_half():
    assert checksum(b"abc") == xxhash.xxh3_64_intdigest(b"abc") & 0xFFFFFFFF
    assert checksum(memoryview(b"abc")) == checksum(b"abc")


def test_a_hash_step_changes_nothing(tmp_path):
    """Members larger and smaller than the step in which the file is hashed."""
    path = tmp_path / "x.tar"
    write_tar(path, [(f"{n}.bin", bytes([n]) * (150_000 * n)) for n in range(5)])
    build_index(path)
    assert len(read_back(path)) == 5


def test_webdataset_reads_the_same_samples(write_shards):
    import webdataset as wds

    folder = write_shards("vqa", 25)
    urls = sorted(map(str, folder.glob("*.tar")))
    expected = {}
    for sample in wds.WebDataset(urls, shardshuffle=False):
        expected[sample["__key__"]] = {
            name: value for name, value in sample.items() if not name.startswith("__")
        }
    found: dict[str, dict[str, bytes]] = {}
    for url in urls:
        found |= read_back(Path(url))
    assert found == expected
