"""Batches of retrieval, captioning, NLVR2 and grounding against what the shards hold."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.assemblers import (
    CaptionAssembler,
    GroundingAssembler,
    Nlvr2Assembler,
    RetrievalAssembler,
    group_number,
)
from data_pipeline.blocksworld.build import build_blocksworld
from data_pipeline.faults import SkipSample
from data_pipeline.loader import build_loader
from data_pipeline.records import parse_record
from data_pipeline.stream import ToRecord, decode
from data_pipeline.task_batches import CaptionBatch, GroundingBatch, Nlvr2Batch, RetrievalBatch
from data_pipeline.text import TextEncoder, clean_text, load_tokenizer
from data_pipeline.transforms import Augmentation

SIZE, TOKENS = 48, 24
PRETRAIN: dict[str, Any] = {"held": "pretrain", "max_tokens": 40}
TASKS = ("nlvr2", "retrieval", "captioning", "grounding")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("scenes") / "data"
    build_blocksworld(out, 12, val=5, test=2, image_size=SIZE, tasks=TASKS, per_shard=6)
    return out


@pytest.fixture(scope="module")
def words(folder: Path):
    return load_tokenizer(folder / "tokenizer")


def loader(folder: Path, words, task: str, train: bool, **options: Any) -> Any:
    where = folder / options.pop("held", task) / ("train" if train else "val")
    settings: dict[str, Any] = {
        "batch": 4,
        "image_size": SIZE,
        "max_tokens": TOKENS,
        "block": 4,
    } | options
    return build_loader(task, where, tokenizer=words, train=train, seed=3, **settings)


def samples(folder: Path, task: str, split: str = "val") -> list[tuple[str, dict[str, Any]]]:
    """(key, JSON) in manifest order, read without the pipeline."""
    import tarfile

    found = []
    for shard in sorted((folder / task / split).glob("*.tar")):
        with tarfile.open(shard) as tar:
            for member in tar:
                if member.name.endswith(".json"):
                    file = tar.extractfile(member)
                    assert file is not None
                    found.append((member.name.removesuffix(".json"), json.loads(file.read())))
    return found


def spoken(words, ids: torch.Tensor, mask: torch.Tensor) -> str:
    return words.decode(ids[mask], skip_special_tokens=True)


def batches(folder: Path, words, task: str, kind: type) -> list[Any]:
    found = list(loader(folder, words, task, False))
    assert len(found) == 2 and all(isinstance(batch, kind) for batch in found)
    return found


def test_retrieval_evaluation_has_every_caption_and_every_image_once(folder, words):
    texts, images, rows = [], [], 0
    for batch in batches(folder, words, "retrieval", RetrievalBatch):
        keep = batch.image_valid.tolist()
        assert batch.images.shape[0] == len(keep) == len(batch.image_ids) == 4
        images += [name for name, valid in zip(batch.image_ids, keep, strict=True) if valid]
        for row in range(batch.rows):
            assert batch.groups[row] == group_number(batch.image_ids[batch.image_index[row]])
            if batch.valid[row]:
                owner = batch.image_ids[batch.image_index[row]]
                said = clean_text(batch.captions[row], TOKENS)
                assert spoken(words, batch.text_ids[row], batch.text_mask[row]) == " ".join(
                    said.split()[: TOKENS - 2]
                )
                texts.append((owner, batch.captions[row]))
            rows += 1
    known = [content for _, content in samples(folder, "retrieval")]
    assert images == [content["image_id"] for content in known]
    assert texts == [(c["image_id"], text) for c in known for text in c["captions"]]
    assert rows > len(texts)  # the last batch is filled up


def test_caption_evaluation_has_one_row_and_all_references_for_each_image(folder, words):
    seen = []
    for batch in batches(folder, words, "captioning", CaptionBatch):
        assert batch.rows == batch.images.shape[0] == 4
        assert batch.prompt_tokens == 4  # [CLS] a picture of
        assert words.decode(batch.prompt[0]) == "[CLS] a picture of"
        for row in range(4):
            ids = batch.text_ids[row][batch.written[row]]
            first = clean_text(batch.references[row][0], TOKENS)
            whole = first.split()[: TOKENS - 5]  # [CLS], prompt and [SEP] take five
            assert words.decode(ids, skip_special_tokens=True) == " ".join(whole)
            assert ids[-1] == words.sep_token_id
            if batch.valid[row]:
                seen.append((batch.image_ids[row], list(batch.references[row])))
    assert seen == [(c["image_id"], c["captions"]) for _, c in samples(folder, "captioning")]


def test_nlvr2_rows_point_at_their_two_images(folder, words):
    pictures = {}
    for task in ("retrieval",):  # the same scenes, one by one
        for batch in loader(folder, words, task, False, batch=5):
            pictures |= dict(zip(batch.image_ids, batch.images, strict=True))
    known = {key: content for key, content in samples(folder, "nlvr2")}
    seen = []
    for batch in loader(folder, words, "nlvr2", False, batch=2):
        assert isinstance(batch, Nlvr2Batch) and batch.images.shape[0] == 4
        for row in range(batch.rows):
            content = known[batch.keys[row]]
            for index, name in zip(
                (batch.image_index[row], batch.second_index[row]), content["image_ids"], strict=True
            ):
                assert torch.equal(batch.images[index], pictures[name])
            if batch.valid[row]:
                seen.append((batch.sentences[row], bool(batch.label[row])))
    expected = [(s["sentence"], s["label"]) for c in known.values() for s in c["statements"]]
    assert seen == expected and len({label for _, label in seen}) == 2


def test_grounding_evaluation_keeps_the_whole_picture_and_its_boxes(folder, words):
    seen = []
    for batch in batches(folder, words, "grounding", GroundingBatch):
        for row in torch.nonzero(batch.valid).flatten():
            seen.append((batch.expressions[row], (batch.boxes[row] * SIZE).tolist()))
    expected = [e for _, c in samples(folder, "grounding") for e in c["expressions"]]
    assert [text for text, _ in seen] == [e["text"] for e in expected]
    for (_, (cx, cy, w, h)), element in zip(seen, expected, strict=True):
        x, y, *size = element["bb"]
        assert (cx - w / 2, cy - h / 2, w, h) == pytest.approx((x, y, *size), abs=1e-4)


@pytest.mark.parametrize("task", TASKS)
def test_training_draws_a_fixed_number_of_rows_and_resumes_exactly(folder, words, task):
    options = {"rows_per_image": 2, "augment": "finetune", "batch": 3}
    straight = loader(folder, words, task, True, **options)
    stream = iter(straight)
    first = [next(stream) for _ in range(5)]
    assert all(batch.rows == 6 and bool(batch.valid.all()) for batch in first)
    again = loader(folder, words, task, True, **options)
    start = iter(again)
    for _ in range(2):
        next(start)
    resumed = loader(folder, words, task, True, **options)
    resumed.load_state_dict(again.state_dict())
    for expected, found in zip(first[2:], iter(resumed), strict=False):
        assert found.keys == expected.keys
        assert torch.equal(found.images, expected.images)
        assert torch.equal(found.text_ids, expected.text_ids)


def test_a_batch_survives_the_trip_from_a_worker(folder, words):
    alone = list(loader(folder, words, "nlvr2", False, batch=2))
    sent = list(loader(folder, words, "nlvr2", False, batch=2, workers=1))
    for ours, theirs in zip(alone, sent, strict=True):
        assert torch.equal(ours.images, theirs.images) and torch.equal(ours.label, theirs.label)
        assert ours.sentences == theirs.sentences


def test_a_folder_of_another_task_is_refused(folder, words):
    with pytest.raises(ValueError, match="holds 'retrieval' samples, but 'nlvr2' batches need"):
        build_loader(
            "nlvr2", folder / "retrieval" / "val", tokenizer=words, batch=1, train=False,
            image_size=SIZE,
        )  # fmt: skip


def test_a_pair_with_one_picture_is_refused():
    sample = {"__url__": "s.tar", "__key__": "k", "0.jpg": b"x", "json": b"{}"}
    with pytest.raises(SkipSample, match=r"no image member \(\.1\.jpg, \.1\.jpeg, \.1\.png\)"):
        ToRecord("nlvr2")(sample)


# -- grounding: boxes follow the picture ---------------------------------------------------------


def marked(
    box: tuple[int, int, int, int], texts: Sequence[str], width: int = 60, height: int = 40
) -> dict[str, Any]:
    """A black picture with a white box, and expressions about it."""
    image = np.zeros((height, width, 3), np.uint8)
    x, y, w, h = box
    image[y : y + h, x : x + w] = 255
    said = [{"text": text, "bb": list(box)} for text in texts]
    content = {"image_id": "i", "width": width, "height": height, "expressions": said}
    record = parse_record("grounding", json.dumps(content).encode(), "s", "k")
    return {
        "__key__": "k", "__position__": 0, "__attempt__": 0, "__valid__": True,
        "record": record, "image": image,
    }  # fmt: skip


def grounding(words, name: str = "finetune", seed: int = 0) -> GroundingAssembler:
    return GroundingAssembler(TextEncoder(words, TOKENS), Augmentation(name, SIZE), seed, True)


@settings(max_examples=25, deadline=None)
@given(
    x=st.integers(0, 39), y=st.integers(0, 24), w=st.integers(6, 20), h=st.integers(6, 15),
    seed=st.integers(0, 10_000),
)  # fmt: skip
def test_the_box_stays_on_what_it_described(words, x, y, w, h, seed):
    assembler = grounding(words, seed=seed)
    item = assembler.draw(marked((x, y, w, h), ["the thing"]))
    cx, cy, bw, bh = item.boxes[0]
    assert cx - bw / 2 + 1e-9 >= 0 and cx + bw / 2 <= 1 + 1e-9
    bright = item.image.mean(2) > 100
    rows, columns = np.flatnonzero(bright.any(1)), np.flatnonzero(bright.any(0))
    found = (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
    expected = np.array([cx - bw / 2, cy - bh / 2, cx + bw / 2, cy + bh / 2]) * SIZE
    pixel = SIZE * np.array([bw / w, bh / h, bw / w, bh / h])  # of the source, in the result
    # Equalising spreads the resize's soft edge over at most one pixel of the source.
    assert (np.abs(np.array(found) - expected) <= 1 + pixel).all()


def test_pictures_are_mirrored_unless_a_text_says_left(words):
    def mirrored(text: str) -> int:
        count = 0
        for seed in range(40):
            sample = marked((0, 0, 60, 40), [text])  # the box is everything: there is no crop
            sample["image"][:, :30] = 0
            item = grounding(words, seed=seed).draw(sample)
            count += int(item.image[:, : SIZE // 2].mean() > item.image[:, SIZE // 2 :].mean())
        return count

    assert 10 < mirrored("the bright side") < 30
    assert mirrored("the right side") == 0


def test_a_crop_holds_all_drawn_boxes(words):
    sample = marked((2, 3, 10, 10), ["one"])
    other = marked((40, 20, 12, 15), ["two"])
    both = sample["record"].expressions + other["record"].expressions
    object.__setattr__(sample["record"], "expressions", both)
    for seed in range(20):
        assembler = GroundingAssembler(
            TextEncoder(words, TOKENS), Augmentation("finetune", SIZE), seed, True, 2
        )
        item = assembler.draw(sample)
        assert sorted(item.texts) == ["one", "two"]
        for cx, cy, w, h in item.boxes:
            assert min(cx - w / 2, cy - h / 2) > -1e-9 and max(cx + w / 2, cy + h / 2) < 1 + 1e-9


def test_a_box_outside_the_picture_is_named(words):
    with pytest.raises(SkipSample, match=r"expressions\[0\].bb.*leaves the image \(60x40\)"):
        grounding(words).draw(marked((50, 10, 20, 5), ["far"]))


# -- the others ------------------------------------------------------------------------------------


def test_the_two_images_of_a_pair_are_augmented_on_their_own(words):
    record = parse_record(
        "nlvr2",
        b'{"image_ids": ["a", "b"], "statements": [{"sentence": "left", "label": true}]}',
        "s", "k",
    )  # fmt: skip
    pixels = np.random.default_rng(0).integers(0, 255, (SIZE, SIZE, 3), np.uint8)
    assembler = Nlvr2Assembler(TextEncoder(words, TOKENS), Augmentation("finetune", SIZE), 0, True)
    sample = {
        "__key__": "k", "__position__": 0, "__attempt__": 0, "__valid__": True,
        "record": record, "image": (pixels, pixels.copy()),
    }  # fmt: skip
    batch = assembler.collate([assembler.draw(sample)])
    assert not torch.equal(batch.images[0], batch.images[1])


def test_captions_are_cleaned_and_the_prompt_is_not(words):
    raw = TextEncoder(words, TOKENS, clean=False)
    assembler = CaptionAssembler(raw, Augmentation("none", SIZE), 0, True, 1, "a picture of ")
    record = parse_record("captioning", b'{"image_id": "1", "captions": ["A red-square."]}', "", "")
    sample = {
        "__key__": "k", "__position__": 0, "__attempt__": 0, "__valid__": True,
        "record": record, "image": np.zeros((SIZE, SIZE, 3), np.uint8),
    }  # fmt: skip
    batch = assembler.collate([assembler.draw(sample)])
    assert words.decode(batch.text_ids[0][batch.text_mask[0]]) == (
        "[CLS] a picture of a red square [SEP]"
    )
    assert batch.written[0].nonzero().flatten().tolist() == [4, 5, 6, 7]


def test_bad_settings_are_named(words):
    clean, raw = TextEncoder(words, 5), TextEncoder(words, 5, clean=False)
    augmentation = Augmentation("none", SIZE)
    with pytest.raises(ValueError, match="no room for a caption"):
        CaptionAssembler(raw, augmentation, 0, True)
    with pytest.raises(ValueError, match="does not clean"):
        CaptionAssembler(clean, augmentation, 0, True)
    with pytest.raises(ValueError, match="rows_per_image must be at least 1"):
        RetrievalAssembler(clean, augmentation, 0, True, 0)


def test_answers_keep_their_apostrophes(write_shards, tokenizer):
    """As published, and as the answers that are ranked: cleaning made "can't" into "can t"."""

    def change(number: int, sample: dict[str, Any]) -> None:
        content = json.loads(sample["json"])
        for question in content["questions"]:
            question |= {"answers": {"can't": 1.0}, "question": "can't it?"}
        sample["json"] = json.dumps(content).encode()

    shards = write_shards("vqa", 2, change=change)
    batch: Any = next(
        iter(build_loader("vqa", shards, tokenizer=tokenizer, batch=2, train=False, image_size=24))
    )
    said = tokenizer("can't", add_special_tokens=False)["input_ids"]
    assert len(said) == 3  # can, an apostrophe, t
    expected = [tokenizer.cls_token_id, *said, tokenizer.sep_token_id]
    assert batch.answer_ids[0][batch.answer_mask[0]].tolist() == expected
    assert int(batch.question_mask[0].sum()) == 5  # can, t, it


def test_decode_takes_one_image_or_two(folder):
    import tarfile

    shard = sorted((folder / "nlvr2" / "val").glob("*.tar"))[0]
    with tarfile.open(shard) as tar:
        file = tar.extractfile(next(m for m in tar if m.name.endswith("0.jpg")))
        assert file is not None
        raw = file.read()
    assert decode({"raw": raw})["image"].shape == (SIZE, SIZE, 3)
    first, second = decode({"raw": (raw, raw)})["image"]
    assert np.array_equal(first.pixels(), second.pixels())


def test_drawing_depends_on_the_position_only(words):
    random.seed(1)
    one = grounding(words).draw(marked((5, 5, 9, 9), ["a", "b", "c"]))
    random.seed(2)
    two = grounding(words).draw(marked((5, 5, 9, 9), ["a", "b", "c"]))
    assert one.texts == two.texts and np.array_equal(one.image, two.image)


def test_captions_of_pretraining_data_serve_domain_stages(tmp_path, words):
    build_blocksworld(tmp_path / "data", 6, val=5, test=1, image_size=SIZE, tasks=("pretrain",))
    known = [content for _, content in samples(tmp_path / "data", "pretrain")]
    pairs = [
        (batch.image_ids[int(batch.image_index[row])], batch.captions[row])
        for batch in loader(tmp_path / "data", words, "nlvr2_pretrain", False, **PRETRAIN)
        for row in range(batch.rows)
        if batch.valid[row]
    ]
    assert pairs == [(c["image_id"], text) for c in known for text in c["captions"]]
    written = [
        (batch.image_ids[row], batch.references[row])
        for batch in loader(tmp_path / "data", words, "captioning", False, **PRETRAIN)
        for row in range(batch.rows)
        if batch.valid[row]
    ]
    assert written == [(c["image_id"], tuple(c["captions"])) for c in known]


@pytest.mark.parametrize("task", ["nlvr2_pretrain", "captioning"])
def test_pictures_without_a_caption_are_skipped_by_domain_stages(words, task):
    text = TextEncoder(words, TOKENS, clean=task != "captioning")
    make = CaptionAssembler if task == "captioning" else RetrievalAssembler
    assembler = make(text, Augmentation("none", SIZE), 0, True)
    element = {"caption": "red", "bb": [0, 0, 4, 4]}
    content = {"image_id": "a", "elems": [element], "width": SIZE, "height": SIZE}
    record = parse_record("pretrain", json.dumps(content).encode(), "s", "a")
    sample = {
        "__key__": "a", "__position__": 0, "__attempt__": 0, "__valid__": True, "record": record,
        "image": np.zeros((SIZE, SIZE, 3), np.uint8),
    }  # fmt: skip
    with pytest.raises(SkipSample, match="no caption"):
        assembler.draw(sample)
