"""MACs and parameters from the configuration against what torch counts on the model."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from models import presets
from models.config import ModelConfig
from models.xvlm import XVLM
from tests.unit.train.synthetic import synthetic_batch
from train.evaluation import macs
from train.evaluation.vqa import rank_answers
from train.evaluation.workload import Workload


def counted(config: ModelConfig, text_tokens: int, top_k: int) -> tuple[XVLM, int]:
    model = XVLM(config).eval()
    answers = Workload(answers=9).answer_list(config.text.vocab_size)
    batch = synthetic_batch(1, config.vision.image_size, text_tokens, answers)
    batch = dataclasses.replace(batch, question_ids=batch.question_ids % config.text.vocab_size)
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        rank_answers(model, batch, answers, top_k)
    return model, counter.get_total_flops() // 2


@pytest.mark.parametrize(("text_tokens", "top_k"), [(16, 4), (7, 9)])
def test_macs_are_what_torch_counts(text_tokens: int, top_k: int) -> None:
    config = presets.config("blocksworld-student", form="vqa")
    _, expected = counted(config, text_tokens, top_k)
    assert macs.count_macs(config, text_tokens=text_tokens, top_k=top_k)["total"] == expected


def test_macs_of_uneven_widths_are_what_torch_counts() -> None:
    config = presets.config(
        "blocksworld-student",
        form="vqa",
        **{
            "vision.heads": (3, 1),
            "vision.ffn": (100, 7),
            "text.heads": (2, 4),
            "text.cross_heads": (1,),
            "text.ffn": (31, 300),
            "decoder.heads": (2,),
            "decoder.cross_heads": (3,),
            "decoder.ffn": (50,),
        },
    )
    model, expected = counted(config, 12, 5)
    found = macs.count_macs(config, text_tokens=12, top_k=5)
    assert found["total"] == expected == sum(found[part] for part in macs.PARTS)
    dense = macs.count_macs(
        presets.config("blocksworld-student", form="vqa"), text_tokens=12, top_k=5
    )
    assert all(found[part] < dense[part] for part in macs.PARTS)
    assert macs.parameters(model)["total"] == sum(p.numel() for p in model.parameters())


def test_parameters_are_split_by_part_and_count_what_gates_could_remove() -> None:
    model = presets.create("blocksworld-student", form="vqa")
    found = macs.parameters(model)
    parts = {name: count for name, count in found.items() if name not in ("total", "prunable")}
    assert set(parts) == {"vision", "text", "fusion", "decoder"}
    assert sum(parts.values()) == found["total"]
    width, ffn, heads, size = 128, 512, 4, 32
    head, unit = 4 * width * size + 3 * size, 2 * width + 1
    blocks = 2 + 1 + 2 + 2  # attentions of vision, text, fusion, decoder
    assert found["prunable"] == blocks * heads * head + 5 * ffn * unit


def test_heads_of_pretraining_are_a_part_of_their_own() -> None:
    found = macs.parameters(presets.create("blocksworld-micro-student"))
    assert found["heads"] > 0 and "decoder" not in found
