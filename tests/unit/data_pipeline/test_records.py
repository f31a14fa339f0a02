"""Records: what is accepted, and errors that name shard, key and field."""

from __future__ import annotations

import json

import pytest

from data_pipeline import records
from data_pipeline.faults import SkipSample
from data_pipeline.records import RecordError, parse_record, record_member

GOOD = {
    "pretrain": {
        "image_id": "1",
        "captions": ["a cat"],
        "width": 10,
        "height": 8,
        "elems": [{"caption": ["cat", "a cat"], "bb": [1, 2, 3, 4], "attributes": "black"}],
    },
    "vqa": {
        "image_id": "1",
        "questions": [{"question_id": "7", "question": "what?", "answers": {"red": 1.0}}],
    },
    "nlvr2": {"image_ids": ["a", "b"], "statements": [{"sentence": "both", "label": True}]},
    "retrieval": {"image_id": "1", "captions": ["a cat"]},
    "captioning": {"image_id": "1", "captions": ["a cat"]},
    "grounding": {
        "image_id": "1",
        "width": 9,
        "height": 9,
        "expressions": [{"text": "the cat", "bb": [0, 0, 2, 2]}],
    },
}


def parse(task: str, value: object) -> records.Record:
    return parse_record(task, json.dumps(value).encode(), "shard-000003.tar", "k7")


@pytest.mark.parametrize("task", records.TASKS)
def test_good_records_parse(task):
    parse(task, GOOD[task])


def test_values_of_a_pretrain_record():
    record = parse("pretrain", GOOD["pretrain"])
    assert isinstance(record, records.PretrainRecord)
    assert record.captions == ("a cat",)
    element = record.elements[0]
    assert element.captions == ("cat", "a cat")
    assert element.box == (1.0, 2.0, 3.0, 4.0)
    assert element.attributes == ("black",)


def test_regions_alone_are_enough():
    value = {name: item for name, item in GOOD["pretrain"].items() if name != "captions"}
    record = parse("pretrain", value)
    assert isinstance(record, records.PretrainRecord) and record.captions == ()


@pytest.mark.parametrize("task", records.TASKS)
def test_every_missing_field_is_named(task):
    for name in GOOD[task]:
        value = {key: item for key, item in GOOD[task].items() if key != name}
        if task == "pretrain" and name in ("captions", "elems"):
            continue  # either may be left out
        with pytest.raises(RecordError, match=f"shard-000003.tar.*'k7'.*'{name}'"):
            parse(task, value)


@pytest.mark.parametrize(
    ("task", "path", "value", "named"),
    [
        ("pretrain", ("elems", 0, "bb"), [1, 2, 0, 4], "elems[0].bb"),
        ("pretrain", ("elems", 0, "bb"), [1, 2, 3], "elems[0].bb"),
        ("pretrain", ("elems", 0, "bb"), [1, 2, 3, float("nan")], "elems[0].bb"),
        ("pretrain", ("elems", 0, "caption"), 3, "elems[0].caption"),
        ("pretrain", ("width",), True, "width"),
        ("vqa", ("questions",), [], "questions"),
        ("vqa", ("questions", 0, "answers"), {"red": "1"}, "questions[0].answers"),
        ("vqa", ("questions", 0, "answers"), {"red": 1.5}, "questions[0].answers"),
        ("nlvr2", ("statements", 0, "label"), 1, "statements[0].label"),
        ("nlvr2", ("image_ids",), ["a"], "image_ids"),
        ("retrieval", ("captions",), [], "captions"),
        ("grounding", ("height",), 0, "height"),
        ("grounding", ("width",), 10**400, "width"),
        ("grounding", ("expressions", 0, "bb"), [0, 0, 10**400, 2], "expressions[0].bb"),
        ("grounding", ("expressions", 0, "text"), "half \ud83d", "expressions[0].text"),
        ("pretrain", ("captions",), ["a cat", "\ud83d"], "captions"),
        ("vqa", ("questions", 0, "answers"), {"\ud83d": 1.0}, "questions[0].answers"),
    ],
)
def test_a_wrong_value_is_named(task, path, value, named):
    record = json.loads(json.dumps(GOOD[task]))
    place = record
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value
    with pytest.raises(RecordError) as caught:
        parse(task, record)
    assert f"'{named}'" in str(caught.value)
    assert caught.value.reason and "shard" not in caught.value.reason


@pytest.mark.parametrize("raw", [b"", b"{", b"\xff\xfe", b"[1]", b"[" * 100_000])
def test_broken_json_is_one_clear_error(raw):
    with pytest.raises(RecordError, match="sample 'k'"):
        parse_record("vqa", raw, "s.tar", "k")


def test_captions_of_a_txt_member():
    def record(**members: bytes) -> bytes:
        return record_member("pretrain", members, "k")

    assert json.loads(record(txt=b" a \n cat", json=b"{}"))["captions"] == ["a cat"]
    own = b'{"captions": ["own"]}'
    assert record(txt=b"a cat", json=own) == own
    for bad in (b"[" * 100_000, b"{"):
        with pytest.raises(SkipSample, match="not valid"):
            record(txt=b"a cat", json=bad)
    with pytest.raises(SkipSample, match="empty"):
        record(txt=b" ")
    with pytest.raises(SkipSample, match="not valid"):  # a key that is not UTF-8
        record_member("pretrain", {"txt": b"a cat"}, "\udcff")


def test_unknown_task():
    with pytest.raises(ValueError, match="unknown task 'vqaa'"):
        parse_record("vqaa", b"{}", "s", "k")
