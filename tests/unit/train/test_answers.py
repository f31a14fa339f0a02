"""Where a VQA run finds its answer list, and that it does not begin without one that it needs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from data_pipeline.blocksworld.build import build_blocksworld
from tests.unit.train.test_accuracy import hide_answers
from train.answers import answers_file, check_answers, load_answers
from train.build import build
from train.config import RunConfig
from train.recipes_io import find_recipe, load_run_config
from train.runtime.distributed import Distributed

ALONE = Distributed(rank=0, world_size=1, local_rank=0, device=torch.device("cpu"), backend="gloo")


def recipe(*overrides: str, name: str = "blocksworld-finetune-teacher") -> RunConfig:
    return load_run_config(find_recipe(name), list(overrides))[0]


def listed(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "answers.json").write_text(json.dumps(["red", "two"]))
    return folder / "answers.json"


def test_the_list_lies_beside_any_local_split(tmp_path: Path) -> None:
    extra, own = tmp_path / "vg" / "vqa", tmp_path / "coco" / "vqa"
    mixture = f"data.train=[{{path: {extra}/train}}, {{path: {own}/train}}]"
    remote = "data.train=https://example.org/vqa/train"
    val = f"data.val={own}/val"
    assert answers_file(recipe(mixture, val)) is None
    file = listed(own)
    for overrides in ((f"data.train={own}/train", val), (mixture, "data.val=null"), (remote, val)):
        assert answers_file(recipe(*overrides)) == file
    assert answers_file(recipe(remote, "data.val=null")) is None
    assert answers_file(recipe(mixture, val)) == file
    assert answers_file(recipe(f"data.train={extra}/train", f"data.val={own}/val")) == file
    first = listed(extra)
    assert answers_file(recipe(mixture, val)) == first


def test_only_an_evaluated_run_needs_the_list(tmp_path: Path) -> None:
    train = f"data.train={tmp_path}/vqa/train"
    check_answers(recipe(train, "data.val=null"), None)
    with pytest.raises(ValueError, match=r"vqa/answers\.json.*data\.val=null") as error:
        check_answers(recipe(train, f"data.val={tmp_path}/vqa/val"), None)
    assert str(error.value).count("answers.json") == 2  # one place, and the remedy
    with pytest.raises(ValueError, match="no split is a local folder"):
        check_answers(recipe("data.train=s3://b/vqa/train", "data.val=s3://b/vqa/val"), None)
    # The end of trimming evaluates on training inputs where there are no others.
    with pytest.raises(ValueError, match="answer list"):
        check_answers(recipe(train, "data.val=null", name="blocksworld-vqa-trim"), None)


def test_a_run_does_not_begin_when_validation_would_fail(tmp_path: Path, monkeypatch) -> None:
    build_blocksworld(
        tmp_path, scenes=12, val=4, test=4, image_size=48, seed=5, tasks=("vqa",), per_shard=12
    )
    engines: list[object] = []
    monkeypatch.setattr("train.build.build_engine", lambda *made: engines.append(made))
    config = recipe(
        f"out={tmp_path}/run",
        "model=blocksworld-micro-teacher",
        "initialise.source=random",
        f"data.train={tmp_path}/vqa/train",
        f"data.val={tmp_path}/vqa/val",
        "eval.batch=2",
    )
    hide_answers(tmp_path / "vqa" / "val", known=1)
    assert build(config, ALONE).validate is not None and len(engines) == 1
    hide_answers(tmp_path / "vqa" / "val")
    with pytest.raises(ValueError, match=r"data\.val: .*vqa/val: .*hidden"):
        build(config, ALONE)
    (tmp_path / "vqa" / "answers.json").unlink()
    engines.clear()
    with pytest.raises(ValueError, match="answer list"):
        build(config, ALONE)
    assert not engines


def test_the_list_of_a_run_is_read(tmp_path: Path) -> None:
    class Words:
        def __call__(self, texts, padding, return_tensors):
            ids = torch.tensor([[1, 5 + n, 2] for n, _ in enumerate(texts)])
            return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    config = recipe(f"data.train={tmp_path}/vqa/train")
    assert load_answers(config, Words()) is None
    listed(tmp_path / "vqa")
    answers = load_answers(config, Words())
    assert answers is not None and answers.strings == ("red", "two")
