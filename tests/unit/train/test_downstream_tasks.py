"""NLVR2, retrieval, captioning and grounding as training objectives: losses against naive ones, KD
weights as published, which layer teaches which.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from data_pipeline.batches import Batch
from data_pipeline.task_batches import CaptionBatch, GroundingBatch, Nlvr2Batch, RetrievalBatch
from models import presets
from models.outputs import EncoderOutput
from models.xvlm import XVLM
from train.config import KdConfig
from train.recipes_io import load_run_config
from train.runtime.teacher import Teacher
from train.tasks.base import Losses, StepContext
from train.tasks.captioning import CaptionTask
from train.tasks.grounding import GroundingTask
from train.tasks.nlvr2 import Nlvr2Task
from train.tasks.retrieval import RetrievalTask

VOCABULARY, TOKENS, ROWS = 40, 8, 4
TASKS = {
    "nlvr2": Nlvr2Task,
    "retrieval": RetrievalTask,
    "captioning": CaptionTask,
    "grounding": GroundingTask,
}
RECIPES = Path(__file__).parents[3] / "train" / "recipes"


def model(form: str, role: str = "student", seed: int = 0) -> XVLM:
    torch.manual_seed(seed)
    name = f"blocksworld-micro-{role}"
    return presets.create(name, form=form, text={"vocab_size": VOCABULARY})


def batch(task: str, config: Any, seed: int = 5) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    side, images = config.vision.image_size, 2 * ROWS if task == "nlvr2" else ROWS
    lengths = torch.tensor([TOKENS, 6, 5, 7])
    common: dict[str, Any] = {
        "images": torch.randint(
            0, 256, (images, 3, side, side), dtype=torch.uint8, generator=generator
        ),
        "image_index": torch.arange(ROWS) * (images // ROWS),
        "valid": torch.tensor([True, True, True, False]),
        "keys": ("k",) * ROWS,
        "text_ids": torch.randint(5, VOCABULARY, (ROWS, TOKENS), generator=generator),
        "text_mask": torch.arange(TOKENS)[None] < lengths[:, None],
    }
    names, texts = ("i",) * images, ("t",) * ROWS
    if task == "nlvr2":
        second, label = common["image_index"] + 1, torch.tensor([0, 1, 1, 0])
        return Nlvr2Batch(**common, second_index=second, label=label, sentences=texts)
    if task == "retrieval":
        groups = torch.tensor([7, 8, 7, 9])
        return RetrievalBatch(**common, groups=groups, captions=texts, image_ids=names)
    if task == "captioning":
        return CaptionBatch(
            **common, prompt_tokens=3, references=(("a",),) * images, image_ids=names
        )
    boxes = torch.tensor([[0.5, 0.5, 0.2, 0.4], [0.3, 0.6, 0.2, 0.2]]).repeat(2, 1)
    return GroundingBatch(**common, boxes=boxes, expressions=texts)


def context() -> StepContext:
    return StepContext(0, 0, 1, torch.Generator().manual_seed(1))


def frozen(teacher: XVLM) -> Teacher:
    return Teacher(teacher, torch.float32, torch.device("cpu"), "torch")


def losses_of(
    task: str, student: XVLM, teacher: Teacher | None, kd: KdConfig, **options: Any
) -> Losses:
    theirs = None if teacher is None else teacher.model.config
    made = TASKS[task]({}, kd, student.config, theirs, **options)
    return made.losses(student, teacher, batch(task, student.config), context())


@pytest.mark.parametrize("distil", [False, True])
@pytest.mark.parametrize("task", TASKS)
def test_every_parameter_gets_a_gradient(task, distil):
    student = model(task)
    teacher = frozen(model(task, "teacher", 1)) if distil else None
    losses = losses_of(task, student, teacher, KdConfig(cross_attention=True))
    losses.total().backward()
    assert [n for n, p in student.named_parameters() if p.grad is None] == []
    assert losses.terms.keys() == losses.weights.keys()
    assert any(name.startswith("kd_") for name in losses.terms) == distil


@pytest.mark.parametrize("task", TASKS)
def test_a_student_that_is_its_teacher_has_nothing_to_learn_from_it(task):
    student = model(task).eval()
    losses = losses_of(task, student, frozen(model(task)), KdConfig(cross_attention=True))
    for name, term in losses.terms.items():
        # The boxes' distance is a constant where they agree; GIoU's has rounding of its own.
        if name.startswith("kd_"):
            assert term.item() == pytest.approx(0.0, abs=1e-6), name


# -- the published weights -------------------------------------------------------------------------


def published(task: str) -> dict[str, float]:
    """Section 6 of EfficientVLM written out: weight of every term in the total."""
    attention = ("attention", "cross_attention")
    if task == "retrieval":  # 0.5 (ITC + ITM + KL + 0.33 (text + (0.2 hid + att) + 0.5 fusion))
        found = dict.fromkeys(("itc", "itm", "kd_itm"), 0.5)
        found |= {"kd_text_hidden": 0.5 * 0.33, "kd_text_attention": 0.5 * 0.33}
        found |= {"kd_image_hidden": 0.5 * 0.33 * 0.2, "kd_image_attention": 0.5 * 0.33}
        return found | dict.fromkeys(
            ("kd_fusion_hidden", *(f"kd_fusion_{kind}" for kind in attention)), 0.5 * 0.33 * 0.5
        )
    if task == "nlvr2":  # 0.8 task + 0.2 (KL + text + 0.33 ((att + 0.1 hid) + 0.5 fusion))
        found = {"truth": 0.8, "kd_truth": 0.2, "kd_text_hidden": 0.2, "kd_text_attention": 0.2}
        found |= {"kd_image_hidden": 0.2 * 0.33 * 0.1, "kd_image_attention": 0.2 * 0.33}
        return found | dict.fromkeys(
            ("kd_fusion_hidden", *(f"kd_fusion_{kind}" for kind in attention)), 0.2 * 0.33 * 0.5
        )
    # captioning: 0.7 task + 0.3 (KL + (att + 0.1 hid) + decoder)
    found = {"caption": 0.7, "kd_caption": 0.3}
    found |= {"kd_image_hidden": 0.3 * 0.1, "kd_image_attention": 0.3}
    return found | dict.fromkeys(
        ("kd_decoder_hidden", *(f"kd_decoder_{kind}" for kind in attention)), 0.3
    )


@pytest.mark.parametrize("task", ["nlvr2", "retrieval", "captioning"])
def test_recipes_have_the_published_weights(task):
    name = "retrieval-coco" if task == "retrieval" else task
    config, _ = load_run_config(RECIPES / f"efficientvlm-{name}-prune.yaml", [])
    student, teacher = model(task), frozen(model(task, "teacher", 1))
    losses = losses_of(task, student, teacher, config.kd)
    assert losses.weights == pytest.approx(published(task))


# -- losses ----------------------------------------------------------------------------------------


def test_nlvr2_reads_the_left_image_first():
    student = model("nlvr2").eval()
    data = batch("nlvr2", student.config)
    assert isinstance(data, Nlvr2Batch)
    expected = []
    for row in range(ROWS):
        left, right = (
            student.encode_image(data.images[2 * row + n : 2 * row + n + 1]).last for n in (0, 1)
        )
        ids, mask = data.text_ids[row : row + 1], data.text_mask[row : row + 1]
        logits = student.truth_logits(student.multimodal(ids, mask, (left, right)).last)
        expected.append(F.cross_entropy(logits, data.label[row : row + 1]))
    losses = losses_of("nlvr2", student, None, KdConfig())
    torch.testing.assert_close(losses.terms["truth"], torch.stack(expected).mean())


def test_a_fusion_layer_learns_from_one_that_reads_the_same_image():
    student, teacher = model("nlvr2"), model("nlvr2", "teacher", 1)
    plan = Nlvr2Task({}, KdConfig(), student.config, teacher.config).plan
    assert plan is not None
    text, theirs = student.config.text.text_layers, teacher.config.text.text_layers
    pairs = [(i - text, j - theirs) for i, j in plan.fusion.attention]
    assert pairs == [(0, 2), (1, 3)]  # one pair of layers <- the second of two
    assert all(i % 2 == j % 2 for i, j in pairs)
    assert plan.text.attention == ((0, 1),) and all(i > text for i, _ in plan.fusion.hidden)


def test_captions_of_the_same_image_are_no_negatives(monkeypatch):
    student = model("retrieval").eval()
    data = batch("retrieval", student.config)
    assert isinstance(data, RetrievalBatch)
    losses = losses_of("retrieval", student, None, KdConfig())
    image = student.image_feature(student.encode_image(data.images).last)
    text = student.text_feature(student.encode_text(data.text_ids, data.text_mask).last)
    scores = image @ text.T / student.temperature()
    target = (data.groups[:, None] == data.groups[None]).float()
    target = target / target.sum(1, keepdim=True)
    expected = (F.cross_entropy(scores, target) + F.cross_entropy(scores.T, target)) / 2
    torch.testing.assert_close(losses.terms["itc"], expected)

    seen: list[torch.Tensor] = []
    fuse = student.fuse

    def spy(text_states, text_mask, image_states, *rest):
        seen.extend((text_states[:, 0], image_states[:, 0]))
        return fuse(text_states, text_mask, image_states, *rest)

    monkeypatch.setattr(student, "fuse", spy)
    for step in range(8):
        seen.clear()
        task = RetrievalTask({}, KdConfig(), student.config, None)
        task.losses(
            student, None, data, StepContext(step, 0, 1, torch.Generator().manual_seed(step))
        )
        texts, images = seen
        for row, group in enumerate(data.groups.tolist()):
            # Row ROWS + row has the own text and another image; 2 ROWS + row the other way round.
            other = [r for r in range(ROWS) if torch.equal(images[ROWS + row], images[r])]
            assert len(other) == 1 and data.groups[other[0]] != group
            other = [r for r in range(ROWS) if torch.equal(texts[2 * ROWS + row], texts[r])]
            assert len(other) == 1 and data.groups[other[0]] != group


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_caption_loss_is_the_mean_over_what_is_written(smoothing):
    student = model("captioning").eval()
    data = batch("captioning", student.config)
    assert isinstance(data, CaptionBatch)
    losses = losses_of("captioning", student, None, KdConfig(), smoothing=smoothing)
    states = student.encode_image(data.images).last
    log_p = student.decode(data.text_ids, data.text_mask, states, None).logits.log_softmax(-1)
    parts = []
    for row in range(ROWS):
        for place in range(3, int(data.text_mask[row].sum())):  # three tokens are the prompt
            wanted = torch.full((VOCABULARY,), smoothing / VOCABULARY)
            wanted[data.text_ids[row, place]] = 1 - smoothing  # the published definition
            parts.append(-(wanted * log_p[row, place - 1]).sum())
    assert len(parts) == 5 + 3 + 2 + 4
    torch.testing.assert_close(losses.terms["caption"], torch.stack(parts).mean())


def test_the_caption_decoder_drops_its_last_state():
    student, teacher = model("captioning"), frozen(model("captioning", "teacher", 1))
    kd = KdConfig(cross_attention=True)
    losses = losses_of("captioning", student, teacher, kd)
    losses.terms["kd_decoder_hidden"].backward()
    grads = {name: p.grad for name, p in student.named_parameters() if ".ffn." in name}
    layers = len(student.text.layers)
    last = [grad for name, grad in grads.items() if f"text.layers.{layers - 1}." in name]
    first = [grad for name, grad in grads.items() if "text.layers.0." in name]
    assert last and all(grad is None or not grad.any() for grad in last)
    assert any(grad is not None and bool(grad.any()) for grad in first)


def test_box_losses_and_metrics_of_grounding():
    student = model("grounding").eval()
    data = batch("grounding", student.config)
    assert isinstance(data, GroundingBatch)
    losses = losses_of("grounding", student, None, KdConfig())
    fused = student.multimodal(
        data.text_ids, data.text_mask, student.encode_image(data.images).last, None
    )
    boxes = student.predict_box(fused.last)
    expected = (boxes - data.boxes).abs().sum(1).mean()
    torch.testing.assert_close(losses.terms["box_l1"], expected)
    assert 0 < losses.terms["box_giou"] < 2


def test_accuracy_counts_valid_rows_and_an_iou_of_one_half():
    task = GroundingTask({}, KdConfig(), model("grounding").config, None)
    target = torch.tensor([[0.5, 0.5, 0.4, 0.4]]).repeat(4, 1)
    said = target.clone()
    said[0, 2] = 0.2  # half of the box: IoU 1/2
    said[1, 2] = 0.19  # a little less
    said[3] = 0.1  # filled up

    class Says:
        guided = False

        def encode_image(self, *_: Any) -> EncoderOutput:
            return EncoderOutput(torch.zeros(4, 1))

        multimodal = encode_image

        def predict_box(self, _: Any) -> torch.Tensor:
            return said

    found = batch("grounding", model("grounding").config)
    object.__setattr__(found, "boxes", target)
    sums: Any = task.evaluate(Says(), found)  # pyright: ignore[reportArgumentType]
    assert [int(value) for value in sums["accuracy"]] == [2, 3]
    assert float(sums["iou"][0]) == pytest.approx(0.5 + 0.475 + 1.0)


def test_nlvr2_accuracy_counts_valid_rows():
    student = model("nlvr2").eval()
    data = batch("nlvr2", student.config)
    task = Nlvr2Task({}, KdConfig(), student.config, None)
    right, count = task.evaluate(student, data)["accuracy"]  # pyright: ignore[reportArgumentType]
    output = task.run(student, data, "none").output  # pyright: ignore[reportArgumentType]
    expected = sum(int(output[r].argmax() == [0, 1, 1, 0][r]) for r in range(3))
    assert (int(right), int(count)) == (expected, 3)


def test_tasks_without_what_they_need_say_so():
    student = model("captioning")
    task = CaptionTask({}, KdConfig(), student.config, None)
    with pytest.raises(ValueError, match="needs the tokenizer"):
        task.evaluate_split(student, lambda: iter(()))
    with pytest.raises(ValueError, match="the same number of images"):
        Nlvr2Task({}, KdConfig(), model("nlvr2").config, model("grounding", "teacher").config)
