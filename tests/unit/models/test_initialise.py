"""Students cut from teachers, and task forms started from pre-trained models."""

from __future__ import annotations

import math

import pytest
import torch

from models import presets
from models.initialise import (
    add_sincos_positions,
    add_task_vector,
    default_map,
    student_from_teacher,
    task_form,
    task_form_from_pretrained,
)
from models.vision import resize_positions
from models.xvlm import XVLM


@pytest.fixture(scope="module")
def teacher() -> XVLM:
    torch.manual_seed(0)
    model = presets.create("blocksworld-micro-teacher")
    with torch.no_grad():
        for parameter in model.parameters():  # so that equal tensors are equal for a reason
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def same(first: torch.nn.Module, second: torch.nn.Module) -> bool:
    ours, theirs = first.state_dict(), second.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


def test_default_map():
    assert default_map(6, 12, "vision") == (1, 3, 5, 7, 9, 11)
    assert default_map(2, 6, "vision") == (2, 5)
    assert default_map(3, 3, "vision") == (0, 1, 2)
    with pytest.raises(ValueError, match="give fusion_map"):
        default_map(4, 6, "fusion")


def test_a_student_takes_every_second_layer(teacher):
    student, report = student_from_teacher(teacher, presets.config("blocksworld-micro-student"))
    for ours, theirs in ((0, 1), (1, 3)):
        assert same(student.vision.blocks[ours], teacher.vision.blocks[theirs])
        assert same(student.text.layers[ours], teacher.text.layers[theirs])
    for part in ("text.embeddings", "vision.embeddings", "mlm_head", "itm_head", "contrastive"):
        assert same(student.get_submodule(part), teacher.get_submodule(part)), part
    assert report.unmapped == [] and report.resized == []
    assert set(report.mapped) == set(student.state_dict())
    assert report.mapped["text.layers.1.cross_norm.bias"] == "text.layers.3.cross_norm.bias"
    unused = {key.rsplit(".", 2)[0] for key in report.unused}
    assert any(name.startswith("vision.blocks.0") for name in unused)
    assert not any(".blocks.1" in key or ".layers.1" in key for key in report.unused)


def test_explicit_maps(teacher):
    student, _ = student_from_teacher(
        teacher,
        presets.config("blocksworld-micro-student"),
        vision_map=(0, 2),
        text_map=(0,),
        fusion_map=(0,),
    )
    assert same(student.vision.blocks[1], teacher.vision.blocks[2])
    assert same(student.text.layers[0], teacher.text.layers[0])
    assert same(student.text.layers[1], teacher.text.layers[2])


@pytest.mark.parametrize("vision_map", [(0,), (0, 4), (-1, 0)])
def test_maps_that_do_not_fit(teacher, vision_map):
    config = presets.config("blocksworld-micro-student")
    with pytest.raises(ValueError, match="vision_map .* needs 2 entries from 0 to 3"):
        student_from_teacher(teacher, config, vision_map=vision_map)


def test_other_widths_are_refused_by_key(teacher):
    config = presets.config("blocksworld-micro-student", text={"ffn": (64, 128)})
    with pytest.raises(ValueError, match=r"text\.layers\.0\.ffn\.fc1\.weight \(64, 32\) from"):
        student_from_teacher(teacher, config)


def test_positions_follow_the_image_size(teacher):
    config = presets.config("blocksworld-micro-student", vision={"image_size": 64})
    student, report = student_from_teacher(teacher, config)
    assert report.resized == ["vision.embeddings.position"]
    expected = resize_positions(teacher.vision.embeddings.position.detach(), 8)
    assert torch.equal(student.vision.embeddings.position, expected)


def test_the_answer_decoder_starts_from_the_fusion_layers(teacher):
    model = task_form_from_pretrained(teacher)
    assert model.config.form == "vqa" and model.decoder is not None
    for index in range(2):
        assert same(model.decoder.layers[index], teacher.text.layers[2 + index])
    assert same(model.decoder.embeddings, teacher.text.embeddings)
    assert same(model.decoder.head, teacher.mlm_head)
    assert same(model.vision, teacher.vision) and same(model.text, teacher.text)
    assert model.decoder.embeddings.word.weight is not model.text.embeddings.word.weight


def test_a_shallower_decoder_and_larger_images(teacher):
    config = teacher.config.as_form("vqa", decoder_layers=1, image_size=64)
    model = task_form_from_pretrained(teacher, config=config)
    assert model.decoder is not None
    assert same(model.decoder.layers[0], teacher.text.layers[3])
    other = task_form_from_pretrained(teacher, config=config, decoder_map=(0,))
    assert other.decoder is not None and same(other.decoder.layers[0], teacher.text.layers[2])
    assert model.vision.embeddings.position.shape[0] == 65


def test_a_vqa_student_is_cut_from_a_vqa_teacher(teacher):
    vqa = task_form_from_pretrained(teacher)
    config = presets.config("blocksworld-micro-student", form="vqa")
    student, report = student_from_teacher(vqa, config)
    assert student.decoder is not None and vqa.decoder is not None
    assert same(student.decoder.layers[0], vqa.decoder.layers[1])
    assert report.unmapped == []
    pretrained, report = student_from_teacher(teacher, config)
    assert report.unmapped and all(key.startswith("decoder.") for key in report.unmapped)


@pytest.mark.parametrize("form", ["retrieval", "grounding"])
def test_retrieval_and_grounding_keep_the_heads_they_have(teacher, form):
    model, report = task_form(teacher, form)
    assert report.fresh == frozenset() and report.resized == []
    for name, part in model.named_children():
        assert same(part, teacher.get_submodule(name)), name
    assert any(key.startswith("mlm_head.") for key in report.unused)


def test_captions_start_from_the_masked_token_head(teacher):
    model, report = task_form(teacher, "captioning")
    assert report.fresh == frozenset()
    assert same(model.lm_head, teacher.mlm_head) and same(model.text, teacher.text)


@pytest.mark.parametrize(("form", "head"), [("nlvr2", "cls_head"), ("nlvr2_pretrain", "ta_head")])
def test_both_layers_of_a_pair_start_from_one_fusion_layer(teacher, form, head):
    model, report = task_form(teacher, form)
    for pair in range(2):
        first, second = model.text.layers[2 + 2 * pair], model.text.layers[3 + 2 * pair]
        assert same(first, teacher.text.layers[2 + pair])
        ours, theirs = second.state_dict(), first.state_dict()
        missing = {f"cross_attention.{x}.{y}" for x in "kv" for y in ("weight", "bias")}
        assert theirs.keys() - ours.keys() == missing
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    parameters = dict(model.named_parameters())
    assert report.fresh == {name for name in parameters if name.startswith(f"{head}.")}
    assert report.fresh and report.fresh <= parameters.keys()


def test_the_domain_stage_leads_into_nlvr2(teacher):
    stage = task_form_from_pretrained(teacher, "nlvr2_pretrain")
    config = stage.config.as_form("nlvr2", image_size=64)
    model, report = task_form(stage, "nlvr2", config=config)
    assert same(model.text, stage.text) and report.resized == ["vision.embeddings.position"]
    assert {name.split(".")[0] for name in report.fresh} == {"cls_head"}


def test_a_form_after_its_own_domain_stage_grows_its_images(teacher):
    stage = task_form_from_pretrained(teacher, "captioning")
    config = stage.config.as_form("captioning", image_size=64)
    model, report = task_form(stage, "captioning", config=config)
    assert report.fresh == frozenset() and same(model.lm_head, stage.lm_head)
    expected = resize_positions(stage.vision.embeddings.position.detach(), 8)
    assert torch.equal(model.vision.embeddings.position, expected)
    deep = task_form_from_pretrained(teacher, "vqa")
    again = task_form_from_pretrained(deep, "vqa")
    assert same(again, deep)


def test_a_student_for_two_images_takes_the_layer_of_the_same_image(teacher):
    """Pair 0 of the student from pair 1 of the teacher, first from first, second from second."""
    large = task_form_from_pretrained(teacher, "nlvr2")
    with torch.no_grad():
        for parameter in large.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    config = presets.config("blocksworld-micro-student", form="nlvr2")
    small, report = student_from_teacher(large, config)
    assert report.unmapped == []
    for slot in range(2):
        assert same(small.text.layers[1 + slot], large.text.layers[2 + 2 + slot])
    other, _ = student_from_teacher(large, config, fusion_map=(0,))
    assert same(other.text.layers[2], large.text.layers[3])
    with pytest.raises(ValueError, match="fusion_map .* needs 1 entries from 0 to 1"):
        student_from_teacher(large, config, fusion_map=(0, 1))
    with pytest.raises(ValueError, match="cannot start from pairs"):
        student_from_teacher(large, presets.config("blocksworld-micro-student"))


def test_forms_that_cannot_be_started(teacher):
    vqa = task_form_from_pretrained(teacher)
    with pytest.raises(ValueError, match="starts from a model of form 'pretrain', not 'vqa'"):
        task_form_from_pretrained(vqa, "grounding")
    with pytest.raises(ValueError, match="'pretrain' or 'nlvr2_pretrain', not 'vqa'"):
        task_form_from_pretrained(vqa, "nlvr2")
    with pytest.raises(ValueError, match="form 'nlvr3' is unknown"):
        task_form_from_pretrained(teacher, "nlvr3")
    config = presets.config("blocksworld-micro-student", form="retrieval")
    with pytest.raises(ValueError, match="student_from_teacher makes shallower"):
        task_form_from_pretrained(teacher, "retrieval", config=config)


def test_copies_do_not_share_memory(teacher):
    before = teacher.itm_head.linear.weight.clone()
    student, _ = student_from_teacher(teacher, presets.config("blocksworld-micro-student"))
    student.itm_head.linear.weight.data.zero_()
    assert torch.equal(teacher.itm_head.linear.weight, before)


@pytest.mark.parametrize("form", ["vqa", "nlvr2", "captioning", "retrieval", "grounding"])
def test_task_vector_of_an_undistilled_student_is_the_cut_of_the_finetuned_teacher(form):
    """student = cut(pretrained): adding (cut(finetuned) - cut(pretrained)) gives cut(finetuned)."""
    torch.manual_seed(0)
    pretrained = presets.create("blocksworld-micro-teacher", form="pretrain")
    finetuned = presets.create("blocksworld-micro-teacher", form=form)
    student, _ = student_from_teacher(
        pretrained, presets.config("blocksworld-micro-student", form="pretrain")
    )
    moved = add_task_vector(student, pretrained, finetuned)
    expected, _ = student_from_teacher(
        finetuned, presets.config("blocksworld-micro-student", form=form)
    )
    for key, value in expected.state_dict().items():
        torch.testing.assert_close(moved.state_dict()[key], value, msg=key)


def test_task_vector_keeps_what_distillation_changed():
    torch.manual_seed(0)
    pretrained = presets.create("blocksworld-micro-teacher", form="pretrain")
    finetuned = presets.create("blocksworld-micro-teacher", form="vqa")
    config = presets.config("blocksworld-micro-student", form="pretrain")
    student, _ = student_from_teacher(pretrained, config)
    before = add_task_vector(student, pretrained, finetuned).state_dict()
    with torch.no_grad():
        student.state_dict()["vision.blocks.0.ffn.fc1.weight"].add_(1.0)
    after = add_task_vector(student, pretrained, finetuned).state_dict()
    for key in before:
        change = 1.0 if key == "vision.blocks.0.ffn.fc1.weight" else 0.0
        torch.testing.assert_close(after[key], before[key] + change, msg=key)


def test_task_vector_needs_models_before_fine_tuning():
    finetuned = presets.create("blocksworld-micro-teacher", form="vqa")
    student = presets.create("blocksworld-micro-student", form="vqa")
    with pytest.raises(ValueError, match="form pretrain"):
        add_task_vector(student, finetuned, finetuned)


def test_sincos_positions_are_sines_and_cosines_of_row_and_column():
    """Half of the width from the row, half from the column; the class token keeps its position."""
    model = presets.create("blocksworld-micro-teacher", form="grounding")
    vision = model.config.vision
    before = model.vision.embeddings.position.detach().clone()
    add_sincos_positions(model)
    added = model.vision.embeddings.position.detach() - before
    grid, quarter = vision.image_size // vision.patch_size, vision.width // 4
    assert torch.count_nonzero(added[: vision.position_prefix]) == 0
    bands = [10_000 ** (-band / quarter) for band in range(quarter)]
    for row in range(grid):
        for column in range(grid):
            expected = [
                of(place * band)
                for of in (math.sin, math.cos)
                for place in (row, column)
                for band in bands
            ]
            torch.testing.assert_close(
                added[vision.position_prefix + row * grid + column],
                torch.tensor(expected),
                atol=1e-5,
                rtol=0,
            )


def test_sincos_positions_want_a_width_of_four_parts():
    config = presets.config("blocksworld-micro-teacher")
    layers = [2] * config.vision.layers
    vision = {"width": 30, "head_dim": 15, "heads": layers, "ffn": layers}
    config = presets.config("blocksworld-micro-teacher", vision=vision)
    with pytest.raises(ValueError, match=r"initialise.add_positions.*multiple of 4.*has 30"):
        add_sincos_positions(XVLM(config))
