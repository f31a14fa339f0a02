"""Filters on folders with planted leaks and duplicates: what is dropped, why, and what is kept."""

import json
import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data_pipeline import filters, fingerprints
from data_pipeline.filters import FilterRules, apply
from data_pipeline.fingerprints import PRINT, prints_path
from data_pipeline.index import ShardError
from data_pipeline.manifest import load_manifest
from data_pipeline.manifest_writer import write_manifest
from data_pipeline.shards import ShardSet, dump_json
from data_pipeline.verify import verify
from tests.unit.data_pipeline.published import encode, photo, verb


@pytest.fixture(scope="module")
def photos():
    return [photo(number, 160, 120) for number in range(16)]


def write(folder, rows, task="retrieval", per_shard=3):
    """`rows`: (key, JSON, picture or bytes, ...)."""
    with ShardSet(folder, per_shard) as out:
        for key, record, *pictures in rows:
            raw = [p if isinstance(p, bytes) else encode(p) for p in pictures]
            names = [f"{n}.jpg" for n in range(len(raw))] if len(raw) > 1 else ["jpg"]
            members = dict(zip(names, raw, strict=True))
            out.write(key, members | {"json": dump_json(record)})
    write_manifest(folder, task, folder.name)
    return folder


def said(image, *captions, **more):
    return {"image_id": image, "captions": list(captions) or ["some words"]} | more


def kept(folder):
    """Keys that the filter leaves, in order, as the stream would see them."""
    manifest = load_manifest(folder)
    found = []
    for number in range(len(manifest.shards)):
        index = filters.load_index(manifest.path(number))
        found += [
            index.key(manifest.sample_number(number, ordinal))
            for ordinal in range(manifest.shards[number].kept)
        ]
    return found


def dropped(folder):
    rows = [json.loads(line) for line in (folder / "dropped.jsonl").read_text().splitlines()]
    return {row["key"]: (row["rule"], row["because"]) for row in rows}


def test_leaks_are_found_by_id_bytes_and_look(tmp_path, photos):
    test = write(
        tmp_path / "flickr" / "test",
        [
            ("t0", said("flickr30k-1"), photos[0]),
            ("t1", said("coco-77"), photos[1]),
            ("t2", said("x"), photos[2]),
            ("t3", said("y"), photos[3]),
        ],
    )
    small = photos[2].resize((80, 60), Image.Resampling.BICUBIC)
    data = write(
        tmp_path / "train",
        [
            ("same-id", said("flickr30k-1"), photos[4]),
            ("fine", said("flickr30k-2"), photos[5]),
            ("coco-id", said("vg-5", coco_id=77), photos[6]),
            ("smaller", said("sbu-1"), encode(small, quality=60)),
            ("bytes", said("sbu-2"), encode(photos[3])),
            ("also-fine", said("coco-78"), photos[7]),
        ],
    )
    before = load_manifest(data).hash
    content = apply(data, FilterRules(leaks=(tmp_path / "flickr",)), processes=1)
    assert content is not None
    assert kept(data) == ["fine", "also-fine"]
    found = dropped(data)
    assert {key: rule for key, (rule, _) in found.items()} == {
        "same-id": "leak_id",
        "coco-id": "leak_id",
        "smaller": "leak_picture",
        "bytes": "leak_picture",
    }
    assert found["same-id"][1] == f"{test}: t0" and found["coco-id"][1] == f"{test}: t1"
    assert found["smaller"][1].startswith(f"{test}: t2") and found["bytes"][1] == f"{test}: t3"
    assert content["filter"]["dropped"] == {"leak_id": 2, "leak_picture": 2}
    assert content["filter"]["rules"]["leaks"][0]["hash"] == load_manifest(test).hash
    assert content["samples"] == 2 and content["hash"] != before
    assert verify(data)[1] == []


def test_duplicates_keep_the_first(tmp_path, photos):
    copy = encode(photos[0], quality=70)
    data = write(
        tmp_path / "train",
        [
            ("first", said("a", "A dog", "runs"), photos[0]),
            ("other", said("b", "A dog", "runs"), photos[1]),
            ("same-file", said("c", "quite another text"), photos[0]),
            ("same-look", said("d", "a  DOG", "runs "), copy),
            ("other-text", said("e", "a cat", "runs"), encode(photos[0], quality=72)),
            ("again", said("f", "a cat", "runs"), encode(photos[0], quality=74)),
        ],
    )
    content = apply(data, FilterRules(duplicates=True), processes=1)
    assert content is not None and kept(data) == ["first", "other", "other-text"]
    assert dropped(data) == {
        "same-file": ("same_bytes", "first"),
        "same-look": ("same_look", "first"),
        "again": ("same_look", "other-text"),
    }


def test_a_duplicate_of_a_dropped_sample_is_not_one(tmp_path, photos):
    test = write(tmp_path / "test", [("t", said("leaked"), photos[9])])
    data = write(
        tmp_path / "train",
        [
            ("a", said("leaked", "words"), photos[0]),
            ("b", said("b", "words"), photos[0]),
            ("c", said("c", "words"), photos[0]),
        ],
    )
    apply(data, FilterRules(leaks=(test,), duplicates=True), processes=1)
    assert kept(data) == ["b"] and dropped(data)["c"] == ("same_bytes", "b")


def test_sizes_and_words(tmp_path, photos):
    data = write(
        tmp_path / "train",
        [
            ("flat", said("a", "one two three"), photos[0].resize((160, 31))),
            ("just", said("b", "one", "one two three"), photos[1].resize((32, 160))),
            ("terse", said("c", "one", "one two"), photos[2]),
            ("regions", said("d") | {"captions": [], "elems": [{"caption": "x"}]}, photos[3]),
            ("empty", said("e", ""), photos[4]),
        ],
        task="pretrain",
    )
    apply(data, FilterRules(min_side=32, min_words=3), processes=1)
    assert kept(data) == ["just", "regions"]
    assert dropped(data) == {
        "flat": ("min_side", "31 pixels"),
        "terse": ("min_words", "2 words"),
        "empty": ("min_words", "0 words"),
    }


def test_pairs_of_pictures(tmp_path, photos):
    """NLVR2: either picture may leak; a pair repeats only a pair, in its order."""

    def pair(name, *statements):
        rows = [{"sentence": text, "label": True} for text in statements]
        return {"image_ids": [f"{name}-0", f"{name}-1"], "statements": rows}

    test = write(tmp_path / "test", [("t", pair("t", "x"), photos[0], photos[1])], "nlvr2")
    data = write(
        tmp_path / "train",
        [
            ("right", pair("a", "x"), photos[2], encode(photos[0], quality=50)),
            ("id", {**pair("b", "x"), "image_ids": ["q", "t-1"]}, photos[3], photos[4]),
            ("fine", pair("c", "x"), photos[5], photos[6]),
            ("turned", pair("d", "x"), photos[6], photos[5]),
            ("half", pair("e", "x"), photos[5], photos[7]),
            ("repeat", pair("f", "y"), photos[5], photos[6]),
            ("look", pair("g", "x"), photos[5], encode(photos[6], quality=80)),
            ("white", pair("h", "z"), photos[8], Image.new("RGB", (90, 90), "white")),
            ("grey", pair("i", "z"), photos[8], Image.new("RGB", (90, 90), "grey")),
        ],
        "nlvr2",
    )
    apply(data, FilterRules(leaks=(test,), duplicates=True), processes=1)
    assert kept(data) == ["fine", "turned", "half", "white", "grey"]
    rules = {key: rule for key, (rule, _) in dropped(data).items()}
    assert rules == {
        "right": "leak_picture",
        "id": "leak_id",
        "repeat": "same_bytes",
        "look": "same_look",
    }


@pytest.mark.parametrize(
    ("task", "record"),
    [
        ("vqa", {"questions": [{"question_id": "1", "question": "Is it?", "answers": {}}]}),
        (
            "grounding",
            {"expressions": [{"text": "it", "bb": [0, 0, 5, 5]}], "width": 160, "height": 120},
        ),
    ],
)
def test_tasks_without_captions_are_compared_by_their_texts(tmp_path, photos, task, record):
    other = json.loads(json.dumps(record).replace("it", "that").replace("Is it?", "Why?"))
    rows = [
        ("a", {"image_id": "a"} | record, photos[0]),
        ("b", {"image_id": "b"} | other, encode(photos[0], quality=80)),
        ("c", {"image_id": "c"} | record, encode(photos[0], quality=70)),
    ]
    data = write(tmp_path / "train", rows, task)
    apply(data, FilterRules(duplicates=True, min_words=5), processes=1)
    assert kept(data) == ["a", "b"]


def test_what_cannot_be_compared_passes_and_is_counted(tmp_path, photos):
    blank = Image.new("RGB", (100, 100), "white")
    test = write(tmp_path / "test", [("t", said("t"), blank), ("u", said("t"), photos[5])])
    data = write(
        tmp_path / "train",
        [
            ("cut", said("a"), encode(photos[0])[:900]),
            ("blank", said("b", "x"), encode(Image.new("RGB", (90, 90), "white"))),
            ("blank2", said("c", "x"), encode(Image.new("RGB", (90, 90), "grey"))),
            ("no-object", "nonsense", photos[1]),
            ("nothing-said", {}, photos[2]),
        ],
    )
    content = apply(data, FilterRules((test,), True), processes=1)
    assert content is not None and content["samples"] == 5, "blank pictures are not all the same"
    described = content["filter"]["rules"]
    assert (described["unreadable_samples"], described["pictures_without_structure"]) == (2, 2)
    apply(data, FilterRules(min_side=200, min_words=1), processes=1)
    assert kept(data) == ["cut", "no-object"]


def test_img2dataset_folders_in_place(tmp_path, photos):
    folder = tmp_path / "cc3m"
    with ShardSet(folder, 10) as out:
        for number, caption in enumerate(("a b c", "a b", "a b c")):
            raw = encode(photos[0], quality=80 + number)
            members = {"jpg": raw, "txt": caption.encode(), "json": b'{"url": "x", "status": "y"}'}
            out.write(f"00000000{number}", members)
    write_manifest(folder, "pretrain", "train", {"layout": "img2dataset"})
    apply(folder, FilterRules(duplicates=True, min_words=3), processes=1)
    assert dropped(folder) == {
        "000000001": ("min_words", "2 words"),
        "000000002": ("same_look", "000000000"),
    }


# -- fingerprints are kept ------------------------------------------------------------------------


def count_made(monkeypatch):
    made = []
    real = fingerprints._fill

    def counted(row, unit, members):
        made.append(unit.path.name)
        real(row, unit, members)

    monkeypatch.setattr(fingerprints, "_fill", counted)
    return made


def test_a_second_run_reads_no_picture(tmp_path, photos, monkeypatch):
    rows = [(f"k{n}", said(f"i{n}", f"word {n}"), photos[n]) for n in range(7)]
    data = write(tmp_path / "train", rows)
    made = count_made(monkeypatch)
    rules = FilterRules(duplicates=True, min_words=2)
    first = apply(data, rules, processes=1)
    assert len(made) == 7
    assert apply(data, rules, processes=1) == first and len(made) == 7
    prints_path(data / "shard-000001.tar").unlink()
    prints_path(data / "shard-000002.tar").write_bytes(b"PK damaged")
    assert apply(data, rules, processes=1) == first
    assert made[7:] == ["shard-000001.tar"] * 3 + ["shard-000002.tar"]


def test_a_rewritten_shard_is_fingerprinted_anew(tmp_path, photos):
    data = write(tmp_path / "train", [(f"k{n}", said(f"i{n}"), photos[n]) for n in range(3)])
    apply(data, FilterRules(duplicates=True), processes=1)
    assert kept(data) == ["k0", "k1", "k2"]
    again = tmp_path / "again" / "train"
    write(again, [(f"k{n}", said(f"i{n}"), photos[0]) for n in range(3)])
    for file in again.iterdir():
        os.replace(file, data / file.name)
    apply(data, FilterRules(duplicates=True), processes=1)
    assert kept(data) == ["k0"]


def test_folders_that_cannot_be_written_to(tmp_path, photos, monkeypatch, capsys):
    test = write(tmp_path / "test", [("t", said("t"), photos[0])])
    data = write(tmp_path / "train", [(f"k{n}", said(f"i{n}"), photos[n]) for n in range(2)])
    real = fingerprints.write_atomically

    def refuse(path, chunks):
        if path.parent == test:
            raise PermissionError(13, "Permission denied", str(path))
        real(path, chunks)

    monkeypatch.setattr(fingerprints, "write_atomically", refuse)
    apply(data, FilterRules((test,)), processes=1)
    assert kept(data) == ["k1"]
    assert f"{test}: not writable" in capsys.readouterr().err


def test_processes_change_nothing(tmp_path, photos):
    rows = [(f"k{n}", said(f"i{n}", "x"), photos[n % 5]) for n in range(12)]
    contents = []
    for processes in (1, 2):
        data = write(tmp_path / str(processes) / "train", rows)
        contents.append(apply(data, FilterRules(duplicates=True), processes=processes))
    assert contents[0] == contents[1]


# -- refusals -------------------------------------------------------------------------------------


def test_refusals(tmp_path, photos):
    data = write(tmp_path / "data" / "train", [("k", said("i"), photos[0])])
    before = sorted(path.name for path in data.iterdir())
    with pytest.raises(ValueError, match=r"holds .*train itself"):
        apply(data, FilterRules(leaks=(tmp_path / "data",)), processes=1)
    with pytest.raises(FileNotFoundError, match="none"):
        apply(data, FilterRules(leaks=(tmp_path / "none",)), processes=1)
    with pytest.raises(ValueError, match="at least 0"):
        apply(data, FilterRules(min_side=-1), processes=1)
    assert sorted(path.name for path in data.iterdir()) == before
    with pytest.raises(ValueError, match="leave no sample"):
        apply(data, FilterRules(min_side=1000), processes=1)
    assert kept(data) == ["k"] and not (data / "dropped.jsonl").exists()
    (data / "shard-000000.tar.idx").unlink()
    prints_path(data / "shard-000000.tar").unlink()
    with pytest.raises(ShardError, match="data index"):
        apply(data, FilterRules(duplicates=True), processes=1)


def test_the_verb(tmp_path, photos, capsys):
    write(tmp_path / "test", [("t", said("i1"), photos[0])])
    data = write(tmp_path / "train", [(f"k{n}", said(f"i{n}"), photos[n]) for n in range(3)])
    words = ["index", data, "--task", "retrieval", "--processes", "1"]
    assert verb(*words, "--drop-leaks", tmp_path / "test", "--min-side", "16") == 0
    assert (
        "1 samples kept, 1 dropped by leak_id, 1 dropped by leak_picture" in capsys.readouterr().out
    )
    assert kept(data) == ["k2"]


# -- the rules on fingerprints alone --------------------------------------------------------------


@st.composite
def prints(draw, size):
    rows = np.zeros(draw(st.integers(1, size)), PRINT)
    few = st.integers(0, 3)
    for row in rows:
        for name in ("bytes", "ids", "look"):
            row[name] = (
                draw(st.tuples(few, few))
                if name != "look"
                else (
                    draw(st.sampled_from([0, 0xFF, 0xFF << 20, 0xFE])),
                    draw(st.sampled_from([0, 0xFF, 0xFF << 40])),
                )
            )
        row["text"], row["side"], row["words"] = draw(few), draw(few), draw(st.integers(-1, 2))
        row["readable"] = True
    return rows


def plain_rules(samples, tests, rules):
    """The rules as loops over samples: (rule, because of which row)."""
    verdicts, files, looks = [], {}, {}

    def near(a, b):
        return a and b and (int(a) ^ int(b)).bit_count() <= rules.distance

    for n, row in enumerate(samples):

        def first(fits, row=row):
            return next((m for m, other in enumerate(tests) if fits(row, other)), None)

        same_id = first(lambda a, b: set(a["ids"][a["ids"] > 0]) & set(b["ids"]))
        same_file = first(lambda a, b: set(a["bytes"][a["bytes"] > 0]) & set(b["bytes"]))
        same_look = first(lambda a, b: any(near(x, y) for x in a["look"] for y in b["look"]))
        file, look = tuple(row["bytes"]), (*row["look"], row["text"])
        comparable = row["look"][0] and row["text"] and (row["look"][1] or not row["bytes"][1])
        if 0 < row["side"] < rules.min_side:
            verdicts.append(("min_side", None))
        elif 0 <= row["words"] < rules.min_words:
            verdicts.append(("min_words", None))
        elif same_id is not None:
            verdicts.append(("leak_id", same_id))
        elif same_file is not None:
            verdicts.append(("leak_picture", same_file))
        elif same_look is not None:
            verdicts.append(("leak_picture", "near"))
        elif rules.duplicates and row["bytes"][0] and file in files:
            verdicts.append(("same_bytes", files[file]))
        else:
            verdicts.append(None)
            files.setdefault(file, n)
    for n, row in enumerate(samples):
        comparable = row["look"][0] and row["text"] and (row["look"][1] or not row["bytes"][1])
        look = (*row["look"], row["text"])
        if verdicts[n] is None and rules.duplicates and comparable:
            if look in looks:
                verdicts[n] = ("same_look", looks[look])
            looks.setdefault(look, n)
    return verdicts


@settings(max_examples=150, deadline=None)
@given(
    prints(12),
    prints(4),
    st.booleans(),
    st.booleans(),
    st.integers(0, 2),
    st.integers(0, 2),
    st.integers(0, 2),
)
def test_rules_equal_loops(samples, tests, leaks, duplicates, side, words, distance):
    tests = tests if leaks else tests[:0]
    rules = FilterRules((), duplicates, side, words, distance)
    verdict = filters._decide(samples, tests, rules)
    for n, expected in enumerate(plain_rules(samples, tests, rules)):
        rule = None if verdict.rule[n] < 0 else filters.RULES[verdict.rule[n]]
        assert rule == (expected and expected[0])
        if expected and expected[1] == "near":
            pairs = [(a, b) for a in samples[n]["look"] for b in tests[verdict.of[n]]["look"]]
            gaps = [(int(a) ^ int(b)).bit_count() for a, b in pairs if a and b]
            assert min(gaps) == verdict.apart[n]
        elif expected:
            assert verdict.of[n] == (-1 if expected[1] is None else expected[1])


def test_mixed_hashes_keep_columns_apart():
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 2**64, (2, 20_000), dtype=np.uint64)
    assert len(np.unique(filters._mixed(a, b))) == 20_000
    assert not (filters._mixed(a, b) == filters._mixed(b, a)).any()
    assert (filters._mixed(a[:3], b[:3]) == filters._mixed(a, b)[:3]).all()
