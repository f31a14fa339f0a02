"""The importer of img2dataset's output on small folders of its layout."""

import argparse
import io
import json
from typing import Any

import pytest
from PIL import Image
from webdataset.writer import TarWriter

from data_pipeline import commands
from data_pipeline.importers.img2dataset import build_img2dataset, index_in_place
from data_pipeline.index import load_index
from data_pipeline.manifest import load_manifest
from data_pipeline.records import parse_record
from data_pipeline.tar_headers import ShardError
from data_pipeline.verify import read_members, verify


def picture(number, kind="JPEG"):
    buffer = io.BytesIO()
    Image.new("RGB", (30 + number, 20), (number * 9, 90, 200)).save(buffer, kind, quality=90)
    return buffer.getvalue()


def sample(key, caption, raw, status="success", **more):
    facts = {"url": f"http://x/{key}", "caption": caption, "key": key, "status": status,
             "error_message": None, "width": 30, "height": 20, "original_width": 300,
             "original_height": 200, "exif": "{}", "sha256": "0" * 64}  # fmt: skip
    members = {"jpg": raw, "txt": caption, "json": json.dumps(facts, indent=4)}
    return {"__key__": key} | members | more


def stats(path, good, failed):
    content = {"count": good + failed, "successes": good, "failed_to_download": failed,
               "failed_to_resize": 1, "duration": 1.5, "start_time": 1.0, "end_time": 2.5,
               "status_dict": {"success": good, "HTTP Error 404: Not Found": failed}}  # fmt: skip
    path.write_text(json.dumps(content, indent=4))


@pytest.fixture
def folder(tmp_path):
    """Two tars as img2dataset's own writer makes them, with what comes along."""
    folder = tmp_path / "cc3m"
    folder.mkdir()
    for tar, numbers in ((0, range(5)), (1, range(5, 9))):
        with TarWriter(str(folder / f"{tar:05d}.tar")) as out:
            for number in numbers:
                out.write(sample(f"{number:09d}", f"caption  {number}", picture(number)))
        (folder / f"{tar:05d}.parquet").write_bytes(b"PAR1 is not read")
        stats(folder / f"{tar:05d}_stats.json", len(numbers), 3)
    return folder


def read(path, task="pretrain") -> list[tuple[dict[str, bytes], Any]]:
    manifest = load_manifest(path)
    found = []
    for number in range(len(manifest.shards)):
        tar = manifest.path(number)
        index, data = load_index(tar), tar.read_bytes()
        for place in range(len(index)):
            members = read_members(data, index, place)
            record = parse_record(task, members["json"], tar.name, index.key(place))
            found.append((members, record))
    return found


def rewrite(folder, samples):
    with TarWriter(str(folder / "00001.tar")) as out:
        for content in samples:
            out.write(content)


def test_tars_become_shards(folder, tmp_path):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    out = tmp_path / "out"
    counts = build_img2dataset(folder, out, source="cc3m", per_shard=4, processes=1)["pretrain"]
    assert (counts.samples, counts.shards, counts.skipped) == (9, 3, 0)
    assert counts.details == {"captions": 9, "downloads_failed": 6, "downloads_not_resized": 2}
    rows = read(out / "pretrain/train")
    assert [record.image_id for _, record in rows] == [f"cc3m-{n:09d}" for n in range(9)]
    assert [record.captions for _, record in rows] == [(f"caption {n}",) for n in range(9)]
    assert [members["jpg"] for members, _ in rows] == [picture(n) for n in range(9)]
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert verify(out)[1] == []


def test_processes_do_not_change_the_shards(folder, tmp_path):
    for processes in (1, 2):
        build_img2dataset(folder, tmp_path / str(processes), per_shard=4, processes=processes)
    one, two = (
        {path.name: path.read_bytes() for path in (tmp_path / name).rglob("*.tar")} for name in "12"
    )
    assert one == two and len(one) == 3


def test_what_cannot_be_used_is_left_out_and_listed(folder, tmp_path):
    rewrite(folder, [
        sample("a", "good", picture(1, "WEBP")),
        sample("b", " \n", picture(2)),
        sample("c", "said", b"", status="failed_to_download"),
        {key: value for key, value in sample("d", "x", picture(3)).items() if key != "jpg"},
        sample("e", "x", picture(4)) | {"json": "{"},
        {key: value for key, value in sample("f", "from json", picture(5)).items() if key != "txt"},
        {"__key__": "g", "jpg": picture(6), "txt": "no json"},
        sample("h", "still good", picture(7, "GIF")),
    ])  # fmt: skip
    out = tmp_path / "out"
    counts = build_img2dataset(folder, out, prefix="sbu", processes=1)["pretrain"]
    assert (counts.samples, counts.skipped) == (9, 4)
    assert (counts.details["images_webp"], counts.details["images_gif"]) == (1, 1)
    lines = (out / "pretrain/train/skipped.jsonl").read_text().splitlines()
    reasons = {line["key"]: line["reason"] for line in map(json.loads, lines)}
    assert set(reasons) == {"sbu-b", "sbu-c", "sbu-d", "sbu-e"}
    for key, words in (("b", "empty"), ("c", "failed_to_download"), ("d", "no picture"),
                       ("e", "cannot be read")):  # fmt: skip
        assert words in reasons[f"sbu-{key}"]
    rows = read(out / "pretrain/train")[5:]
    assert [r.captions[0] for _, r in rows] == ["good", "from json", "no json", "still good"]
    assert verify(out)[1] == []


def test_broken_pictures_stop_or_are_left_out(folder, tmp_path):
    rewrite(folder, [sample("a", "x", picture(1)[:200])])
    with pytest.raises(ValueError, match=r"00001\.tar.*img2dataset-a.*--skip-bad"):
        build_img2dataset(folder, tmp_path / "out", processes=1)
    counts = build_img2dataset(folder, tmp_path / "out", processes=1, skip_bad=True)["pretrain"]
    assert (counts.samples, counts.skipped) == (5, 1)


@pytest.mark.parametrize("damage", ["cut", "empty", "twice", "stats", "key", "none", "missing"])
def test_damaged_folders_are_named(folder, tmp_path, damage):
    tar, message = folder / "00001.tar", r"00001\.tar"
    if damage == "cut":
        tar.write_bytes(tar.read_bytes()[:3000])
    elif damage == "empty":
        tar.write_bytes(b"")
    elif damage == "twice":
        rewrite(folder, [sample("a", "x", picture(1), png=picture(2, "PNG"))])
        message = "two members"
    elif damage == "stats":
        (folder / "00000_stats.json").write_text("{}")
        message = "00000_stats"
    elif damage == "key":
        rewrite(folder, [sample("000000003", "x", picture(1))])
        message = "img2dataset-000000003"
    elif damage == "none":
        for path in folder.glob("*.tar"):
            path.unlink()
        message = "--output_format webdataset"
    else:
        folder = folder / "none"
        message = "no such folder"
    with pytest.raises((ShardError, FileNotFoundError, ValueError), match=message):
        build_img2dataset(folder, tmp_path / "out", processes=1)


def test_more_tars_are_another_import(folder, tmp_path):
    build_img2dataset(folder, tmp_path / "out", processes=1)
    (folder / "00001.tar").rename(folder / "00002.tar")
    with pytest.raises(ValueError, match="settings"):
        build_img2dataset(folder, tmp_path / "out", processes=1)


def test_in_place_only_indexes(folder, tmp_path):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    counts = index_in_place(folder, source="cc3m", processes=1)["pretrain"]
    assert (counts.samples, counts.shards) == (9, 2)
    assert counts.details == {"downloads_failed": 6, "downloads_not_resized": 2}
    after = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert {name: after[name] for name in before} == before
    assert set(after) - set(before) == {"manifest.json", "00000.tar.idx", "00001.tar.idx"}
    manifest = load_manifest(folder)
    assert manifest.extra["layout"] == "img2dataset" and manifest.task == "pretrain"
    index = load_index(folder / "00001.tar")
    members = {m.extension: m for m in index.members(0)}
    place = members["txt"]
    raw = (folder / "00001.tar").read_bytes()[place.offset : place.offset + place.size]
    assert (index.key(0), raw) == ("000000005", b"caption  5")
    assert index_in_place(folder, source="cc3m", processes=1)["pretrain"] == counts
    rewrite(folder, [{"__key__": "g", "jpg": picture(6)}])
    with pytest.raises(ValueError, match=r"00001\.tar: 1 samples, 1 pictures.* 0 captions"):
        index_in_place(folder, processes=1)


def test_the_verbs(folder, tmp_path, capsys):
    parser = argparse.ArgumentParser()
    commands.add_parsers(parser.add_subparsers(dest="verb"))

    def run(*words):
        words = ["data", "build", *map(str, words), "--processes", "1"]
        return commands.run(parser.parse_args(words))

    assert run("sbu", "--input", folder, "--out", tmp_path / "a", "--task", "captioning") == 0
    assert "a/captioning/train: 9 images" in capsys.readouterr().out
    assert read(tmp_path / "a/captioning/train", "captioning")[0][1].image_id == "sbu-000000000"
    assert run("img2dataset", "--input", folder, "--out", tmp_path / "b", "--name", "mine") == 0
    assert read(tmp_path / "b/pretrain/train")[0][1].image_id == "mine-000000000"
    assert load_manifest(tmp_path / "a/captioning/train").extra["source"] == "sbu"
    assert run("cc3m", "--input", folder, "--in-place") == 0
    assert f"{folder}: 9 images" in capsys.readouterr().out
    with pytest.raises(ValueError, match="--in-place"):
        run("cc3m", "--input", folder)
    with pytest.raises(ValueError, match="--max-side"):
        run("cc3m", "--input", folder, "--in-place", "--max-side", "9")
