"""First weights: what is fresh beside loaded parameters, which layers came from where."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from models import presets
from models.checkpoints.build import RECORD
from models.xvlm import XVLM
from train.config import InitialiseConfig, OptimConfig, RunConfig, TeacherConfig
from train.data_config import DataConfig
from train.runtime.engine import parameter_groups
from train.student import build_student, model_config

VOCABULARY = 60


def config(out: Path, **changes) -> RunConfig:
    plain = RunConfig(
        stage="pretrain",
        task="pretrain",
        out=str(out),
        data=DataConfig(train="x"),
        model="blocksworld-student",
    )
    return replace(plain, **changes)


def saved(folder: Path, name: str, form: str = "pretrain", seed: int = 0) -> Path:
    torch.manual_seed(seed)
    model = XVLM(presets.config(name, form=form, text={"vocab_size": VOCABULARY}))
    model.save_pretrained(folder)
    return folder


def test_random_weights_are_not_fresh_beside_anything(tmp_path):
    first = build_student(config(tmp_path), VOCABULARY, None)
    assert not first.fresh and first.source == "random, seed 0"


def test_a_student_of_a_teacher_knows_its_layers(tmp_path):
    teacher = saved(tmp_path / "teacher", "blocksworld-teacher")
    wanted = config(
        tmp_path,
        teacher=TeacherConfig(path=str(teacher)),
        initialise=InitialiseConfig(source="teacher"),
    )
    first = build_student(wanted, VOCABULARY, XVLM.from_pretrained(teacher))
    depth = len(first.model.vision.blocks)
    assert first.maps["vision.blocks"] == [2 * n + 1 for n in range(depth)]
    assert first.unused and not first.fresh
    first.save(tmp_path / "origin.json")
    told = json.loads((tmp_path / "origin.json").read_text())
    assert told["source"] == str(teacher) and told["layer_maps"] == first.maps


def test_what_a_conversion_did_not_fill_gets_its_own_learning_rate(tmp_path):
    folder = saved(tmp_path / "start", "blocksworld-student")
    names = {name for name, _ in XVLM.from_pretrained(folder).named_parameters()}
    fresh = sorted(name for name in names if name.startswith(("itm_head.", "contrastive.")))
    (folder / RECORD).write_text(json.dumps({"conversions": [], "fresh": fresh}))
    first = build_student(config(tmp_path, model=str(folder)), VOCABULARY, None)
    assert first.fresh == set(fresh)
    groups = parameter_groups(first.model, set(first.fresh), OptimConfig(new_lr_multiplier=2.0))
    doubled = {id(p) for g in groups if g["lr_multiplier"] == 2.0 for p in g["params"]}
    assert doubled == {id(p) for name, p in first.model.named_parameters() if name in fresh}

    # The task form has no such heads; what its decoder starts from was loaded.
    task = config(tmp_path, stage="finetune", task="vqa", model=str(folder))
    assert build_student(task, VOCABULARY, None).fresh == frozenset()


def test_fresh_weights_stay_fresh_where_a_form_copies_them(tmp_path):
    folder = saved(tmp_path / "start", "blocksworld-student")
    names = [n for n, _ in XVLM.from_pretrained(folder).named_parameters()]
    fresh = [name for name in names if name.startswith("mlm_head.")]
    (folder / RECORD).write_text(json.dumps({"conversions": [], "fresh": fresh}))
    task = config(tmp_path, stage="finetune", task="vqa", model=str(folder))
    first = build_student(task, VOCABULARY, None)
    assert first.fresh and all(name.startswith("decoder.head.") for name in first.fresh)


def test_a_teacher_is_needed_where_weights_come_from_it(tmp_path):
    wanted = config(tmp_path, initialise=InitialiseConfig(source="teacher"))
    with pytest.raises(ValueError, match=r"teacher\.path"):
        build_student(wanted, VOCABULARY, None)


def test_a_folder_that_is_not_made_yet_is_no_unknown_preset(tmp_path):
    with pytest.raises(FileNotFoundError, match="^model: no/thing/config.json: not there"):
        model_config(config(tmp_path, model="no/thing"), None)
