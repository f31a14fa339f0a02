"""Batches of each task: shapes, dtypes, and what belongs together stays together."""

from __future__ import annotations

import dataclasses
import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from data_pipeline.batches import PretrainBatch, VqaBatch
from data_pipeline.collate import ImageRows
from data_pipeline.decode import decode_image
from data_pipeline.loader import build_loader
from data_pipeline.text import IGNORE, clean_text

REGION = SimpleNamespace(images=6, rows=16, max_regions=4, min_fraction_in_crop=0.5, unit_images=0)


def first(task, folder, tokenizer, **options):
    values = {"batch": 6, "train": True, "image_size": 24, "patch_size": 8, "max_tokens": 12}
    values |= {"region": REGION} | options
    return next(iter(build_loader(task, folder, tokenizer=tokenizer, **values)))


def check_types(batch):
    for field in dataclasses.fields(batch):
        value = getattr(batch, field.name)
        if isinstance(value, torch.Tensor):
            kind = {"images": torch.uint8, "boxes": torch.float32, "answer_weight": torch.float32}
            bools = (
                "valid",
                "text_mask",
                "question_mask",
                "answer_mask",
                "region_mask",
                "is_region",
            )
            expected = kind.get(field.name, torch.bool if field.name in bools else torch.int64)
            assert value.dtype == expected, field.name
            layout = torch.channels_last if value.ndim == 4 else torch.contiguous_format
            assert value.is_contiguous(memory_format=layout), field.name


def decoded(tokenizer, ids, mask):
    tokens = tokenizer.convert_ids_to_tokens(ids[mask].tolist())
    return " ".join(tokens[1:-1]).replace(" ##", "")


def test_pretrain(write_shards, tokenizer):
    import json

    originals = {}

    def keep(number, sample):
        originals[sample["__key__"]] = sample["jpg"], json.loads(sample["json"])

    folder = write_shards("pretrain", 20, change=keep)
    batch = first("pretrain", folder, tokenizer)
    assert isinstance(batch, PretrainBatch)
    check_types(batch)
    assert batch.images.shape == (6, 3, 24, 24) and batch.text_ids.shape == (6, 12)
    assert batch.mlm_labels.shape == (6, 8) and batch.region_mask is None and batch.boxes is None
    assert batch.image_index.tolist() == list(range(6)) and batch.valid.all()
    for row, key in enumerate(batch.keys):
        raw, record = originals[key]
        np.testing.assert_array_equal(batch.images[row].permute(1, 2, 0), decode_image(raw))
        wanted = {clean_text(caption, 12) for caption in record["captions"]}
        assert decoded(tokenizer, batch.text_ids[row], batch.text_mask[row]) in wanted
        used = batch.mlm_labels[row] != IGNORE
        positions = batch.mlm_positions[row][used]
        assert (batch.text_ids[row][positions] == batch.mlm_labels[row][used]).all()
        assert (batch.mlm_positions[row][~used] == 0).all()
        restored = batch.mlm_ids[row].clone()
        restored[positions] = batch.mlm_labels[row][used]
        assert torch.equal(restored, batch.text_ids[row])


@pytest.mark.parametrize("rows", [3, 16, 200])
def test_region_rows_are_fixed_in_number(write_shards, tokenizer, rows):
    folder = write_shards("pretrain", 20)
    region = SimpleNamespace(**vars(REGION) | {"rows": rows})
    batch = first("region", folder, tokenizer, region=region, augment="pretrain")
    check_types(batch)
    assert batch.images.shape == (6, 3, 24, 24) and batch.rows == rows == len(batch.keys)
    assert batch.region_mask.shape == (rows, 10) and batch.boxes.shape == (rows, 4)
    assert batch.mlm_labels.shape == (rows, 8) and batch.valid.all()
    whole = ~batch.is_region
    assert batch.region_mask[whole].all()
    assert (batch.boxes[whole] == torch.tensor([0.5, 0.5, 1, 1])).all()
    low = batch.boxes[:, :2] - batch.boxes[:, 2:] / 2
    high = batch.boxes[:, :2] + batch.boxes[:, 2:] / 2
    assert (low >= -1e-5).all() and (high <= 1 + 1e-5).all() and (batch.boxes[:, 2:] > 0).all()
    if rows == 200:
        # Copies of a row are masked differently, or they would add nothing.
        keys = [tuple(row.tolist()) for row in batch.text_ids]
        masked = {(key, tuple(row.tolist())) for key, row in zip(keys, batch.mlm_ids, strict=True)}
        assert len(masked) > len(set(keys))


def test_vqa_training_rows(write_shards, tokenizer):
    folder = write_shards("vqa", 20)
    for wanted in (1, 2, 3, 5):
        batch = first("vqa", folder, tokenizer, rows_per_image=wanted, max_answer_tokens=5)
        assert isinstance(batch, VqaBatch)
        check_types(batch)
        assert batch.rows == 6 * wanted and batch.answer_ids.shape[1] == 5
        for image in range(6):
            questions = [
                batch.questions[n] for n in range(batch.rows) if batch.image_index[n] == image
            ]
            assert len(questions) == wanted
            assert len(set(questions)) == min(wanted, 3)
        for number, row in enumerate(batch.answer_row.tolist()):
            text = decoded(tokenizer, batch.answer_ids[number], batch.answer_mask[number])
            assert batch.answers[row][text] == pytest.approx(float(batch.answer_weight[number]))
        assert len(batch.answer_row) == sum(len(answers) for answers in batch.answers)
        for row in range(batch.rows):
            text = decoded(tokenizer, batch.question_ids[row], batch.question_mask[row])
            assert text == clean_text(batch.questions[row], 12)
        assert set(batch.question_types) == {"colour"}


def test_vqa_without_answers(write_shards, tokenizer):
    """A test split with hidden answers can be evaluated; A >= B holds."""
    import json

    def hide(number, sample):
        record = json.loads(sample["json"])
        for question in record["questions"]:
            question["answers"] = {}
        sample["json"] = json.dumps(record).encode()

    folder = write_shards("vqa", 8, change=hide)
    batch = first("vqa", folder, tokenizer, train=False)
    assert batch.rows == 18 and len(batch.answer_row) == 18 and batch.answer_weight.sum() == 0
    assert batch.answers == ({},) * 18
    with pytest.raises(ValueError, match="no question has an answer"):
        first("vqa", folder, tokenizer)


def test_images_are_resized_only_when_needed(write_shards, tokenizer):
    folder = write_shards("vqa", 6)
    assert first("vqa", folder, tokenizer, image_size=16).images.shape == (6, 3, 16, 16)


def pictures(count, size=4):
    return [np.full((size, size, 3), n, np.uint8) for n in range(count)]


def collected(rows, images):
    batch = rows.collect(images)
    assert batch.shape == (len(images), 3, *images[0].shape[:2])
    assert batch.is_contiguous(memory_format=torch.channels_last)
    for found, image in zip(batch, images, strict=True):
        np.testing.assert_array_equal(found.permute(1, 2, 0), image)
    return batch


def test_pictures_are_put_into_the_batch_when_they_are_drawn():
    rows = ImageRows()
    first = [rows.put(image) for image in pictures(3)]
    collected(rows, first)
    second = [rows.put(image) for image in pictures(3)]
    batch = collected(rows, second)
    assert all(np.shares_memory(batch.numpy(), image) for image in second)
    third = collected(rows, [rows.put(image) for image in pictures(3)])
    assert not np.shares_memory(batch.numpy(), third.numpy())
    collected(rows, second)  # the batch that was handed out is unchanged


@pytest.mark.parametrize("case", ["order", "fewer", "more", "another size", "two streams", "copy"])
def test_pictures_out_of_their_rows_are_copied(case):
    rows = ImageRows()
    collected(rows, [rows.put(image) for image in pictures(4)])
    images = pictures(4)
    if case == "more":
        images = pictures(6)
    elif case == "another size":
        images = pictures(4, size=6)
    elif case == "fewer":
        images = pictures(2)
    elif case == "copy":
        rows = pickle.loads(pickle.dumps(rows))
    placed = [rows.put(image) for image in images]
    if case == "order":
        placed, images = placed[::-1], images[::-1]
    elif case == "two streams":
        others = [rows.put(image) for image in pictures(4)[::-1]]
        mixed = [placed[0], others[1], placed[2], others[3]]
        collected(rows, mixed)
        collected(rows, [rows.put(image) for image in pictures(4)])
    for place, image in zip(placed, images, strict=True):
        np.testing.assert_array_equal(place, image)
    collected(rows, placed)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"rows": 0}, "data.region.rows"),
        ({"max_regions": 0}, "max_regions"),
        ({"min_fraction_in_crop": 1.0}, "min_fraction_in_crop"),
        ({"images": 0}, "data.batch"),
    ],
)
def test_bad_region_settings(write_shards, tokenizer, change, named):
    folder = write_shards("pretrain", 6)
    with pytest.raises(ValueError, match=named):
        first("region", folder, tokenizer, region=SimpleNamespace(**vars(REGION) | change))
    with pytest.raises(ValueError, match="patch size"):
        first("region", folder, tokenizer, patch_size=7)
