"""DeepSpeed settings: every "auto" filled, unknown keys and contradictions refused; optimizer
groups.
"""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from models import presets
from train.config import OptimConfig, RunConfig, UserError
from train.runtime.engine import engine_settings, zero_stage
from train.runtime.optimizer import GuardedAdamW, make_optimizer, parameter_groups

BASE = {
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "zero_optimization": {"stage": 1},
}


def _config(engine: str, precision: str = "fp32", **more: Any) -> RunConfig:
    return RunConfig(
        stage="pretrain",
        task="pretrain",
        out="runs/x",
        data={"train": "t", "batch": 12},
        model="m",
        optim={"clip": 0.7},
        engine={"config": engine, "precision": precision, "accumulate": 3} | more,
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


def test_a_compiled_student_needs_whole_parameters() -> None:
    assert zero_stage(engine_settings(_config("zero2", compile="default"))) == 2
    with pytest.raises(UserError, match="engine.compile=default .* engine.config=zero2"):
        engine_settings(_config("zero3", compile="default"))


def test_fp16_needs_zero_1(tmp_path: Path) -> None:
    assert _settings(tmp_path, {}, "fp16")["fp16"]["enabled"] is True
    with pytest.raises(UserError, match="zero1"):
        _settings(tmp_path, {"zero_optimization": {"stage": 0}}, "fp16")


@pytest.mark.parametrize("name", ["zero2_offload", "zero3_offload"])
def test_shipped_offload_files_pin_memory_for_gpus_only(name: str, monkeypatch) -> None:
    for gpu in (False, True):
        monkeypatch.setattr(torch.cuda, "is_available", lambda gpu=gpu: gpu)
        zero = engine_settings(_config(name))["zero_optimization"]
        assert (zero["offload_optimizer"]["device"], zero["offload_optimizer"]["pin_memory"]) == (
            "cpu",
            gpu,
        )
        assert ("offload_param" in zero) is (name == "zero3_offload")


@pytest.mark.parametrize(
    ("engine", "offload", "blocks"),
    [
        ("zero1", "optimizer", {"offload_optimizer"}),
        ("zero3", "optimizer", {"offload_optimizer"}),
        ("zero3", "parameters", {"offload_optimizer", "offload_param"}),
        ("zero2", "none", set()),
        ("zero2_offload", "none", {"offload_optimizer"}),
    ],
)
def test_offloading_adds_its_blocks(engine: str, offload: str, blocks: set[str]) -> None:
    settings = engine_settings(_config(engine, offload=offload))
    zero = settings["zero_optimization"]
    assert {key for key in zero if key.startswith("offload")} == blocks
    assert all(zero[block]["device"] == "cpu" for block in blocks)
    assert settings["zero_force_ds_cpu_optimizer"] is False


@pytest.mark.parametrize(
    ("engine", "offload", "remedy"),
    [("zero0", "optimizer", "zero2"), ("zero2", "parameters", "zero3")],
)
def test_offloading_below_its_stage_is_refused(engine: str, offload: str, remedy: str) -> None:
    with pytest.raises(UserError, match=f"engine.offload={offload}.*engine.config={remedy}"):
        engine_settings(_config(engine, offload=offload))


def test_a_file_that_offloads_at_stage_0_is_refused(tmp_path: Path) -> None:
    zero = {"stage": 0, "offload_optimizer": {"device": "cpu"}}
    with pytest.raises(UserError, match="ds.json: zero_optimization.offload_optimizer"):
        _settings(tmp_path, {"zero_optimization": zero})


def test_the_published_loss_scale() -> None:
    assert engine_settings(_config("zero1", "fp16"))["fp16"]["initial_scale_power"] == 16
    bounded = engine_settings(_config("zero1", "fp16", max_loss_scale=1024))["fp16"]
    assert (bounded["initial_scale_power"], bounded["min_loss_scale"]) == (10, 1)
    with pytest.raises(UserError, match="power of two"):
        engine_settings(_config("zero1", "fp16", max_loss_scale=1000))
    with pytest.raises(UserError, match="engine.precision=fp16"):
        engine_settings(_config("zero1", "bf16", max_loss_scale=1024))


def test_the_loss_scale_stays_within_its_bounds(monkeypatch) -> None:
    from deepspeed.runtime.fp16 import loss_scaler
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler

    from train.runtime.loss_scale import bound_loss_scale

    monkeypatch.setattr(loss_scaler.dist, "get_rank", lambda: 1)  # there is no group here

    def scaler() -> Any:
        return DynamicLossScaler(2.0**10, 1, 1, 1, False)

    free, bounded = scaler(), scaler()
    bound_loss_scale(SimpleNamespace(loss_scaler=free), 0)
    bound_loss_scale(SimpleNamespace(loss_scaler=bounded), 1024.0)
    for _ in range(5):
        free.update_scale(False)
        bounded.update_scale(False)
    assert (free.cur_scale, bounded.cur_scale) == (2.0**14, 2.0**10)
    restored = pickle.loads(pickle.dumps(bounded))  # as in a checkpoint
    for _ in range(14):
        restored.update_scale(True)  # does not raise at the lower end
    assert restored.cur_scale == 1.0
    for _ in range(30):
        restored.update_scale(False)
    assert restored.cur_scale == 2.0**10


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


def test_the_published_rule_decays_what_its_names_miss() -> None:
    student = presets.create("blocksworld-micro-student")
    names = {id(p): name for name, p in student.named_parameters()}

    def decaying(published: bool) -> set[str]:
        groups = parameter_groups(student, set(), OptimConfig(published_decay=published))
        return {names[id(p)] for g in groups if g["weight_decay"] for p in g["params"]}

    ours = decaying(False)
    assert all(student.get_parameter(name).ndim > 1 for name in ours)
    more = decaying(True) - ours
    assert decaying(True) >= ours and len(more) == 3
    assert {name.split(".")[0] for name in more} == {"itm_head", "bbox_head", "contrastive"}
    assert not any(name.endswith("bias") for name in more)


def test_without_a_compiler_torch_updates_the_offloaded_states(monkeypatch, caplog) -> None:
    import deepspeed.ops.op_builder

    class Broken:
        def load(self, verbose: bool) -> None:
            raise RuntimeError("ninja\nc++: command not found")

    monkeypatch.setattr(deepspeed.ops.op_builder, "CPUAdamBuilder", Broken, raising=False)
    groups = [{"params": [nn.Parameter(torch.ones(2))], "weight_decay": 0.1}]
    optimizer = make_optimizer(groups, OptimConfig(), stage=2, on_host=True)
    assert type(optimizer) is torch.optim.AdamW
    assert "cpu_adam cannot be compiled (c++: command not found)" in caplog.text


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
