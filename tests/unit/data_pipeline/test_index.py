"""Index and manifest: every tar dialect is read, and every damage is reported."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_pipeline.index import (
    ShardError,
    build_index,
    index_path,
    load_index,
)
from data_pipeline.manifest import load_manifest, write_manifest


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
    """Samples by slicing the file where the index says."""
    index = load_index(path)
    raw = path.read_bytes()
    return {
        index.key(number): {
            name: raw[offset : offset + size] for name, offset, size, _ in index.members(number)
        }
        for number in range(len(index))
    }


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


def test_base_256_size(tmp_path):
    path = tmp_path / "x.tar"
    write_tar(path, [("a.bin", b"y" * 600)])
    raw = bytearray(path.read_bytes())
    raw[124:136] = b"\x80" + (600).to_bytes(11, "big")
    raw[148:156] = b" " * 8
    raw[148:156] = b"%06o\0 " % sum(raw[:512])
    path.write_bytes(raw)
    build_index(path)
    assert read_back(path) == {"a": {"bin": b"y" * 600}}


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


def test_split_and_repeated_samples_are_refused(tmp_path):
    path = tmp_path / "x.tar"
    write_tar(path, [("a.jpg", b"1"), ("b.jpg", b"2"), ("a.json", b"{}")])
    with pytest.raises(ShardError, match="not adjacent"):
        build_index(path)
    write_tar(path, [("a.jpg", b"1"), ("a.jpg", b"2")])
    with pytest.raises(ShardError, match="two members"):
        build_index(path)


def test_compressed_and_missing_shards(tmp_path):
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("a.jpg"))
    with pytest.raises(ShardError, match="compressed"):
        build_index(path)
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
    for damaged in (b"", whole[:40], whole[:-1], b"other" + whole[5:]):
        index.write_bytes(damaged)
        with pytest.raises(ShardError, match="espalier data index"):
            load_index(path)


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


def test_manifest_lists_what_is_there(write_shards):
    folder = write_shards("vqa", 25)
    manifest = load_manifest(folder)
    assert (manifest.samples, manifest.task, manifest.split) == (25, "vqa", "train")
    np.testing.assert_array_equal(manifest.shard_samples, [10, 10, 5])
    assert manifest.extra == {"schema": "vqa", "image_size": 24}
    again = write_manifest(folder, "vqa", "train", {"image_size": 24})
    assert again["hash"] == manifest.hash
    assert write_manifest(folder, "vqa", "val", {"image_size": 24})["hash"] != manifest.hash
    assert not list(folder.glob(".*"))  # no temporary files stay


def test_the_hash_follows_the_content(write_shards):
    folder = write_shards("vqa", 12)
    before = load_manifest(folder).hash
    shard = folder / "shard-000000.tar"
    raw = bytearray(shard.read_bytes())
    raw[600] ^= 1
    shard.write_bytes(raw)
    assert write_manifest(folder, "vqa", "train", {"image_size": 24})["hash"] != before


def test_manifest_errors_name_file_and_remedy(write_shards, tmp_path):
    with pytest.raises(FileNotFoundError, match="no such data folder"):
        load_manifest(tmp_path / "none")
    folder = write_shards("vqa", 25)
    shard = folder / "shard-000001.tar"
    raw = shard.read_bytes()
    shard.write_bytes(raw[:-512])
    with pytest.raises(ShardError, match=r"shard-000001.tar.*espalier data index"):
        load_manifest(folder)
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=r"shard-000001.tar.*espalier data index"):
        load_manifest(folder)
    shard.write_bytes(raw)
    path = folder / "manifest.json"
    content = json.loads(path.read_text())
    content["samples"] = 24
    path.write_text(json.dumps(content))
    with pytest.raises(ShardError, match="changed by hand"):
        load_manifest(folder)
    path.write_text("{")
    with pytest.raises(ShardError, match="damaged"):
        load_manifest(folder)
    path.unlink()
    with pytest.raises(FileNotFoundError, match="no manifest"):
        load_manifest(folder)
