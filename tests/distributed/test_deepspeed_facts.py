"""What we rely on in DeepSpeed, pinned. Widen `deepspeed==` in setup.cfg only when this file
passes.

A test here says nothing about our code: it goes red when an upgrade changes a behaviour that our
code assumes (or
works around: then the workaround can go).
"""

import functools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.distributed.spawn import ROOT, run_ranks

pytestmark = pytest.mark.world_size(2)
STAGES = (0, 1, 2, 3)
BATCH = 3


class TwoHeads(nn.Module):
    """A trunk and two heads, of which a step may use one. Odd sizes, so that partitions need
    padding.
    """

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.trunk = nn.Linear(5, 7)
        self.first = nn.Linear(7, 3)
        self.second = nn.Linear(7, 3)

    def forward(self, x: torch.Tensor, heads: str) -> torch.Tensor:
        states = self.trunk(x)  # (B, 7)
        loss = torch.zeros(())
        if "1" in heads:
            loss = loss + self.first(states).square().mean()
        if "2" in heads:
            loss = loss + self.second(states).square().mean()
        if "0" in heads:  # touched with no weight
            loss = loss + 0.0 * self.second(states).sum()
        return loss


def settings(stage: int, **changes: Any) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": BATCH,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
        "checkpoint": {"tag_validation": "Fail"},
        "zero_optimization": {"stage": stage},
    } | changes


def make_engine(model: nn.Module, stage: int, **changes: Any) -> Any:
    import deepspeed

    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=optimizer, config=settings(stage, **changes)
    )
    return engine


def weights(engine: Any) -> dict[str, torch.Tensor]:
    from deepspeed import zero

    named = dict(engine.module.named_parameters())
    partitioned = [p for p in named.values() if hasattr(p, "ds_id")]
    with zero.GatheredParameters(partitioned, modifier_rank=None, enabled=bool(partitioned)):
        return {name: p.detach().clone() for name, p in named.items()}


def pictures(rank: int, step: int) -> torch.Tensor:
    return torch.randn(BATCH, 5, generator=torch.Generator().manual_seed(10 * step + rank))


def walk(stage: int) -> dict[str, Any]:
    """Everything that needs two ranks at one stage; the assertions are in the tests."""
    rank = int(os.environ["RANK"])
    found: dict[str, Any] = {}

    engine = make_engine(TwoHeads(), stage)
    loss = engine(pictures(rank, 0), "1") + engine(pictures(rank, 1), "12")
    engine.backward(loss)
    engine.step()
    found["summed"] = weights(engine)
    found["norm"] = engine.get_global_grad_norm()
    engine.backward(engine(pictures(rank, 2), "1"))
    engine.step()
    found["unused"] = weights(engine)
    engine.backward(engine(pictures(rank, 3), "10"))
    engine.step()
    found["touched"] = weights(engine)

    for group in engine.optimizer.param_groups:
        group["lr"] = 0.0
    engine.backward(engine(pictures(rank, 4), "12"))
    engine.step()
    found["no_lr"] = weights(engine)
    for group in engine.optimizer.param_groups:
        group["lr"] = 1.0
    if stage > 0:  # in fp32 stage 0 steps on whatever it gets; ours guards it there
        broken = pictures(rank, 5) * (float("nan") if rank == 1 else 1.0)
        engine.backward(engine(broken, "12"))
        engine.step()
        found["applied"] = engine.was_step_applied()
        found["after_nan"] = weights(engine)

    outside = nn.Parameter(torch.ones(1))
    engine.backward(engine(pictures(rank, 6), "12") * outside)
    found["outside"] = outside.grad.clone()
    engine.step()
    return found


@functools.cache
def walked(stage: int) -> list[dict[str, Any]]:
    return run_ranks(walk, 2, stage)


def reference() -> tuple[TwoHeads, torch.optim.SGD]:
    model = TwoHeads()
    return model, torch.optim.SGD(model.parameters(), lr=1.0)


def reference_step(
    model: TwoHeads, optimizer: torch.optim.SGD, parts: list[tuple[int, str]]
) -> None:
    """One step on the mean of both ranks' losses."""
    optimizer.zero_grad()
    sum(
        model(pictures(rank, step), heads) / 2 for rank in (0, 1) for step, heads in parts
    ).backward()
    optimizer.step()


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    for name, value in expected.items():
        torch.testing.assert_close(
            found[name], value, rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("stage", STAGES)
def test_one_summed_backward_is_the_mean_over_ranks(stage: int) -> None:
    model, optimizer = reference()
    reference_step(model, optimizer, [(0, "1"), (1, "12")])
    for found in walked(stage):
        assert_same(found["summed"], dict(model.named_parameters()))


@pytest.mark.parametrize("stage", STAGES)
def test_gradient_norm_is_known_above_stage_0(stage: int) -> None:
    # At stage 0 in fp32 nobody computes it unless the optimizer does.
    assert all((found["norm"] is None) == (stage == 0) for found in walked(stage))


@pytest.mark.parametrize("stage", STAGES)
def test_unused_parameter_keeps_still_below_stage_3(stage: int) -> None:
    """At stage 3 the previous step's gradient is applied once more: why every head is touched in
    every step.
    """
    for found in walked(stage):
        still = torch.equal(found["unused"]["second.weight"], found["summed"]["second.weight"])
        assert still == (stage < 3)


@pytest.mark.parametrize("stage", STAGES)
def test_touched_parameter_keeps_still(stage: int) -> None:
    for found in walked(stage):
        torch.testing.assert_close(
            found["touched"]["second.weight"], found["unused"]["second.weight"], rtol=0, atol=0
        )
        assert not torch.equal(found["touched"]["first.weight"], found["unused"]["first.weight"])


@pytest.mark.parametrize("stage", STAGES)
def test_learning_rate_written_into_the_groups_counts(stage: int) -> None:
    for found in walked(stage):
        assert_same(found["no_lr"], found["touched"])


@pytest.mark.parametrize("stage", STAGES[1:])
def test_nan_on_one_rank_skips_the_step_on_all(stage: int) -> None:
    for found in walked(stage):
        assert found["applied"] is False
        assert_same(found["after_nan"], found["no_lr"])


@pytest.mark.parametrize("stage", STAGES)
def test_parameter_outside_the_engine_gets_its_local_gradient(stage: int) -> None:
    """Not averaged: whoever owns it must all-reduce."""
    results = walked(stage)
    model = TwoHeads()
    model.load_state_dict(results[0]["no_lr"])
    for rank, found in enumerate(results):
        expected = model(pictures(rank, 6), "12").detach().reshape(1)
        torch.testing.assert_close(found["outside"], expected, rtol=1e-5, atol=1e-6)


def complaint(stage: int, **changes: Any) -> str:
    """The class and text of what `initialize` raises, or an empty string."""
    try:
        make_engine(TwoHeads(), stage, **changes)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


class Temperature(TwoHeads):
    """With a parameter of no dimensions, as in CLIP."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.temperature = nn.Parameter(torch.full(shape, 0.07))


def alone(folder: str) -> dict[str, Any]:
    """What one process can tell."""
    found: dict[str, Any] = {}
    for shape in ((), (1,)):
        try:
            make_engine(Temperature(shape), 1)
            found[f"shape {shape}"] = ""
        except Exception as error:
            found[f"shape {shape}"] = f"{type(error).__name__}: {error}"
    found["unknown top"] = complaint(1, gradient_clippping=1.0)
    found["unknown zero"] = complaint(1, zero_optimization={"stage": 1, "no_such_key": 1})
    found["elasticity"] = complaint(1, elasticity={"enabled": False})
    found["auto batch"] = complaint(1, train_micro_batch_size_per_gpu="auto")

    import deepspeed

    values = settings(1)
    del values["gradient_clipping"]
    model = TwoHeads()
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=torch.optim.SGD(model.parameters(), lr=1.0), config=values
    )
    found["clip"] = engine.gradient_clipping()

    latest = Path(folder, "latest")
    found["nothing to load"] = engine.load_checkpoint(folder)
    engine.save_checkpoint(folder, tag="one", save_latest=False)
    found["latest kept"] = latest.exists()
    engine.save_checkpoint(folder, tag="two", client_state={"steps": 7})
    found["latest"] = latest.read_text()
    path, state = engine.load_checkpoint(folder, tag="one")
    found["loaded"] = (Path(path).parent.name, "steps" in state)
    path, state = engine.load_checkpoint(folder)
    found["loaded latest"] = (Path(path).parent.name, state["steps"])
    return found


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run_ranks(alone, 1, str(tmp_path_factory.mktemp("checkpoints")))[0]


def test_parameter_without_dimensions_is_refused(single: dict[str, Any]) -> None:
    assert single["shape ()"] != ""
    assert single["shape (1,)"] == ""


def test_unknown_top_level_key_is_ignored(single: dict[str, Any]) -> None:
    """Why build_engine refuses unknown keys itself."""
    assert single["unknown top"] == ""


def test_unknown_zero_key_is_refused(single: dict[str, Any]) -> None:
    assert "no_such_key" in single["unknown zero"]


def test_removed_block_is_refused_even_when_disabled(single: dict[str, Any]) -> None:
    assert "lasticity" in single["elasticity"]


def test_auto_is_not_understood(single: dict[str, Any]) -> None:
    """Why every "auto" in ds_configs/ is filled by us."""
    assert single["auto batch"] != ""


def test_clipping_is_on_unless_told(single: dict[str, Any]) -> None:
    assert single["clip"] == 1.0


def test_latest_is_written_unless_told_and_tags_load(single: dict[str, Any]) -> None:
    assert single["nothing to load"] == (None, None)
    assert single["latest kept"] is False
    assert single["latest"] == "two"
    assert single["loaded"] == ("one", False)
    assert single["loaded latest"] == ("two", 7)


def save_with_two_tags(folder: str) -> str:
    engine = make_engine(TwoHeads(), 1)
    try:
        engine.save_checkpoint(folder, tag=f"tag{os.environ['RANK']}")
    except AssertionError as error:
        return str(error)
    return ""


def test_ranks_that_disagree_on_the_tag_are_refused(tmp_path: Path) -> None:
    assert all("not consistent" in text for text in run_ranks(save_with_two_tags, 2, str(tmp_path)))


def test_launcher_puts_local_rank_before_the_verb() -> None:
    beside = Path(sys.executable).with_name("deepspeed")
    launcher = str(beside) if beside.is_file() else shutil.which("deepspeed")
    assert launcher is not None
    from train.runtime.ranks import free_port

    done = subprocess.run(
        [launcher, "--num_accelerators", "2", "--master_port", str(free_port())]
        + ["--module", "tests.distributed.argv_echo", "verb", "recipe", "a.b=c"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    lines = [line.partition("ECHO ")[2] for line in done.stdout.splitlines() if "ECHO " in line]
    ranks = sorted((json.loads(line) for line in lines), key=lambda found: found["env"]["RANK"])
    assert [found["argv"] for found in ranks] == [
        [f"--local_rank={rank}", "verb", "recipe", "a.b=c"] for rank in (0, 1)
    ]
    assert all(None not in found["env"].values() for found in ranks)
    assert [found["env"]["LOCAL_RANK"] for found in ranks] == ["0", "1"]
