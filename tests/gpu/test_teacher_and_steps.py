"""On a GPU: the fp16 teacher agrees with fp32, and every stage trains in every precision."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from data_pipeline.blocksworld.build import build_blocksworld
from models import from_pretrained
from train.main import main
from train.runtime.teacher import Teacher, choose_dtype

pytestmark = pytest.mark.gpu
TEACHERS = Path(__file__).parents[2] / "models" / "pretrained"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gpu") / "data"
    build_blocksworld(
        folder, scenes=256, val=32, test=32, image_size=48, seed=11, tasks=("pretrain", "vqa")
    )
    return folder


@pytest.mark.parametrize("backend", ["deepspeed", "torch"])
def test_half_precision_teacher_agrees_with_fp32(backend):
    device = torch.device("cuda", 0)
    path = TEACHERS / "blocksworld-teacher"
    assert choose_dtype("auto", device) == torch.float16
    exact = from_pretrained(path).to(device)
    half = Teacher(from_pretrained(path), torch.float16, device, backend)
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (8, 3, 48, 48), dtype=torch.uint8, generator=generator)
    with torch.no_grad():
        expected = exact.encode_image(images.to(device)).last.float()
    with half.running() as model:
        found = model.encode_image(images.to(device)).last.float()
    cosine = torch.nn.functional.cosine_similarity(expected, found, dim=-1)
    assert cosine.min() > 0.999


def overrides(data: Path, out: Path, task: str, precision: str) -> list[str]:
    return [
        f"out={out}",
        f"data.train={data / task / 'train'}",
        f"data.val={data / task / 'val'}",
        "optim.steps=20",
        "log.every=1",
        "checkpoint.every=0",
        f"engine.precision={precision}",
        "--resume",
        "none",
    ]


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_distillation_learns_in_every_precision(precision, data, tmp_path):
    argv = ["distill", "blocksworld-distill"]
    assert main([*argv, *overrides(data, tmp_path, "pretrain", precision)]) == 0
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    losses = [record["loss"]["total"] for record in records]
    assert sum(losses[-3:]) < sum(losses[:3])


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_pruning_meets_its_budget(precision, data, tmp_path):
    argv = ["prune", "blocksworld-prune", f"model={TEACHERS / 'blocksworld-teacher-vqa'}"]
    more = ["prune.ramp_steps=5", "prune.freeze_step=15"]
    assert main([*argv, *more, *overrides(data, tmp_path, "vqa", precision)]) == 0
    report = json.loads((tmp_path / "sparsity.json").read_text())
    assert report["prunable"]["sparsity"] == pytest.approx(0.35, abs=0.01)
