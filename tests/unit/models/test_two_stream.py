"""Two-stream fusion: both streams from each other's previous states, in every form that has it."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from models import from_pretrained, presets
from models.config import HEADS, ModelConfig
from models.initialise import student_from_teacher, task_form
from models.outputs import Capture
from models.pruning.surgery import prune, pruned_config, sparsity_report
from models.summary import decoder_macs, head_macs, summarise, text_macs, vision_macs
from models.xvlm import XVLM

FORMS = ("vqa", "nlvr2", "retrieval", "pretrain", "grounding")


def config(form: str = "vqa", **overrides: Any) -> ModelConfig:
    """Two heads everywhere, so that heads can be told apart."""
    values = {
        "vision": {"heads": (2,) * 4, "head_dim": 16, "image_size": 24},
        "text": {"heads": (2,) * 4, "cross_heads": (2,) * 2, "head_dim": 16},
        "image_fusion": {"heads": (2,) * 2, "cross_heads": (2,) * 2},
    }
    return presets.config("blocksworld-meter-micro", **(values | overrides)).as_form(form)


def shaken(form: str = "vqa", **overrides: Any) -> XVLM:
    """Nothing at its trivial start: biases, norms and types all matter."""
    torch.manual_seed(3)
    model = XVLM(config(form, **overrides))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


class Batch:
    """Three texts, one padded, of three images (NLVR2: six)."""

    def __init__(self, model: XVLM, rows: int = 3) -> None:
        generator = torch.Generator().manual_seed(1)
        size, images = model.config.vision.image_size, 2 if model.config.form == "nlvr2" else 1
        self.ids = torch.randint(1, 200, (rows, 6), generator=generator)
        self.mask = torch.ones(rows, 6, dtype=torch.bool)
        if rows > 1:
            self.mask[1, 4:] = False
        self.images = torch.randn(images * rows, 3, size, size, generator=generator)
        self.answers = torch.randint(1, 200, (rows, 3), generator=generator)


def encoded(model: XVLM, batch: Batch) -> Any:
    states = model.encode_image(batch.images.to(model.text.embeddings.word.weight.dtype)).last
    return states.split(len(batch.ids)) if model.config.form == "nlvr2" else states


# --- a naive one ------------------------------------------------------------------------------------


def linear(state: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]


def norm(state: dict[str, Tensor], name: str, x: Tensor, eps: float) -> Tensor:
    spread = ((x - x.mean()) ** 2).mean()
    return (x - x.mean()) / (spread + eps).sqrt() * state[f"{name}.weight"] + state[f"{name}.bias"]


def attend(state: dict[str, Tensor], name: str, x: Tensor, context: Tensor, size: int) -> Tensor:
    """x (D,) reads context (K, D), head by head and key by key."""
    query = linear(state, f"{name}.q", x)
    mixed = []
    for start in range(0, len(query), size):
        head = slice(start, start + size)
        scores = [
            float(query[head] @ linear(state, f"{name}.k", key)[head]) / math.sqrt(size)
            for key in context
        ]
        weights = [math.exp(score - max(scores)) for score in scores]
        values = [linear(state, f"{name}.v", key)[head] for key in context]
        total = sum(weights)
        mixed.append(sum(w / total * v for w, v in zip(weights, values, strict=True)))
    return linear(state, f"{name}.out", torch.cat(mixed))  # type: ignore[arg-type]


def naive_layer(state: dict[str, Tensor], name: str, x: Tensor, other: Tensor, size: int) -> Tensor:
    """METER's layer on x (N, D), token by token; `other` (K, D) is read. Post-norm, exact gelu."""
    eps, done = 1e-12, []
    for token in x:
        one = attend(state, f"{name}.attention", token, x, size)
        one = norm(state, f"{name}.attention_norm", token + one, eps)
        cross = attend(state, f"{name}.cross_attention", one, other, size)
        one = norm(state, f"{name}.cross_norm", one + cross, eps)
        hidden = linear(state, f"{name}.ffn.fc1", one)
        hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
        out = linear(state, f"{name}.ffn.fc2", hidden)
        done.append(norm(state, f"{name}.ffn_norm", one + out, eps))
    return torch.stack(done)


def naive(model: XVLM, text: Tensor, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Both streams and the pooled pair for one text (L, D) without padding and one image (P, Dv)."""
    state, first = model.state_dict(), model.config.text.text_layers
    size, types = model.config.text.head_dim, model.state_dict()["image_fusion.token_type.weight"]
    x = torch.stack([linear(state, "image_fusion.text_linear", one) for one in text]) + types[0]
    y = torch.stack([linear(state, "image_fusion.image_linear", one) for one in image]) + types[1]
    for layer in range(model.config.text.fusion_layers):
        x, y = (
            naive_layer(state, f"text.layers.{first + layer}", x, y, size),
            naive_layer(state, f"image_fusion.layers.{layer}", y, x, size),
        )
    pooled = [
        linear(state, f"image_fusion.{name}_pooler.linear", states[0]).tanh()
        for name, states in (("text", x), ("image", y))
    ]
    return x, y, torch.stack(pooled)


def test_streams_equal_a_naive_float64_one():
    model = shaken().double()
    batch = Batch(model)
    with torch.no_grad():
        image = encoded(model, batch)
        text = model.encode_text(batch.ids, batch.mask).last
        fused = model.fuse(text, batch.mask, image)
        assert fused.streams is not None
        for row, length in enumerate(batch.mask.sum(1).tolist()):
            x, y, pooled = naive(model, text[row, :length], image[row])
            close: Any = {"atol": 1e-10, "rtol": 1e-10}
            torch.testing.assert_close(fused.words[row, :length], x, **close)
            torch.testing.assert_close(fused.streams[1].last[row], y, **close)
            torch.testing.assert_close(fused.last[row], pooled, **close)


# --- passes -----------------------------------------------------------------------------------------


def test_one_pass_equals_text_then_fusion_and_returns_what_was_asked_for():
    model = shaken()
    batch, first = Batch(model), model.config.text.text_layers
    layers = range(first, first + 2)
    with torch.no_grad():
        image = encoded(model, batch)
        asked = Capture.of(hidden=range(first + 3), attention=range(4), cross_attention=layers)
        whole = model.multimodal(batch.ids, batch.mask, image, None, asked)
        text = model.encode_text(batch.ids, batch.mask, Capture.of(hidden=range(first + 1)))
        parts = model.fuse(
            text.last, batch.mask, image, None, Capture.of(hidden=range(3), attention=(0, 1))
        )
    torch.testing.assert_close(whole.last, parts.last)
    assert whole.streams is not None and parts.streams is not None
    assert set(whole.hidden) == set(range(first + 3)) and set(whole.attention) == set(range(4))
    assert set(whole.streams[1].hidden) == {first, *range(first + 1, first + 3)}
    assert set(whole.streams[1].attention) == set(whole.cross_attention) == set(layers)
    torch.testing.assert_close(whole.hidden[first], text.hidden[first])
    for index in (1, 2):
        for stream in (0, 1):
            torch.testing.assert_close(
                whole.streams[stream].hidden[first + index], parts.streams[stream].hidden[index]
            )
    trace = whole.streams[1].cross_attention[first]
    assert trace.q.shape[2] == image.shape[1] and trace.k.shape[2] == 6
    assert torch.equal(trace.key_mask, batch.mask)  # type: ignore[arg-type]


def test_padding_changes_nothing():
    model = shaken()
    batch = Batch(model)
    with torch.no_grad():
        image = encoded(model, batch)
        padded = model.multimodal(batch.ids, batch.mask, image)
        alone = model.multimodal(batch.ids[1:2, :4], None, image[1:2])
    torch.testing.assert_close(padded.last[1:2], alone.last, atol=1e-5, rtol=1e-5)


def test_texts_that_share_an_image_each_change_their_own_copy():
    model = shaken("retrieval")
    batch = Batch(model)
    with torch.no_grad():
        image = encoded(model, batch)[:1]
        text = model.encode_text(batch.ids, batch.mask).last
        shared = model.fuse(text, batch.mask, image)
        apart = model.fuse(text, batch.mask, image.expand(3, -1, -1))
        assert torch.equal(shared.last, apart.last)
        with pytest.raises(ValueError, match="cannot share 2 images"):
            model.fuse(text, batch.mask, encoded(model, batch)[:2])


def test_two_images_are_two_passes_and_heads_read_all_four_tokens():
    model = shaken("nlvr2")
    batch = Batch(model)
    with torch.no_grad():
        first, second = encoded(model, batch)
        both = model.multimodal(batch.ids, batch.mask, (first, second))
        text = model.encode_text(batch.ids, batch.mask).last
        model.image_fusion.images = 1  # type: ignore[union-attr]
        apart = [model.fuse(text, batch.mask, one).last for one in (first, second)]
        model.image_fusion.images = 2  # type: ignore[union-attr]
        torch.testing.assert_close(both.last, torch.cat(apart, dim=1))
        swapped = model.multimodal(batch.ids, batch.mask, (second, first))
        logits = model.truth_logits(both.last)
    assert both.last.shape == (3, 4, 32) and logits.shape == (3, 2)
    assert not torch.allclose(logits, model.truth_logits(swapped.last))
    with pytest.raises(ValueError, match=r"reads 2 image\(s\)"):
        model.multimodal(batch.ids, batch.mask, first)


def run(model: XVLM, batch: Batch) -> Tensor:
    """What the heads of the form say."""
    fused = model.multimodal(batch.ids, batch.mask, encoded(model, batch))
    form = model.config.form
    if form == "vqa":
        return model.decode(batch.answers, None, fused.last, fused.mask).logits
    if form == "pretrain":
        said = model.mlm_logits(fused.words, batch.ids[:, :2] % 4)
        return torch.cat([said.flatten(), model.match_logits(fused.last).flatten()])
    heads = {"nlvr2": model.truth_logits, "retrieval": model.match_logits}
    return heads.get(form, model.predict_box)(fused.last)


@pytest.mark.parametrize("form", FORMS)
def test_every_form_reaches_every_parameter(form):
    model = shaken(form)
    batch = Batch(model)
    heads = model.touch(HEADS[form])  # dummy inputs fit the heads of two streams too
    (run(model, batch).float().square().sum() + heads).backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []
    fused = [p for n, p in model.named_parameters() if n.startswith("image_fusion.")]
    # Keys' biases have no influence on a softmax; all else has.
    assert sum(bool(p.grad.any()) for p in fused if p.grad is not None) >= len(fused) - 4


@pytest.mark.parametrize("form", ["vqa", "nlvr2"])
def test_compiled_passes_are_one_graph_and_equal(form):
    model = shaken(form)
    batch = Batch(model)
    asked = Capture.of(hidden=range(5), attention=range(4), cross_attention=(2, 3))
    wanted = model.multimodal(batch.ids, batch.mask, encoded(model, batch), None, asked)
    model.compile_encoders(backend="eager", fullgraph=True)
    found = model.multimodal(batch.ids, batch.mask, encoded(model, batch), None, asked)
    torch.testing.assert_close(found.last, wanted.last)
    assert found.streams is not None and found.streams[1].hidden.keys() == {2, 3, 4}


def test_activation_checkpointing_changes_no_gradient():
    gradients = []
    for recompute in (False, True):
        model = shaken()
        model.set_activation_checkpointing(recompute)
        run(model, Batch(model)).square().mean().backward()
        gradients.append([p.grad for p in model.image_fusion.parameters()])  # type: ignore[union-attr]
    torch.testing.assert_close(gradients[0], gradients[1])


# --- files and other models ---------------------------------------------------------------------------


def test_configuration_and_weights_come_back(tmp_path):
    model = shaken("nlvr2")
    model.save_pretrained(tmp_path)
    again = from_pretrained(tmp_path)
    assert again.config == model.config and again.config.image_fusion is not None
    assert torch.equal(run(again, Batch(model)), run(model, Batch(model)))


def test_what_has_no_second_stream_is_refused():
    for form in ("captioning", "nlvr2_pretrain"):
        with pytest.raises(ValueError, match=f"'{form}' does not exist for two-stream"):
            config().as_form(form)
    with pytest.raises(ValueError, match="image_fusion.heads"):
        config(image_fusion={"heads": (2,)})
    one = XVLM(presets.config("blocksworld-micro-teacher"))
    with pytest.raises(ValueError, match="the same kind of fusion"):
        student_from_teacher(one, config("pretrain"))


def test_task_forms_and_students_take_both_streams_along():
    teacher = shaken("pretrain")
    vqa, report = task_form(teacher, "vqa")
    assert not report.fresh
    key = "image_fusion.layers.1.cross_attention.q.weight"
    assert torch.equal(vqa.state_dict()[key], teacher.state_dict()[key])
    nlvr2, report = task_form(teacher, "nlvr2")
    assert all(name.startswith("cls_head.") for name in report.fresh)
    assert "image_fusion.text_pooler.linear.weight" in report.mapped
    shallow = config(
        "pretrain",
        vision={"heads": (2,) * 2, "ffn": (128,) * 2, "head_dim": 16, "image_size": 24},
        text={"text_layers": 1, "heads": (2,) * 2, "cross_heads": (2,), "ffn": (128,) * 2}
        | {"head_dim": 16},
        image_fusion={"heads": (2,), "cross_heads": (2,), "ffn": (128,)},
    )
    student, report = student_from_teacher(teacher, shallow)
    assert not report.fresh
    assert report.mapped["image_fusion.layers.0.ffn.fc1.weight"].startswith("image_fusion.layers.1")
    assert torch.equal(
        student.state_dict()["text.layers.1.ffn.fc1.weight"],
        teacher.state_dict()["text.layers.3.ffn.fc1.weight"],
    )


# --- pruning ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["vqa", "nlvr2"])
def test_pruned_models_compute_what_gates_say(form):
    model = shaken(form)
    slots, generator = model.gate_slots(), torch.Generator().manual_seed(5)
    assert {f"image_fusion.{i}.{kind}" for i in (0, 1) for kind in
            ("self_heads", "cross_heads", "ffn")} <= set(slots)  # fmt: skip
    gates = {}
    for name, slot in slots.items():
        gates[name] = (torch.rand(slot.units, generator=generator) > 0.4).float()
    gates["image_fusion.0.cross_heads"] = torch.zeros(2)
    gates["image_fusion.1.self_heads"] = torch.tensor([0.0, 0.7])
    for name, slot in slots.items():
        slot.z = gates[name]
    with torch.no_grad():
        wanted = run(model, Batch(model))
        slim = prune(model, gates)
        torch.testing.assert_close(run(slim, Batch(model)), wanted, atol=1e-5, rtol=1e-5)
    assert slim.config == pruned_config(model.config, gates)
    assert slim.config.image_fusion.cross_heads[0] == 0  # type: ignore[union-attr]
    report = sparsity_report(model, slim)
    removed = report["parameters"]["before"] - report["parameters"]["after"]
    prunable = report["prunable"]
    assert removed == prunable["total"] - prunable["kept"]
    assert report["modalities"]["image_fusion"]["kept"] > 0


# --- costs --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["vqa", "nlvr2", "grounding"])
@pytest.mark.parametrize("shape", ["plain", "pruned"])
def test_macs_equal_torchs_count(form, shape):
    changes: dict[str, Any] = {}
    if shape == "pruned":
        changes = {"image_fusion": {"heads": (2, 0), "cross_heads": (1, 2), "ffn": (30, 128)}}
        changes["text"] = {"heads": (2, 1, 2, 1), "cross_heads": (0, 2), "head_dim": 16}
    model = shaken(form, **changes).requires_grad_(False)
    batch = Batch(model, rows=1)
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        run(model, batch)
    assert counter.get_total_flops() == 2 * summarise(model, None, 6, answer_tokens=3).macs["total"]


@pytest.mark.parametrize(
    ("pixels", "gmacs", "vision", "text"), [(288, 51.4, 27.3, 2.7), (384, 91.5, 50.9, 2.7)]
)
def test_meters_size_is_the_known_one(pixels, gmacs, vision, text):
    """Counts of METER with 32 text tokens; without the answer decoder, which is ours."""
    shape = presets.config("meter-clip-base").as_form("retrieval", image_size=pixels)
    found = vision_macs(shape), *text_macs(shape, 32, shape.vision.output_tokens)
    assert sum(found) / 1e9 == pytest.approx(gmacs, rel=0.01)
    assert found[0] / 1e9 == pytest.approx(vision, rel=0.01)
    assert found[1] / 1e9 == pytest.approx(text, rel=0.02)
    with torch.device("meta"):
        model = XVLM(shape).requires_grad_(False)
        images, ids = torch.zeros(1, 3, pixels, pixels), torch.ones(1, 32, dtype=torch.int64)
        with FlopCounterMode(display=False) as counter:
            model.multimodal(ids, None, model.encode_image(images).last)
    assert counter.get_total_flops() == 2 * sum(found)
    assert head_macs(shape, 32) < 1e7
    vqa = shape.as_form("vqa")
    assert decoder_macs(vqa, 2, 32) == decoder_macs(vqa, 2, 7)  # it reads two pooled tokens
