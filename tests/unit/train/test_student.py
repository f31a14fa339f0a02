"""First weights: what is fresh beside loaded parameters, which layers came from where."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from models import presets
from models.checkpoints.build import RECORD
from models.initialise import add_sincos_positions
from models.trimming import default_trimming, with_trimming
from models.xvlm import XVLM
from train.config import InitialiseConfig, OptimConfig, RunConfig, TeacherConfig
from train.data_config import DataConfig
from train.runtime.engine import parameter_groups
from train.student import build_student, model_config
from train.trim_config import TrimConfig

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


@pytest.mark.parametrize("task", ["pretrain", "grounding"])
def test_sincos_positions_are_added_to_first_weights_and_told(tmp_path, task):
    """From random weights as from a folder that changes its form."""
    folder = saved(tmp_path / "model", "blocksworld-student")
    model = "blocksworld-student" if task == "pretrain" else str(folder)
    plain, moved = (
        build_student(
            config(tmp_path, task=task, model=model, initialise=InitialiseConfig(**given)),
            VOCABULARY,
            None,
        )
        for given in ({}, {"add_positions": "sincos"})
    )
    expected = XVLM(plain.model.config)
    expected.load_state_dict(plain.model.state_dict())
    add_sincos_positions(expected)
    for key, value in expected.state_dict().items():
        torch.testing.assert_close(moved.model.state_dict()[key], value, msg=key)
    assert moved.source == f"{plain.source} + sine-cosine positions"


def test_a_teacher_is_needed_where_weights_come_from_it(tmp_path):
    wanted = config(tmp_path, initialise=InitialiseConfig(source="teacher"))
    with pytest.raises(ValueError, match=r"teacher\.path"):
        build_student(wanted, VOCABULARY, None)


def test_a_folder_that_is_not_made_yet_is_no_unknown_preset(tmp_path):
    with pytest.raises(FileNotFoundError, match="^model: no/thing/config.json: not there"):
        model_config(config(tmp_path, model="no/thing"), None)
    wanted = config(tmp_path, initialise=InitialiseConfig(source="no/thing"))
    with pytest.raises(FileNotFoundError, match="^initialise.source: no/thing/config.json: not th"):
        build_student(wanted, VOCABULARY, None)


# --- models that have trimmers ---------------------------------------------------------------------


def trimmed(folder: Path, **changes: Any) -> Path:
    """A VQA teacher in mode "gather", whose vision blocks have two heads."""
    torch.manual_seed(0)
    vision, text = {"heads": (2,) * 4, "head_dim": 16}, {"vocab_size": VOCABULARY}
    plain = presets.config("blocksworld-micro-teacher", form="vqa", vision=vision, text=text)
    trimming = default_trimming(plain, vision=(1, 2), bottleneck=8, mode="gather", **changes)
    with_trimming(XVLM(plain), trimming).save_pretrained(folder)
    return folder


def trim_run(out: Path, model: str, **trim: Any) -> RunConfig:
    return config(out, stage="trim", task="vqa", model=model, trim=TrimConfig(**trim))


def test_a_run_without_trim_leaves_trimmers_at_rest(tmp_path, caplog):
    folder = trimmed(tmp_path / "model")
    wanted = config(tmp_path, stage="finetune", task="vqa", model=str(folder))
    first = build_student(wanted, VOCABULARY, None)
    model = first.model.train()
    assert "off and frozen" in caplog.text and not first.trimmers and not first.fresh
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (".trimmers." not in name), name
    ids = torch.tensor([[1, 5, 6, 2]])
    model.encode_image(torch.zeros(1, 3, 48, 48, dtype=torch.uint8))  # guided, were they on
    assert model.encode_text(ids, None).trimming is None
    model.save_pretrained(tmp_path / "again")
    assert XVLM.from_pretrained(tmp_path / "again").config == XVLM.from_pretrained(folder).config


def test_trimmers_that_are_there_go_on_at_the_rate_of_new_ones(tmp_path):
    folder = trimmed(tmp_path / "model")
    first = build_student(trim_run(tmp_path, str(folder), vision=(1, 2)), VOCABULARY, None)
    names = {name for name, _ in first.model.named_parameters() if ".trimmers." in name}
    assert first.trimmers == names and not first.fresh  # they came from somewhere
    assert all(p.requires_grad for p in first.model.parameters())


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("vision", (1, 2, 3)),
        ("vision", ()),
        ("fusion", ()),
        ("text", (1,)),
        ("guided", False),
        ("heads", ("vision",)),
        ("init_logit", 3.0),
        ("bottleneck", 16),
        ("projection", 16),
    ],
)
def test_other_trimmers_than_the_model_has_are_refused(tmp_path, key, value):
    folder = trimmed(tmp_path / "model")
    wanted = trim_run(tmp_path, str(folder), **{key: value})
    with pytest.raises(ValueError, match=rf"trim\.{key}.*has trimmers already"):
        model_config(wanted, VOCABULARY)
    from_source = replace(
        wanted, model="blocksworld-teacher", initialise=InitialiseConfig(source=str(folder))
    )
    with pytest.raises(ValueError, match=rf"trim\.{key}.*has trimmers already"):
        build_student(from_source, VOCABULARY, None)


def test_a_share_of_heads_wants_head_trimmers(tmp_path):
    asked: Any = {"heads": ("vision",), "cost": "ratio", "head_budget": 0.5}
    with pytest.raises(ValueError, match=r"trim\.head_budget.*no head trimmers"):
        model_config(trim_run(tmp_path, "blocksworld-micro-student", **asked), VOCABULARY)
    folder = trimmed(tmp_path / "model", heads=("vision",))
    trimming = model_config(trim_run(tmp_path, str(folder), **asked), VOCABULARY).trimming
    assert trimming is not None and trimming.heads == ("vision",)
