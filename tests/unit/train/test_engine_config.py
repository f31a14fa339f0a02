"""DeepSpeed settings: every "auto" filled, unknown keys and contradictions refused; optimizer
groups.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from train.config import OptimConfig, RunConfig, UserError
from train.runtime.engine import GuardedAdamW, engine_settings, parameter_groups, zero_stage

BASE = {
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "zero_optimization": {"stage": 1},
}


def _config(engine: str, precision: str = "fp32") -> RunConfig:
    return RunConfig(
        stage="pretrain",
        task="pretrain",
        out="runs/x",
        data={"train": "t", "batch": 12},
        model="m",
        optim={"clip": 0.7},
        engine={"config": engine, "precision": precision, "accumulate": 3},
    )


def _settings(tmp_path: Path, changes: dict[str, Any], precision: str = "fp32") -> dict[str, Any]:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(BASE | changes))
    return engine_settings(_config(str(path), precision))


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_shipped_files_resolve_completely(stage: int, precision: str) -> None:
    settings = engine_settings(_config(f"zero{stage}", precision))
    assert zero_stage(settings) == stage
    assert settings["train_micro_batch_size_per_gpu"] == 12
    assert settings["gradient_accumulation_steps"] == 3
    assert settings["gradient_clipping"] == (0.0 if stage == 0 else 0.7)
    assert settings["torch_autocast"]["enabled"] is (precision == "bf16")
    assert settings["fp16"]["enabled"] is settings["bf16"]["enabled"] is False
    assert '"auto"' not in json.dumps(settings)


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"gradient_cliping": 1.0}, ["gradient_cliping", '"gradient_clipping"']),
        (
            {"checkpoint": {"tag_validatoin": "Fail"}},
            ["checkpoint.tag_validatoin", '"tag_validation"'],
        ),
        ({"optimizer": {"type": "Adam"}}, ["optimizer", "leave it out"]),
        ({"train_batch_size": 64}, ["train_batch_size", "leave it out"]),
        ({"gradient_clipping": 1.0}, ["gradient_clipping is 1.0", "0.7", '"auto"']),
        ({"train_micro_batch_size_per_gpu": 8}, ["data.batch", "12"]),
        ({"bf16": {"enabled": True}}, ["bf16.enabled", "fp32"]),
        (
            {"zero_optimization": {"stage": 1, "reduce_bucket_size": "auto"}},
            ["zero_optimization.reduce_bucket_size"],
        ),
    ],
)
def test_wrong_settings_name_file_and_key(
    tmp_path: Path, changes: dict[str, Any], parts: list[str]
) -> None:
    with pytest.raises(UserError) as error:
        _settings(tmp_path, changes)
    for part in [*parts, "ds.json"]:
        assert part in str(error.value)


def test_fp16_needs_zero_1(tmp_path: Path) -> None:
    assert _settings(tmp_path, {}, "fp16")["fp16"]["enabled"] is True
    with pytest.raises(UserError, match="zero1"):
        _settings(tmp_path, {"zero_optimization": {"stage": 0}}, "fp16")


def test_a_missing_file_names_the_shipped_ones() -> None:
    with pytest.raises(FileNotFoundError, match="zero1.*did you mean"):
        engine_settings(_config("zero11"))


class _Student(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(3, 4)
        self.norm = nn.LayerNorm(4)
        self.head = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
        self.headroom = nn.Linear(2, 2, bias=False)
        self.frozen = nn.Linear(2, 2).requires_grad_(False)


def test_four_groups_split_every_trainable_parameter_once() -> None:
    student = _Student()
    groups = parameter_groups(
        student, {"head"}, OptimConfig(lr=1.0, weight_decay=0.1, new_lr_multiplier=2.0)
    )
    found = {group["name"]: group for group in groups}
    assert found.keys() == {"decay", "no_decay", "decay_new", "no_decay_new"}
    assert [
        p is q
        for p, q in zip(
            found["decay"]["params"], [student.body.weight, student.headroom.weight], strict=True
        )
    ]
    assert len(found["no_decay"]["params"]) == len(found["no_decay_new"]["params"]) == 3
    assert found["decay_new"]["params"][0] is student.head[0].weight
    assert (found["decay_new"]["lr"], found["decay_new"]["weight_decay"]) == (2.0, 0.1)
    assert (found["no_decay"]["lr"], found["no_decay"]["weight_decay"]) == (1.0, 0.0)
    ids = [id(p) for group in groups for p in group["params"]]
    assert sorted(ids) == sorted(id(p) for p in student.parameters() if p.requires_grad)


def test_empty_groups_are_left_out_and_unknown_modules_refused() -> None:
    assert [g["name"] for g in parameter_groups(_Student(), set(), OptimConfig())] == [
        "decay",
        "no_decay",
    ]
    with pytest.raises(ValueError, match="heda"):
        parameter_groups(_Student(), {"heda"}, OptimConfig())


def test_guarded_adamw_clips_like_torch_and_skips_non_finite_gradients() -> None:
    torch.manual_seed(0)
    ours, theirs = nn.Linear(5, 5), nn.Linear(5, 5)
    theirs.load_state_dict(ours.state_dict())
    guarded = GuardedAdamW(ours.parameters(), clip=0.5, lr=0.1)
    plain = torch.optim.AdamW(theirs.parameters(), lr=0.1)
    for _ in range(3):
        x = torch.randn(4, 5)
        for model, optimizer in ((ours, guarded), (theirs, plain)):
            optimizer.zero_grad()
            model(x).square().sum().backward()
        norm = nn.utils.clip_grad_norm_(theirs.parameters(), 0.5)
        guarded.step()
        plain.step()
        assert guarded._global_grad_norm == pytest.approx(norm.item())
    torch.testing.assert_close(ours.weight, theirs.weight)
    before = ours.weight.clone()
    assert ours.bias.grad is not None
    ours.bias.grad[0] = torch.inf
    guarded.step()
    assert guarded.overflow and torch.equal(ours.weight, before)
