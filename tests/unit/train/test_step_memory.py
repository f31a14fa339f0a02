"""The memory estimate against what a real training step takes, and its arithmetic."""

from __future__ import annotations

import dataclasses
import gc
import json
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from models import presets
from models.config import ModelConfig
from models.outputs import AttentionTrace
from models.summary import summarise
from tests.distributed.spawn import run_ranks
from train.config import RunConfig
from train.losses.attention import planned_on_gpu
from train.losses.distillation import attention_distance
from train.recipes_io import load_run_config
from train.stages import memory
from train.stages.memory import LiveBytes, StepMemory, stage_memory, step_memory

RECIPES = Path(__file__).parents[3] / "train" / "recipes"


def recipe(*overrides: str) -> RunConfig:
    return load_run_config(RECIPES / "efficientvlm-4m.yaml", list(overrides))[0]


def layers(config: ModelConfig, vision: int, text: int, fusion: int) -> ModelConfig:
    """The same widths, other depths."""
    eye, words = config.vision, config.text
    return dataclasses.replace(
        config,
        vision=dataclasses.replace(eye, heads=eye.heads[:vision], ffn=eye.ffn[:vision]),
        text=dataclasses.replace(
            words,
            text_layers=text,
            heads=words.heads[: text + fusion],
            ffn=words.ffn[: text + fusion],
            cross_heads=words.cross_heads[:fusion],
        ),
    )


def _resident(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024
    raise ValueError(f"/proc/self/status has no {key}")


def real_step(overrides: list[str], kinds: list[str], kd: bool) -> dict[str, int]:
    """Growth of the resident set from before the model to the peak of three steps."""
    from models.xvlm import XVLM
    from train.build import build_task
    from train.runtime.distributed import start
    from train.runtime.engine import build_engine, parameter_groups
    from train.runtime.step import EngineModule, keyed_generator, train_step
    from train.runtime.teacher import Teacher
    from train.stages.memory import step_batch
    from train.tasks.base import StepContext

    config, student, teacher = sizes(overrides, kd)
    start()
    torch.set_num_threads(1)
    torch.nn.Linear(64, 64)(torch.randn(8, 64)).sum().backward()  # libraries are loaded
    before = _resident("VmRSS")
    frozen = None
    if teacher is not None:
        frozen = Teacher(XVLM(teacher), torch.float32, torch.device("cpu"), "torch")
    model = XVLM(student)
    model.set_activation_checkpointing(config.engine.activation_checkpointing)
    task = build_task(config, model, None if frozen is None else frozen.model, None)
    module = EngineModule(model, task, frozen)
    engine = build_engine(config, module, parameter_groups(model, set(), config.optim))
    Path("/proc/self/clear_refs").write_text("5")
    for step in range(3):
        batch = step_batch(config, student, kinds[step % len(kinds)] == "region")
        train_step(
            engine,
            iter([batch]),
            lambda micro, step=step: StepContext(step, 0, 1, keyed_generator(0, step, micro)),
        )
    return {"peak": _resident("VmHWM") - before, "held": _resident("VmRSS") - before}


def sizes(overrides: list[str], kd: bool) -> tuple[RunConfig, ModelConfig, ModelConfig | None]:
    config = recipe("engine.precision=fp32", "teacher.dtype=fp32", *overrides)
    student = layers(presets.config("efficientvlm", form="pretrain"), 3, 1, 1)
    teacher = layers(presets.config("xvlm-clip-base", form="pretrain"), 6, 2, 2)
    return config, student, teacher if kd else None


def estimate(overrides: list[str], kd: bool, stage: int) -> dict[str, int]:
    config, student, teacher = sizes(overrides, kd)
    step = step_memory(config, student, teacher, on_gpu=False)
    return stage_memory(config, step, summarise(student).parameters["total"], stage, 1)


@pytest.mark.slow
@pytest.mark.timeout(1000)
@pytest.mark.world_size(1)
@pytest.mark.parametrize(
    ("stage", "kd", "recompute"),
    [(0, True, False), (0, False, False), (0, True, True), (2, True, False), (3, True, False)],
)
def test_a_real_step_takes_what_was_estimated(stage: int, kd: bool, recompute: bool) -> None:
    """Full-size widths and pictures, a quarter of the layers; the bound is the goal of 15 %."""
    overrides = [
        "data.batch=8",
        f"engine.config=zero{stage}",
        f"engine.activation_checkpointing={str(recompute).lower()}",
    ]
    real = run_ranks(real_step, 1, overrides, ["general"], kd, timeout=900)[0]["peak"]
    found = estimate(overrides, kd, stage)["peak"]
    assert found == pytest.approx(real, rel=0.15), f"{found / 2**20:.0f} of {real / 2**20:.0f} MiB"


def small(*overrides: str) -> tuple[RunConfig, ModelConfig, ModelConfig]:
    path = RECIPES / "blocksworld-distill.yaml"
    config = load_run_config(path, ["data.batch=4", "data.max_tokens=8", *overrides])[0]
    names = ("blocksworld-student", "blocksworld-teacher")
    student, teacher = (presets.config(name, form="pretrain") for name in names)
    return config, student, teacher


def test_live_bytes_rise_and_fall() -> None:
    with LiveBytes() as live:
        first = torch.zeros(100)
        assert live.live == 400
        view = first[:50]
        second = first + 1
        assert live.live == 800
        del first
        assert live.live == 800, "a view keeps the storage"
        del view
        assert live.live == 400
        live.restart()
        third = second * 2
        del second, third
        assert live.live == 0
    assert live.peak == 800


def test_recomputing_keeps_less_and_distillation_more() -> None:
    config, student, teacher = small()
    plain = step_memory(config, student, None)
    both = step_memory(config, student, teacher)
    recomputed = step_memory(small("engine.activation_checkpointing=true")[0], student, None)
    assert (plain.kd, plain.teacher) == (0, 0)
    assert both.activations == plain.activations and both.kd > 0
    assert both.teacher == 2 * summarise(teacher).parameters["total"], "auto is fp16 on a GPU"
    assert recomputed.activations < 0.7 * plain.activations
    assert plain.gradients == 4 * summarise(student).parameters["total"]


# Of one attention, 3 rows, 4 heads, 5 queries and 7 keys. Student: 8 a head in fp32, teacher: 16 a head
# in fp16. The student's q and k are there anyway.
STUDENT = 3 * 4 * (5 + 7) * 8 * 4
TEACHER = 3 * 4 * (5 + 7) * 16 * 2
QUERIES = 3 * 4 * 5
MASKS = 2 * 3 * 7
LOSS = 4


@pytest.mark.parametrize(
    ("kernels", "kind", "kept"),
    [
        # The kernel: three numbers a query, and for the backward q and k of both models.
        ("auto", "probabilities", STUDENT + TEACHER + MASKS + 3 * 4 * QUERIES),
        ("cuda", "kl", STUDENT + TEACHER + MASKS + 3 * 4 * QUERIES),
        # Chunks: gradients of the student's q and k in fp32.
        ("reference", "probabilities", STUDENT + STUDENT),
        # Attention's own kernels: both models' q and k in fp32, and two outputs of attention
        # (5 queries, 8 a head) of the student's size.
        ("reference", "kl", STUDENT + 2 * TEACHER + MASKS + 2 * QUERIES * 8 * 4),
    ],
)
def test_what_an_attention_distance_keeps(kernels: str, kind: str, kept: int) -> None:
    def trace(size: int, dtype: torch.dtype, learns: bool) -> AttentionTrace:
        q, k = (torch.zeros(3, 4, n, size, dtype=dtype, requires_grad=learns) for n in (5, 7))
        return AttentionTrace(q, k, 0.5, torch.ones(3, 7, dtype=torch.bool))

    with FakeTensorMode(), planned_on_gpu(kernels), LiveBytes() as live:
        student = trace(8, torch.float32, True)
        teacher = trace(16, torch.float16, False)
        loss = attention_distance(student, teacher, kind)  # type: ignore[arg-type]
        del student, teacher
        gc.collect()
        assert live.live - LOSS == kept
        loss.backward()


def test_a_plan_counts_q_and_k_of_the_teacher(monkeypatch: pytest.MonkeyPatch) -> None:
    """What attention distillation adds at the start of the backward, against the sum by hand."""
    counters: list[LiveBytes] = []
    found: list[int] = []

    class Watched(LiveBytes):
        def __init__(self) -> None:
            super().__init__()
            counters.append(self)

    def backward(loss: torch.Tensor) -> None:
        found.append(counters[-1].live)
        before(loss)

    before = torch.Tensor.backward
    monkeypatch.setattr(memory, "LiveBytes", Watched)
    monkeypatch.setattr(torch.Tensor, "backward", backward)
    for attention in ("probabilities", "none"):
        config, student, teacher = small(f"kd.attention={attention}", "data.batch=64")
        step_memory(config, student, teacher)
    images, texts = 64 * student.vision.tokens, 64 * 8
    # Tokens by layer. Two of vision; one of text, texts plain and masked; one of fusion, each text with
    # its picture and two negatives, and masked. q and k of 128 numbers in fp16; three for each of 4
    # heads.
    tokens = 2 * images + 2 * texts + (3 * texts + texts)
    by_hand = tokens * (2 * 128 * 2 + 3 * 4 * 4)
    _, with_it, _, without = found  # each after a step of the student alone
    assert with_it - without == pytest.approx(by_hand, rel=0.005), "masks come on top"


def test_activations_grow_with_rows_and_shrink_with_precision() -> None:
    config, student, _ = small("data.batch=64")
    one = step_memory(config, student, None).activations
    two = step_memory(small("data.batch=128")[0], student, None).activations
    half = step_memory(small("data.batch=64", "engine.precision=bf16")[0], student, None)
    assert 1.9 < two / one < 2.1
    assert 0.4 < half.activations / one < 0.8


def test_a_region_step_and_a_downstream_step_run_too() -> None:
    config, student, teacher = small()
    assert step_memory(config, student, teacher, region=True).activations > 0
    path = RECIPES / "blocksworld-prune.yaml"
    vqa = load_run_config(path, ["data.batch=4"])[0]
    student = presets.config("blocksworld-student", form="vqa")
    assert step_memory(vqa, student, student).kd > 0


def test_shares_of_the_stages() -> None:
    """Numbers small enough to check by hand: 1000 parameters over 4 ranks, one bucket of 100."""
    config = recipe("engine.precision=fp32")
    step = StepMemory(activations=50_000, kd=7_000, teacher=2_000, gradients=4_000, beside=500)
    whole = stage_memory(config, step, 1000, 0, 4)
    assert whole == {
        "weights": 4_000,
        "gradients": 4_000,
        "optimizer": 8_000,
        "activations": 50_000,
        "teacher": 2_000,
        "KD": 7_000,
        "peak": 4_000 + 8_000 + 2_000 + 57_500,
    }
    buckets = 2 * 4 * 1000  # both buckets are as large as the model
    first, second, third = (stage_memory(config, step, 1000, stage, 4) for stage in (1, 2, 3))
    assert (first["optimizer"], first["gradients"]) == (3_000, 4_000 + buckets)
    assert (second["optimizer"], second["gradients"]) == (3_000, 1_000 + buckets)
    assert second["weights"] == 4_000 and third["weights"] == 1_000 + 4_000
    assert third["peak"] == 5_000 + 3_000 + 2_000 + 57_500 + buckets
    alone = stage_memory(config, step, 1000, 3, 1)
    assert alone["weights"] == 8_000, "DeepSpeed gathers on one rank, too"


def test_the_update_may_be_the_peak() -> None:
    step = StepMemory(activations=10, kd=0, teacher=0, gradients=4_000, beside=0)
    config = recipe("engine.precision=fp32")
    assert stage_memory(config, step, 1000, 0, 1)["peak"] == 4_000 + 8_000 + 4_000


def test_offloaded_states_are_not_on_the_device(tmp_path: Path) -> None:
    plain = Path(__file__).parents[3] / "ds_configs" / "zero2.json"
    values = json.loads(plain.read_text())
    values["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
    path = tmp_path / "offload.json"
    path.write_text(json.dumps(values))
    step = StepMemory(1, 0, 0, 4_000, 0)
    found = stage_memory(recipe("engine.precision=fp32", f"engine.config={path}"), step, 1000, 2, 1)
    assert found["optimizer"] == 0
