"""Multiply-accumulates of the tasks against what torch counts, for every form and after cutting."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from models import presets
from models.config import ModelConfig
from models.pruning.surgery import pruned_config, widths
from models.xvlm import XVLM
from train.evaluation.workload import WHOLE, Workload, calls_of
from train.pruning.macs import macs_per_unit, workload_macs

FORMS = ("vqa", "nlvr2", "retrieval", "captioning", "grounding")
WORK = Workload(text_tokens=7, answers=6, top_k=4, beams=2, caption_tokens=9)
BATCH = 3


def counted(config: ModelConfig) -> float:
    model = XVLM(config).eval().requires_grad_(False)
    call = calls_of(model, BATCH, WORK, torch.device("cpu"))[WHOLE]
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops() / 2


@pytest.mark.parametrize("form", FORMS)
def test_macs_are_what_torch_counts(form: str) -> None:
    config = presets.config("blocksworld-micro-student", form=form)
    assert counted(config) == BATCH * workload_macs(config, WORK)


@pytest.mark.parametrize("form", FORMS)
def test_unit_costs_are_what_cutting_saves(form: str) -> None:
    config = presets.config("blocksworld-micro-student", form=form)
    costs, units = macs_per_unit(config, WORK), widths(config)
    generator = torch.Generator().manual_seed(len(form))
    gates = {
        name: (torch.rand(count, generator=generator) > 0.4).float()
        for name, count in units.items()
    }
    if form == "nlvr2":  # shared keys go when both readers' heads have gone
        gates["fusion.1.cross_heads"] = gates["fusion.0.cross_heads"]
    saved = sum(costs[name] * float((z == 0).sum()) for name, z in gates.items())
    lost = counted(config) - counted(pruned_config(config, gates))
    assert lost == pytest.approx(BATCH * saved, rel=1e-9) and lost > 0
