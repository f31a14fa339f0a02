"""Expected multiply-accumulates against what torch counts while the trimmed passes run."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from models.outputs import EncoderOutput
from models.summary import summarise
from models.trimming import dense_macs, expected_macs
from models.xvlm import XVLM
from tests.unit.models.test_trimming import CLOSE, SHAPES, Batch, image_of, trimmed

UNEVEN = {"vision.ffn": (100, 0, 7, 64), "text.ffn": (31, 300, 5, 64)}


def counted(run: Any) -> tuple[Any, int]:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        result = run()
    return result, counter.get_total_flops() // 2


def passes(model: XVLM, batch: Batch) -> dict[str, tuple[EncoderOutput, int]]:
    """Outputs and counted MACs of each pass of one example."""
    form, index = model.config.form, batch.first
    if form == "nlvr2":
        index = torch.cat([batch.first, batch.second])
    guide = model.encode_text(batch.ids, None).last[:, 0].repeat(len(index), 1)
    guides: Any = {"guide": guide} if model.guided else {}
    images = batch.images[index]
    found = {"image": counted(lambda: model.encode_image(images, **guides))}
    image: EncoderOutput = found["image"][0]
    found["text"] = counted(lambda: model.encode_text(batch.ids, None))
    text: EncoderOutput = found["text"][0]
    states: Any = image.last
    seen: Any = image.mask
    if form == "nlvr2":
        states, seen = states.split(1), (None, None) if seen is None else seen.split(1)
    found["fused"] = counted(lambda: model.fuse(text.last, text.mask, states, seen))
    if form == "vqa":
        fused: EncoderOutput = found["fused"][0]
        answer = batch.answers[:1]
        found["decoder"] = counted(
            lambda: model.decode(answer, None, fused.last, fused.mask).logits
        )
    return found


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("form", ["vqa", "nlvr2", "retrieval"])
def test_expected_macs_are_those_that_run(form, shape):
    # Two images are one batch, in which nothing is sliced off: their pass is left as it is.
    pair: Any = {"vision": (), "guided": False, "heads": ("text", "fusion")}
    for seed in range(3):
        changes = SHAPES[shape] | UNEVEN
        model = trimmed(form, seed, changes=changes, **(pair if form == "nlvr2" else {}))
        model.requires_grad_(False)
        model.set_trimming("gather")
        found = passes(model, Batch(model, seed, rows=1))
        answers = 3 if form == "vqa" else None
        costs = expected_macs(
            model.config,
            image=found["image"][0],
            text=found["text"][0],
            fused=found["fused"][0],
            answer_tokens=answers,
        )
        parts = {part: round(float(rows.sum())) for part, rows in costs.parts.items()}
        wanted = {
            "vision": found["image"][1],
            "text": found["text"][1],
            "fusion": found["fused"][1],
        }
        if answers:
            wanted["decoder"] = found["decoder"][1]
        assert parts == wanted
        assert float(costs.per_example()) == pytest.approx(sum(wanted.values()))


def cost_of(model: XVLM, batch: Batch) -> Any:
    image = image_of(model, batch, batch.first)
    states, seen = image.context(batch.first)
    fused = model.multimodal(batch.ids, batch.mask, states, seen)
    return expected_macs(model.config, image=image, fused=fused, answer_tokens=3)


def test_every_mode_expects_the_same_of_each_row():
    """Whoever shares the blocks in front of the guide: each text counts an image of its own."""
    model = trimmed()
    batch = Batch(model)
    found = []
    for mode in ("mask", "gather", "packed"):
        model.set_trimming(mode)
        with torch.no_grad():
            found.append(cost_of(model, batch))
    for costs in found[1:]:
        for part, rows in costs.parts.items():
            torch.testing.assert_close(rows, found[0].parts[part], rtol=1e-6, atol=0)
    assert 0.2 < float(found[0].share()) < 0.9
    shared, text = model.config, batch.ids[:1]
    with torch.no_grad():
        guide = model.encode_text(text, None).last[:, 0].expand(4, -1)
        one = batch.images[:1]
        many = model.encode_image(one, image_index=torch.zeros(4, dtype=torch.int64), guide=guide)
        alone = model.encode_image(one, guide=guide[:1])
    costs = [float(expected_macs(shared, image=found).total()) for found in (many, alone)]
    assert costs[0] == pytest.approx(costs[1])


def test_a_model_that_keeps_everything_costs_the_whole_and_its_trimmers():
    model = trimmed(bias=1e4, heads=())
    batch = Batch(model)
    batch.mask[:] = True
    with torch.no_grad():
        costs = cost_of(model, batch)
    whole = summarise(model.config, text_tokens=7, answer_tokens=3).macs
    dense = dense_macs(model.config, 7, 3)
    assert dense == {part: whole[part] for part in dense}
    more = sum(float(rows.mean()) for rows in costs.parts.values()) / sum(dense.values())
    assert 1.0 < more < 1.2 and float(costs.share()) == pytest.approx(more)


@pytest.mark.parametrize("part", ["vision", "text", "fusion"])
def test_the_gradient_is_that_of_one_decision_more_or_less(part):
    """The cost as a function of a site's keep weights, against differences of them."""
    model = trimmed("retrieval", heads=()).double()
    batch = Batch(model)
    batch.images = batch.images.double()
    image = model.encode_image(batch.images)
    text = model.encode_text(batch.ids, batch.mask)
    fused = model.fuse(text.last, text.mask, image.last[batch.first], image.mask[batch.first])  # type: ignore[index]
    costs = expected_macs(model.config, image=image, text=text, fused=fused)
    costs.parts[part].sum().backward()
    trimmers = model.vision.trimmers if part == "vision" else model.text.trimmers
    assert trimmers is not None
    biases = [p.fc2.bias.grad for p in trimmers.tokens.values()]
    biases += [p.fc2.bias.grad for p in trimmers.context.values()] if part == "fusion" else []
    used = [float(value) for value in biases if value is not None]
    assert used and all(value > 0 for value in used)  # keeping more costs more


def test_costs_need_trimmers_that_ran():
    model = trimmed()
    model.set_trimming("off")
    batch = Batch(model)
    with pytest.raises(ValueError, match="dense_macs"):
        expected_macs(model.config, image=model.encode_image(batch.images))


def test_costs_of_images_that_texts_share_do_not_add_up_by_example():
    model = trimmed("retrieval")
    batch = Batch(model)
    model.set_trimming("mask")
    image = model.encode_image(batch.images)
    text = model.encode_text(batch.ids, batch.mask)
    costs = expected_macs(model.config, image=image, text=text)
    torch.testing.assert_close(
        costs.total(), costs.parts["vision"].mean() + costs.parts["text"].mean(), **CLOSE
    )
    with pytest.raises(ValueError, match="shared by texts"):
        costs.per_example()
    assert isinstance(costs.share(), Tensor)
