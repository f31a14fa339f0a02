"""What all importers share: pictures, boxes, large JSON, and imports that are killed and go on."""

import io
import json
import os
import random
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from data_pipeline.decode import decode_image
from data_pipeline.faults import SkipSample
from data_pipeline.importers import json_stream
from data_pipeline.importers.boxes import fit_box
from data_pipeline.importers.common import Picture, PictureFinder, run_import
from data_pipeline.importers.json_stream import read_list, read_lists
from data_pipeline.importers.pictures import PictureReader, prepare_picture, safe_path
from data_pipeline.importers.unit import ImportItem
from data_pipeline.index import load_index
from data_pipeline.manifest import load_manifest
from data_pipeline.verify import read_members, verify

ROOT = Path(__file__).resolve().parents[3]


def scene(width=64, height=40):
    """A smooth picture whose corners differ, so that turns and wrong colours show."""
    y, x = np.mgrid[0:height, 0:width]
    red, green = 255 * x / width, 255 * y / height
    return Image.fromarray(np.stack([red, green, 255 - red], axis=2).astype(np.uint8))


def encode(image, kind="JPEG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def difference(raw, image):
    """Mean difference of decoded bytes and a PIL image, in grey levels."""
    return np.abs(decode_image(raw).astype(int) - np.asarray(image.convert("RGB"), int)).mean()


# -- pictures -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_good_pictures_keep_their_bytes(kind, mode):
    raw = encode(scene().convert(mode), kind)
    found = prepare_picture(raw, max_side=64)
    assert found.raw is raw and found.changes == ()
    assert (found.width, found.height) == (64, 40)
    assert found.extension == {"JPEG": "jpg", "PNG": "png"}[kind]


@pytest.mark.parametrize("turn", range(1, 9))
def test_orientation_is_baked_in_as_pil_shows_it(turn):
    exif = Image.Exif()
    exif[0x0112] = turn
    raw = encode(scene(), exif=exif, quality=95)
    found = prepare_picture(raw)
    shown = ImageOps.exif_transpose(Image.open(io.BytesIO(raw)))
    assert (found.width, found.height) == shown.size
    assert difference(found.raw, shown) < 2
    assert found.changes == (() if turn == 1 else ("orientation",))
    again = Image.open(io.BytesIO(found.raw)).getexif().get(0x0112, 1)
    assert again == 1, "no viewer turns it a second time"


def test_boxes_drawn_on_the_stored_pixels_keep_them():
    exif = Image.Exif()
    exif[0x0112] = 6
    raw = encode(scene(64, 40), exif=exif)
    assert prepare_picture(raw, frame=(64, 40)).raw == raw
    assert prepare_picture(raw, frame=(40, 64)).changes == ("orientation",)


@pytest.mark.parametrize(
    ("raw", "change"),
    [
        (encode(scene(), "GIF"), "gif"),
        (encode(scene(), "WEBP", quality=95), "webp"),
        (encode(scene(), "BMP"), "bmp"),
        (encode(scene().convert("CMYK"), quality=95), "cmyk"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_other_content_under_a_jpg_name_becomes_jpeg(raw, change):
    found = prepare_picture(raw)
    assert found.changes == (change,) and found.extension == "jpg"
    assert found.raw[:2] == b"\xff\xd8" and difference(found.raw, scene()) < 12


def test_sixteen_bit_png_is_not_cut_to_white():
    deep = (np.asarray(scene().convert("L"), np.uint16) << 8) | 7
    found = prepare_picture(encode(Image.fromarray(deep), "PNG"))
    assert found.changes == ("i",) and difference(found.raw, scene().convert("L")) < 3


def test_transparent_gif_is_shown_on_white():
    image = Image.new("P", (20, 20), 1)
    image.putpalette([0, 0, 0, 200, 10, 10])
    found = prepare_picture(encode(image, "GIF", transparency=1))
    assert decode_image(found.raw).min() > 250


@pytest.mark.parametrize(
    "raw", [b"", b"no image", encode(scene())[:300], encode(scene(), "GIF")[:90]]
)
def test_what_cannot_be_decoded_is_refused(raw):
    with pytest.raises(SkipSample):
        prepare_picture(raw)


def test_large_pictures_are_scaled_and_say_what_they_were():
    found = prepare_picture(encode(scene(200, 100)), max_side=50)
    assert (found.width, found.height, found.frame) == (50, 25, (200, 100))
    assert found.changes == ("scaled",)
    assert difference(found.raw, scene(200, 100).resize((50, 25))) < 4


def test_pictures_are_found_in_folders_and_zips(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "1.jpg").write_bytes(b"one")
    with zipfile.ZipFile(tmp_path / "b.zip", "w") as archive:
        archive.writestr("VG_100K/1.jpg", b"other")
        archive.writestr("VG_100K/2.jpg", b"two")
        archive.writestr("x/3.jpg", b"x3")
        archive.writestr("y/3.jpg", b"y3")
        archive.writestr("__MACOSX/VG_100K/2.jpg", b"rubbish")
    finder = PictureFinder([tmp_path / "a", tmp_path / "b.zip"])
    with PictureReader() as reader:
        read = [reader.read(finder.find(name)) for name in ("1.jpg", "2.jpg", "y/3.jpg")]
        assert read == [b"one", b"two", b"y3"]
        assert reader.read(finder.find("none.jpg", "VG_100K/2.jpg")) == b"two"
        with pytest.raises(SkipSample, match="no such image"):
            reader.read(finder.find("4.jpg"))
        with pytest.raises(SkipSample, match="no such image"):
            reader.read(Picture(tmp_path / "b.zip", "4.jpg"))
    with pytest.raises(ValueError, match="2 members"):
        finder.find("3.jpg")
    with pytest.raises(FileNotFoundError, match="c.zip"):
        PictureFinder([tmp_path / "c.zip"])
    with pytest.raises(ValueError, match="neither"):
        PictureFinder([tmp_path / "a" / "1.jpg"])


@pytest.mark.parametrize("name", ["../x", "/etc/x", "a/../../x", "..\\x", "", "a\0"])
def test_names_that_lead_out_are_refused(name, tmp_path):
    with pytest.raises(ValueError, match="refused"):
        safe_path(tmp_path, name)
    with pytest.raises(ValueError, match="refused"):
        PictureFinder([tmp_path]).find(name)


# -- boxes ----------------------------------------------------------------------------------------

sides = st.integers(1, 900)
numbers = st.one_of(st.integers(-50, 950), st.floats(-50, 950, allow_nan=False))


@settings(max_examples=300, deadline=None)
@given(st.tuples(sides, sides), st.tuples(sides, sides), st.lists(numbers, min_size=4, max_size=4))
def test_a_fitted_box_lies_in_the_picture_where_it_was(frame, size, box):
    found, clipped = fit_box(box, frame, size)
    x, y, w, h = box
    inside = x >= 0 and y >= 0 and x + w <= frame[0] and y + h <= frame[1]
    overlap = [
        min(edge + length, limit) - max(edge, 0)
        for edge, length, limit in ((x, w, frame[0]), (y, h, frame[1]))
    ]
    if min(overlap) < 1:
        assert found is None
        return
    if found is None:  # nothing is left of it in a much smaller picture
        scaled = [o * new / old for o, new, old in zip(overlap, size, frame, strict=True)]
        assert min(scaled) < 0.03
        return
    assert clipped != inside
    assert min(found[:2]) >= 0 and min(found[2:]) > 0
    assert found[0] + found[2] <= size[0] and found[1] + found[3] <= size[1]
    for axis in (0, 1):
        scale = size[axis] / frame[axis]
        low = max(box[axis], 0) * scale
        assert abs(found[axis] - low) <= 0.011
        assert abs(found[axis + 2] - overlap[axis] * scale) <= 0.04


def test_a_box_that_fits_is_not_touched():
    box = [1.005, 2, 30.123456, 4]
    assert fit_box(box, (60, 40), (60, 40)) == (box, False)
    assert fit_box([float("nan"), 0, 5, 5], (60, 40), (60, 40))[0] is None


# -- large JSON -----------------------------------------------------------------------------------

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=100, deadline=None)
@given(st.lists(values, max_size=6), st.integers(1, 40), st.sampled_from([None, 1]), st.booleans())
def test_a_streamed_list_is_what_json_reads(tmp_path_factory, content, chunk, indent, ascii_only):
    path = tmp_path_factory.mktemp("json") / "x.json"
    text = json.dumps(content, indent=indent, ensure_ascii=ascii_only)
    path.write_text(text, encoding="utf-8", errors="surrogatepass")
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        return  # not UTF-8
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_stream, "_CHUNK", chunk)
        assert list(read_list(path)) == content


@settings(max_examples=50, deadline=None)
@given(st.lists(values, max_size=4), st.lists(values, max_size=4), values, st.integers(1, 40))
def test_streamed_lists_of_an_object(tmp_path_factory, one, two, other, chunk):
    path = tmp_path_factory.mktemp("json") / "x.json"
    path.write_text(json.dumps({"one": one, "between": other, "two": two}), encoding="utf-8")
    found = {"one": [], "two": []}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_stream, "_CHUNK", chunk)
        read_lists(path, {n: lambda place, v, n=n: found[n].append((place, v)) for n in found})
    assert found == {"one": list(enumerate(one)), "two": list(enumerate(two))}


@pytest.mark.parametrize(
    "text", ["", "[", "[1", "[1,", "[1 2]", "[1]]", '["a', "[1,]", "nul", "[" * 100000, "\xff"]
)
def test_damaged_json_is_named(tmp_path, text):
    path = tmp_path / "x.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=r"x\.json"):
        list(read_list(path))


@pytest.mark.parametrize(
    "text", ["[]", "{", '{"a"}', '{"a": 3}', '{"b": []}', '{"a": []}x', "{a:[]}"]
)
def test_objects_of_another_shape_are_named(tmp_path, text):
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"x\.json"):
        read_lists(path, {"a": lambda place, value: None})


def test_memory_of_streamed_json_is_small(tmp_path):
    import tracemalloc

    path = tmp_path / "x.json"
    row = {"phrase": "a cat on a mat", "box": [1, 2, 3, 4]}
    path.write_text(json.dumps([[row] * 20] * 10000))
    tracemalloc.start()
    assert sum(len(rows) for rows in read_list(path)) == 200000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert path.stat().st_size > 10e6 and peak < 8e6


# -- whole imports --------------------------------------------------------------------------------


def make_items(folder, count=11, **record):
    folder.mkdir(exist_ok=True)
    items = []
    for number in range(count):
        path = folder / f"{number}.jpg"
        if not path.exists():
            path.write_bytes(encode(scene(64 + number, 40)))
        content = {"image_id": f"x-{number}", "captions": [f"picture {number}"]} | record
        items.append(ImportItem(f"x-{number}", (Picture(path),), content))
    return items


def tars(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.rglob("*.tar"))}


def records(folder):
    manifest = load_manifest(folder)
    for shard in range(len(manifest.shards)):
        path = manifest.path(shard)
        index, data = load_index(path), path.read_bytes()
        for sample in range(len(index)):
            yield index.key(sample), json.loads(read_members(data, index, sample)["json"])


def do(items, out, **options):
    options = {"task": "pretrain", "split": "train", "settings": {}, "inputs": []} | options
    return run_import("test", items, out, per_shard=3, **options)


def test_shards_do_not_depend_on_processes(tmp_path):
    items = make_items(tmp_path / "in")
    one = do(items, tmp_path / "one", processes=1)
    two = do(items, tmp_path / "two", processes=2)
    assert one == two and (one.images, one.samples, one.skipped, one.shards) == (11, 11, 0, 4)
    assert tars(tmp_path / "one") == tars(tmp_path / "two") and len(tars(tmp_path / "one")) == 4
    assert verify(tmp_path / "one")[1] == verify(tmp_path / "two")[1] == []
    hashes = [load_manifest(tmp_path / name / "pretrain/train").hash for name in ("one", "two")]
    assert hashes[0] == hashes[1]


KILLED = """
import os, sys
from pathlib import Path
from data_pipeline.importers import unit
from tests.unit.data_pipeline.test_importer_common import do, make_items

left = int(sys.argv[2])
prepare = unit.prepare_picture

def dying(*arguments):
    global left
    left -= 1
    if left < 0:
        os._exit(9)
    return prepare(*arguments)

unit.prepare_picture = dying
do(make_items(Path(sys.argv[1]) / "in"), Path(sys.argv[1]) / "out", processes=1)
"""


def test_a_killed_import_goes_on_where_it_was(tmp_path, monkeypatch):
    from data_pipeline.importers import unit

    items = make_items(tmp_path / "in")
    whole = do(items, tmp_path / "whole", processes=1)
    done = 4 + random.Random(0).randrange(5)  # inside the second or third of four shards
    arguments = [sys.executable, "-c", KILLED, str(tmp_path), str(done)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    assert subprocess.run(arguments, cwd=ROOT, env=environment).returncode == 9
    folder = tmp_path / "out" / "pretrain" / "train"
    finished = tars(folder)
    assert 1 <= len(finished) < 4 and not (folder / "manifest.json").exists()
    assert list(folder.glob("*.partial")), "the shard it was writing"
    (folder / ".shard-000003.tar.idx.x1").write_bytes(b"an index it was writing")

    prepare, seen = unit.prepare_picture, []
    monkeypatch.setattr(unit, "prepare_picture", lambda *a: seen.append(1) or prepare(*a))
    assert do(items, tmp_path / "out", processes=1) == whole
    assert len(seen) == 11 - 3 * len(finished), "finished shards are not made again"
    assert tars(tmp_path / "out") == tars(tmp_path / "whole")
    names = {path.name for path in folder.iterdir()}
    assert names == {path.name for path in (tmp_path / "whole/pretrain/train").iterdir()}
    assert verify(tmp_path / "out")[1] == []
    seen.clear()
    assert do(items, tmp_path / "out", processes=1) == whole and not seen, "complete: nothing to do"


@pytest.mark.parametrize("damage", ["tar", "idx", "account"])
def test_a_shard_without_its_account_or_index_is_made_again(tmp_path, monkeypatch, damage):
    from data_pipeline.importers import common

    def stop(*_, **__):
        raise RuntimeError("stopped before the end")

    items = make_items(tmp_path / "in")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "write_manifest", stop)
        with pytest.raises(RuntimeError):
            do(items, tmp_path / "out", processes=1)
    folder = tmp_path / "out" / "pretrain" / "train"
    name = {"tar": "shard-000001.tar", "idx": "shard-000001.tar.idx"}
    path = folder / name.get(damage, ".import/000001.json")
    path.write_bytes(path.read_bytes()[:-700] if damage == "tar" else b"")
    if damage == "idx":
        path.unlink()
    do(items, tmp_path / "out", processes=1)
    do(items, tmp_path / "other", processes=1)
    assert tars(tmp_path / "out") == tars(tmp_path / "other") and verify(tmp_path / "out")[1] == []


def test_another_import_in_the_same_folder_is_refused(tmp_path):
    items, out = make_items(tmp_path / "in"), tmp_path / "out"
    file = tmp_path / "annotations.json"
    file.write_text("{}")
    do(items, out, processes=1, inputs=[file])
    for options, message in (
        ({"max_side": 9, "inputs": [file]}, "max_side is 0, now 9"),
        ({"settings": {"a": 1}, "inputs": [file]}, "settings"),
        ({}, "inputs"),
    ):
        with pytest.raises(ValueError, match=message):
            do(items, out, processes=1, **options)
    with pytest.raises(ValueError, match="items is 11, now 10"):
        do(items[1:], out, processes=1, inputs=[file])
    with pytest.raises(ValueError, match="its keys"):
        do([*items[1:], items[0]], out, processes=1, inputs=[file])
    file.write_text('{"other": 1}')
    with pytest.raises(ValueError, match="inputs"):
        do(items, out, processes=1, inputs=[file])
    foreign = tmp_path / "foreign" / "pretrain" / "train"
    foreign.mkdir(parents=True)
    (foreign / "a.tar").write_bytes(b"precious")
    with pytest.raises(ValueError, match="already holds shards"):
        do(items, tmp_path / "foreign", processes=1)
    assert (foreign / "a.tar").read_bytes() == b"precious"


def test_keys_must_differ(tmp_path):
    items = make_items(tmp_path / "in", 5)  # of two shards
    with pytest.raises(ValueError, match="two items have the key 'x-0'"):
        do([*items, items[0]], tmp_path / "out")


def test_what_is_left_out_is_listed_and_counted(tmp_path):
    items = make_items(tmp_path / "in", 8)
    items[1].pictures[0].file.unlink()
    items[2].pictures[0].file.write_bytes(b"no image")
    items[3] = ImportItem("x-3", items[3].pictures, items[3].record, "not wanted")
    for number in (4, 5):  # a unit of nothing but such items
        items[number] = ImportItem(f"x-{number}", items[number].pictures, {"image_id": "y"}, "no")
    items[0] = ImportItem("x-0", items[0].pictures, {"image_id": 3, "captions": ["a"]})
    with pytest.raises(ValueError, match=r"sample x-0: field 'image_id'.*--skip-bad"):
        do(items, tmp_path / "out", processes=1)
    counts = do(items, tmp_path / "out", processes=1, skip_bad=True, left_out={"crowds": 5})
    assert (counts.samples, counts.skipped, counts.shards) == (2, 6, 1)
    assert counts.details == {"captions": 2, "crowds": 5}
    folder = tmp_path / "out/pretrain/train"
    lines = [json.loads(line) for line in (folder / "skipped.jsonl").read_text().splitlines()]
    assert [line["key"] for line in lines] == [f"x-{n}" for n in range(6)]
    assert "no such image" in lines[1]["reason"] and lines[1]["file"].endswith("1.jpg")
    assert lines[3]["reason"] == "not wanted"
    assert load_manifest(folder).extra["skipped"] == 6 and verify(tmp_path / "out")[1] == []


def test_bad_items_that_were_skipped_are_errors_without_skip_bad(tmp_path, monkeypatch):
    from data_pipeline.importers import common

    items = make_items(tmp_path / "in", 8)
    items[1].pictures[0].file.unlink()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "_finish", lambda *_: (_ for _ in ()).throw(RuntimeError("stop")))
        with pytest.raises(RuntimeError):
            do(items, tmp_path / "out", processes=1, skip_bad=True)
    with pytest.raises(ValueError, match="x-1"):
        do(items, tmp_path / "out", processes=1)


def test_nothing_usable_leaves_nothing(tmp_path):
    items = [ImportItem("a", (Picture(tmp_path / "none.jpg"),), {"image_id": "a", "captions": "b"})]
    with pytest.raises(ValueError, match=r"none of the 1 items.*none\.jpg"):
        do(items, tmp_path / "out", skip_bad=True)
    assert list((tmp_path / "out/pretrain/train").iterdir()) == []


def test_boxes_follow_the_picture(tmp_path):
    elems = [
        {"caption": "whole", "bb": [-3, 0, 200, 100]},
        {"caption": "part", "bb": [10, 10, 20, 10]},
        {"caption": "gone", "bb": [500, 0, 10, 10]},
    ]
    path = tmp_path / "a.jpg"
    path.write_bytes(encode(scene(120, 80)))
    # The annotations are for twice the published picture, which is then halved once more.
    record: dict[str, Any] = {"image_id": "a", "captions": [], "elems": elems}
    record |= {"width": 240, "height": 161}
    items = [ImportItem("a", (Picture(path),), record)]
    counts = do(items, tmp_path / "out", max_side=60)
    ((_, found),) = records(tmp_path / "out/pretrain/train")
    assert (found["width"], found["height"]) == (60, 40)
    assert found["elems"][0]["bb"] == [0, 0, 49.25, 24.84]
    assert found["elems"][1]["bb"] == [2.5, 2.48, 5.0, 2.49]
    assert counts.details == {
        "boxes_clipped": 1,
        "boxes_dropped": 1,
        "elems": 2,
        "images_scaled": 1,
    }
    assert verify(tmp_path / "out")[1] == []
    record["height"] = 100
    with pytest.raises(ValueError, match="120x80, the annotations are for 240x100"):
        do(items, tmp_path / "other")
    record["elems"] = [{"caption": "x", "bb": [1, 2, None, 3]}]
    record["height"] = 160
    with pytest.raises(ValueError, match=r"elems\[0\].bb"):
        do(items, tmp_path / "other")


def test_two_pictures_and_packed_records(tmp_path):
    first, second = make_items(tmp_path / "in", 2)
    record = {"image_ids": ["a", "b"], "statements": [{"sentence": "s", "label": True}]}
    packed = json.dumps(record).encode()
    item = ImportItem("pair", (*first.pictures, *second.pictures), packed)
    counts = do([item], tmp_path / "out", task="nlvr2")
    assert (counts.images, counts.samples) == (2, 1) and verify(tmp_path / "out")[1] == []
    path = tmp_path / "out/nlvr2/train/shard-000000.tar"
    members = {member.extension for member in load_index(path).members(0)}
    assert members == {"0.jpg", "1.jpg", "json"}


@pytest.mark.parametrize(
    "options", [{"task": "none"}, {"split": "../x"}, {"split": ""}, {"max_side": -1}]
)
def test_wrong_settings_are_refused(tmp_path, options):
    with pytest.raises(ValueError):
        do(make_items(tmp_path / "in", 1), tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()
