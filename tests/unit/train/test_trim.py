"""Training with trimmers: the curriculum, every term of the loss written out, and what calibration
counts.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.batches import Batch
from data_pipeline.task_batches import Nlvr2Batch
from models import presets
from models.trim_config import TrimmingConfig
from models.trimmers import HeadTrimmer, TokenTrimmer
from models.trimming import default_trimming, dense_macs, with_trimming
from models.xvlm import XVLM
from tests.unit.train import test_downstream_tasks as downstream
from tests.unit.train import test_tasks as answering
from train.config import KdConfig
from train.recipes_io import find_recipe, load_run_config
from train.stages.trim import Kept, keep_counts, measure
from train.student import model_config
from train.tasks.base import Losses, StepContext
from train.tasks.trim import TrimTask, costs_of, kept_shares, site_shares
from train.tasks.vqa import VqaTask
from train.trim_config import TrimConfig

TASKS = ("vqa", *downstream.TASKS)
HEADS: tuple[Any, ...] = ("vision", "text", "fusion")
STEPS = 100


def decisive(model: XVLM, seed: int = 0, bias: float = 0.0) -> XVLM:
    """Trimmers that drop about half of everything, for reasons of the states."""
    generator = torch.Generator().manual_seed(seed)
    for part in model.modules():
        if isinstance(part, TokenTrimmer | HeadTrimmer):
            with torch.no_grad():
                part.fc2.weight.normal_(0.0, 2.0, generator=generator)
                part.fc2.bias.fill_(bias)
                if isinstance(part, TokenTrimmer) and part.guided:
                    part.alpha.fill_(0.2)
    return model


def trimmed(task: str, **changes: Any) -> XVLM:
    """The smallest model of a form with fresh trimmers, and two heads everywhere."""
    text: dict[str, Any] = {"heads": (2,) * 4, "cross_heads": (2,) * 2, "head_dim": 16}
    text |= {"vocab_size": downstream.VOCABULARY}
    vision = {"heads": (2,) * 4, "head_dim": 16, "image_size": 24}
    torch.manual_seed(0)
    plain = presets.config("blocksworld-micro-teacher", vision=vision, text=text)
    base = XVLM(plain.as_form(task))
    with torch.no_grad():  # what it sees matters to what it says
        for parameter in base.parameters():
            if parameter.ndim == 2:
                parameter.mul_(2.0)
    values: dict[str, Any] = {"bottleneck": 8, "projection": 4}
    return with_trimming(base, default_trimming(base.config, **(values | changes)))


def batch_of(task: str, model: XVLM) -> Batch:
    if task != "vqa":
        return downstream.batch(task, model.config)
    return answering.vqa_batch(model.config)


def task_of(task: str, model: XVLM, **trim: Any) -> TrimTask:
    kinds: dict[str, Any] = {"vqa": VqaTask, **downstream.TASKS}
    base = kinds[task]({}, KdConfig(), model.config, None)
    return TrimTask(base, TrimConfig(**trim), STEPS)


def context(step: int = 0) -> StepContext:
    return StepContext(step, 0, 1, torch.Generator().manual_seed(1))


def losses_of(task: str, model: XVLM, step: int = 0, **trim: Any) -> Losses:
    return task_of(task, model, **trim).losses(model, None, batch_of(task, model), context(step))


# --- the run file's section -----------------------------------------------------------------------


def test_the_target_falls_from_the_whole_to_the_budget():
    trim = TrimConfig(budget=0.4, warmup=0.1, ramp=0.4)
    found = [trim.target(step, STEPS) for step in (0, 9, 10, 20, 30, 50, 99, 100)]
    assert found == pytest.approx([1.0, 1.0, 1.0, 0.85, 0.7, 0.4, 0.4, 0.4])
    assert trim.target(30, STEPS, 0.8) == pytest.approx(0.9)  # heads have a budget of their own
    at_once = TrimConfig(budget=0.4, warmup=0.0, ramp=0.0)
    assert [at_once.target(step, STEPS) for step in (0, 99)] == [0.4, 0.4]


@settings(deadline=None, max_examples=50)
@given(
    budget=st.floats(0.01, 1.0),
    warmup=st.floats(0.0, 0.5),
    ramp=st.floats(0.0, 0.5),
    steps=st.integers(1, 500),
)
def test_the_target_never_rises_and_ends_at_the_budget(budget, warmup, ramp, steps):
    trim = TrimConfig(budget=budget, warmup=warmup, ramp=ramp)
    path = [trim.target(step, steps) for step in range(steps + 1)]
    assert path == sorted(path, reverse=True) and path[-1] == pytest.approx(budget)
    assert all(target == 1.0 for step, target in enumerate(path) if step < warmup * steps)


def test_fresh_trimmers_start_where_the_run_says():
    overrides = ["model=blocksworld-student", "trim.init_logit=3.5"]
    run, _ = load_run_config(find_recipe("blocksworld-vqa-trim"), overrides)
    trimming = model_config(run, 80).trimming
    assert trimming is not None and trimming.init_logit == 3.5 and trimming.vision == (0, 1)


def test_the_noise_cools_over_the_run_and_ends_before_it():
    trim = TrimConfig(tau=2.0, final_tau=0.5, settle=0.0)
    assert [trim.noise(step, STEPS) for step in (0, 50, 99)] == [2.0, 1.25, pytest.approx(0.515)]
    trim = TrimConfig(settle=0.25)
    assert [trim.noise(step, STEPS) for step in (0, 74, 75, 99)] == [1.0, 1.0, None, None]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"budget": 0.0}, "trim.budget"),
        ({"init_logit": 1.0}, "trim.init_logit"),
        ({"settle": 1.5}, "trim.settle"),
        ({"budget": 1.1}, "trim.budget"),
        ({"warmup": 0.7, "ramp": 0.4}, "together at most 1"),
        ({"warmup": -0.1}, "not negative"),
        ({"distil_weight": -1.0}, "trim.distil_weight"),
        ({"final_tau": 0.0}, "trim.final_tau"),
        ({"multiple": 0}, "trim.multiple"),
        ({"head_budget": 0.5}, "needs trim.heads"),
        ({"head_budget": 0.5, "heads": ("vision",)}, "trim.cost=ratio"),
    ],
)
def test_settings_that_cannot_be(values, message):
    with pytest.raises(ValueError, match=message):
        TrimConfig(**values)


# --- terms ----------------------------------------------------------------------------------------


def test_every_term_is_the_one_written_out():
    model = decisive(trimmed("vqa")).eval()
    losses = losses_of(
        "vqa", model, 30, budget=0.4, full_weight=0.5, distil_weight=2.0, cost_weight=7.0
    )
    assert losses.weights == {
        "answer": 1.0, "full_answer": 0.5, "self_answer": 2.0, "cost": 7.0,
    }  # fmt: skip

    batch: Any = batch_of("vqa", model)
    logits = {}
    with torch.no_grad():
        for mode in ("off", "mask"):
            model.set_trimming(mode)
            guide = model.encode_text(batch.question_ids, batch.question_mask).last[:, 0]
            told = {"guide": guide, "image_index": batch.image_index} if model.guided else {}
            image = model.encode_image(batch.images, **told)
            read = image.context(batch.image_index)
            asked = model.multimodal(batch.question_ids, batch.question_mask, *read)
            rows = batch.answer_row
            answer = model.decode(
                batch.answer_ids, batch.answer_mask, asked.last[rows], batch.question_mask[rows]
            )
            logits[mode] = answer.logits[:, :2].double()
    truth, weight = batch.answer_ids[:, 1:], batch.answer_weight.double()
    for mode, name in (("mask", "answer"), ("off", "full_answer")):
        nll = F.cross_entropy(logits[mode].flatten(0, 1), truth.flatten(), reduction="none")
        expected = (nll.view_as(truth).sum(1) * weight).sum() / batch.rows
        assert losses.terms[name].item() == pytest.approx(expected.item(), rel=1e-5)
    full, ours = (logits[mode].log_softmax(-1) for mode in ("off", "mask"))
    expected = (full.exp() * (full - ours)).sum(-1).mean()
    assert expected > 1e-5
    assert losses.terms["self_answer"].item() == pytest.approx(expected.item(), rel=2e-3)

    share = losses.metrics["macs_share"].item()
    assert losses.metrics["target_share"].item() == pytest.approx(0.7)
    assert losses.terms["cost"].item() == pytest.approx((share - 0.7) ** 2, rel=1e-4)
    assert 0.1 < share < 0.95
    total = sum(losses.weights[name] * term.item() for name, term in losses.terms.items())
    assert losses.total().item() == pytest.approx(total)


def test_a_weight_of_zero_takes_the_term_away():
    model = trimmed("nlvr2").eval()
    names = {"truth", "full_truth", "self_truth", "cost"}
    assert losses_of("nlvr2", model).terms.keys() == names
    only = losses_of("nlvr2", model, full_weight=0.0)
    assert only.terms.keys() == names - {"full_truth"}
    assert losses_of("nlvr2", model, distil_weight=0.0).terms.keys() == names - {"self_truth"}

    passes: list[str] = []
    trimmers = model.vision.trimmers
    assert trimmers is not None
    model.vision.register_forward_hook(lambda *_: passes.append(trimmers.mode))
    losses_of("nlvr2", model, full_weight=0.0, distil_weight=0.0)
    assert passes == ["mask"]  # nobody reads a full pass
    passes.clear()
    losses_of("nlvr2", model)
    assert passes == ["off", "mask"]


def test_the_full_pass_teaches_and_does_not_learn_from_it():
    """With self-distillation alone, the gradient is that of the trimmed pass to a fixed target."""
    model = decisive(trimmed("nlvr2")).eval()
    task = task_of("nlvr2", model, full_weight=0.0, cost_weight=0.0)
    losses = task.losses(model, None, batch_of("nlvr2", model), context())
    model.zero_grad()
    losses.terms["self_truth"].backward()
    found = model.cls_head.state_dict(keep_vars=True)
    model.set_trimming("off")
    batch = batch_of("nlvr2", model)
    with torch.no_grad():
        target = task.base.run(model, batch, "none").output.softmax(-1)
    model.set_trimming("mask")
    ours = task.base.run(model, batch, "none").output.log_softmax(-1)
    loss = F.kl_div(ours, target, reduction="batchmean")
    for name, parameter in found.items():
        (expected,) = torch.autograd.grad(loss, parameter, retain_graph=True)
        torch.testing.assert_close(parameter.grad, expected, atol=1e-6, rtol=1e-4, msg=name)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("trim", [{}, {"cost": "ratio", "heads": HEADS, "head_budget": 0.5}])
def test_every_parameter_gets_a_gradient(task, trim):
    """Also with noise, and with decisions that drop about half."""
    text = {} if task == "captioning" else {"text": (1,)}
    model = decisive(trimmed(task, heads=HEADS, **text)).train()
    torch.manual_seed(3)
    losses = losses_of(task, model, 60, **trim)
    losses.total().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []
    flat = [
        name
        for name, p in model.named_parameters()
        if ".trimmers." in name and p.grad is not None and not p.grad.abs().max() > 0
    ]
    assert flat == []
    assert losses.terms.keys() == losses.weights.keys()
    assert all(math.isfinite(term.item()) for term in losses.terms.values())


@pytest.mark.parametrize("task", TASKS)
def test_a_fresh_model_keeps_everything_and_only_its_trimmers_cost(task):
    model = trimmed(task, heads=HEADS).eval()
    losses = losses_of(task, model)
    for name, term in losses.terms.items():
        if name.startswith("self_"):
            assert term.item() == pytest.approx(0.0, abs=1e-6), name
        if name.startswith("full_"):
            assert term.item() == pytest.approx(losses.terms[name[5:]].item(), rel=1e-5)
    share = losses.metrics["macs_share"].item()
    assert 1.0 < share < 2.0  # trimmers are not free; those of so small a model least of all
    assert losses.terms["cost"].item() == pytest.approx((share - 1) ** 2, rel=1e-3)
    kept = {name: value for name, value in losses.metrics.items() if name.startswith("keep/")}
    assert kept and all(value.item() == 1.0 for value in kept.values()), kept


def test_a_cost_below_its_target_is_no_loss():
    """Else a target of 1 in the warm-up would drive every decision to a certain keep."""
    model = decisive(trimmed("vqa"), bias=-3.0).eval()
    losses = losses_of("vqa", model, 0)
    assert losses.metrics["target_share"].item() == 1.0 > losses.metrics["macs_share"].item()
    assert losses.terms["cost"].item() == 0.0
    losses = losses_of("vqa", model, STEPS, budget=0.01)
    gap = losses.metrics["macs_share"].item() - 0.01
    assert losses.terms["cost"].item() == pytest.approx(gap**2, rel=1e-4)


def test_a_run_that_settles_decides_as_inference_does():
    model = decisive(trimmed("vqa")).train()

    def kept(step: int) -> list[float]:
        losses = losses_of("vqa", model, step, settle=0.5)
        return [value.item() for name, value in losses.metrics.items() if name.startswith("keep/")]

    assert kept(10) != kept(10)  # noise
    settled = kept(STEPS // 2)
    assert settled == kept(STEPS - 1)
    model.eval()
    assert settled == kept(10)


def test_the_cost_as_kept_shares():
    model = decisive(trimmed("grounding", heads=("vision",), text=(1, 2))).eval()
    losses = losses_of(
        "grounding", model, STEPS, cost="ratio", heads=("vision",), budget=0.1, head_budget=0.2
    )
    tokens, heads = (losses.metrics[f"{kind}_share"].item() for kind in ("tokens", "heads"))
    assert 0.15 < tokens < 0.9 and 0.25 < heads < 1
    expected = (tokens - 0.1) ** 2 + (heads - 0.2) ** 2
    assert losses.terms["cost"].item() == pytest.approx(expected, rel=1e-4)

    # The same shares, counted one row at a time where dropped tokens are really gone.
    batch: Any = batch_of("grounding", model)
    patches, counts = model.config.vision.patches, {}
    model.set_trimming("gather")
    for row in range(batch.rows):
        ids, mask = batch.text_ids[row : row + 1], batch.text_mask[row : row + 1]
        words = int(mask.sum()) - 1
        text = model.encode_text(ids, mask)
        image = model.encode_image(
            batch.images[[int(batch.image_index[row])]], guide=text.last[:, 0]
        )
        fused = model.multimodal(ids, mask, image.last, image.mask)
        assert image.trimming is not None and fused.trimming is not None
        for layer in image.trimming.sites:
            counts.setdefault(f"vision.{layer}", []).append(
                (float(image.trimming.tokens[layer]) - 1) / patches
            )
        for layer in fused.trimming.context_sites:
            left = float(fused.trimming.context_tokens[layer]) - 1
            counts.setdefault(f"image.{layer}", []).append(left / patches)
        for layer in fused.trimming.sites:
            left = float(fused.trimming.tokens[layer]) - 1
            counts.setdefault(f"text.{layer}", []).append((left, words))
    expected_shares = {
        name: sum(k for k, _ in found) / sum(n for _, n in found)
        if name.startswith("text")
        else sum(found) / len(found)
        for name, found in counts.items()
    }
    found = {
        name.removeprefix("keep/").replace("fusion.", "text."): value.item()
        for name, value in losses.metrics.items()
        if name.startswith("keep/") and "heads" not in name
    }
    assert found == pytest.approx(expected_shares, rel=1e-5)
    assert tokens == pytest.approx(sum(found.values()) / len(found), rel=1e-5)


def test_validation_is_that_of_the_task_alone():
    model = trimmed("vqa")
    task = task_of("vqa", model)
    assert task.name == "vqa" and task.evaluate == task.base.evaluate
    assert not hasattr(task, "evaluate_split")
    retrieval = task_of("retrieval", trimmed("retrieval"))
    assert retrieval.evaluate_split == retrieval.base.evaluate_split  # type: ignore[attr-defined]


def test_a_pass_without_trimmers_has_no_shares():
    model = trimmed("vqa").eval()
    model.set_trimming("off")
    task = task_of("vqa", model)
    batch = batch_of("vqa", model)
    done = task.base.score(model, batch, context(), task.base.shares(batch, context()))
    with pytest.raises(ValueError, match="nothing to count"):
        kept_shares(done)
    with pytest.raises(ValueError, match="set_trimming"):
        costs_of(model, done)
    assert site_shares(done) == {}


# --- calibration ----------------------------------------------------------------------------------


@pytest.mark.parametrize("task", ["vqa", "retrieval"])
def test_calibration_counts_what_stays(task):
    """Against one row at a time with dropped tokens gone, and the MACs that these passes say."""
    model = decisive(trimmed(task, heads=("vision",))).eval()
    batch: Any = batch_of(task, model)
    wrapped = task_of(task, model)
    model.set_trimming("mask")
    found = measure(model, wrapped.base, [batch, batch])
    assert found.rows == [batch.rows] * 2

    model.set_trimming("gather")
    expected: dict[str, list[float]] = {}
    heads: dict[str, list[float]] = {}
    for row in range(batch.rows if model.guided else len(batch.images)):
        told = {}
        image = row
        if model.guided:
            ids, mask = batch.question_ids[row : row + 1], batch.question_mask[row : row + 1]
            told["guide"] = model.encode_text(ids, mask).last[:, 0]
            image = int(batch.image_index[row])
        seen = model.encode_image(batch.images[image : image + 1], **told).trimming
        assert seen is not None
        for layer in seen.sites:
            expected.setdefault(f"vision.{layer}", []).append(float(seen.tokens[layer]) - 1)
        for layer, chosen in seen.heads.items():
            heads.setdefault(f"vision.{layer}", []).append(float(chosen.detach().mean()))
    vision = {name: v for name, v in found.counts.items() if name.startswith("vision")}
    assert vision == {name: values * 2 for name, values in expected.items()}
    assert set(found.tokens.values()) == {model.config.vision.output_tokens}
    for name, values in heads.items():
        # Blocks in front of the first guided site run once an image.
        assert sum(found.heads[name]) / len(found.heads[name]) == pytest.approx(
            sum(values) / len(values), abs=0.2
        )
    if task == "vqa":
        assert sum(found.shares) / len(found.shares) == pytest.approx(found.macs_share, rel=1e-5)
        whole = sum(dense_macs(model.config, answering.TOKENS, 3).values())
        # Answers belong to questions unevenly; the decoder is small.
        assert 0 < found.macs_share < 1 and whole > 0
    else:
        assert found.shares == []  # images are shared: rows of the parts do not add up


@pytest.mark.parametrize("guided", [True, False])
def test_both_pictures_of_an_example_are_its_own_cost(guided):
    """In batches the pictures of a statement are neighbours; a guided pass has all first ones first."""
    model = decisive(trimmed("nlvr2", guided=guided)).eval()
    task, batch = task_of("nlvr2", model).base, batch_of("nlvr2", model)
    assert isinstance(batch, Nlvr2Batch)
    model.set_trimming("mask")

    def shares(chosen: Any) -> Any:
        return costs_of(model, task.score(model, chosen, context(), {})).per_example()

    with torch.no_grad():
        found = shares(batch)
        for row in range(batch.rows):
            own = batch.images[[int(batch.image_index[row]), int(batch.second_index[row])]]
            one = replace(
                batch,
                images=own,
                image_index=torch.tensor([0]),
                second_index=torch.tensor([1]),
                text_ids=batch.text_ids[[row]],
                text_mask=batch.text_mask[[row]],
                label=batch.label[[row]],
                valid=batch.valid[[row]],
            )
            torch.testing.assert_close(found[row], shares(one)[0], rtol=1e-5, atol=0)
    assert len(set(found.tolist())) == batch.rows


def test_calibration_wants_inputs():
    model = trimmed("vqa")
    with pytest.raises(ValueError, match=r"data\.val"):
        measure(model, task_of("vqa", model).base, [])


@st.composite
def calibrations(draw: Any) -> tuple[TrimmingConfig, Kept, TrimConfig, int]:
    sites = draw(st.lists(st.integers(0, 7), min_size=1, max_size=5, unique=True).map(sorted))
    patches = draw(st.integers(4, 40))
    rows = draw(st.integers(1, 12))
    counts = {
        f"vision.{site}": draw(
            st.lists(st.integers(0, patches).map(float), min_size=rows, max_size=rows)
        )
        for site in sites
    }
    trim = TrimConfig(
        keep=draw(st.sampled_from(["mean", "most"])), multiple=draw(st.sampled_from([1, 3, 8]))
    )
    return TrimmingConfig(vision=tuple(sites)), Kept(counts=counts), trim, patches


@settings(deadline=None, max_examples=100)
@given(calibrations())
def test_counts_are_enough_never_rise_and_are_no_larger_than_needed(case):
    trimming, kept, trim, patches = case
    counts = keep_counts(trimming, kept, trim, 2, patches).vision_keep
    assert counts is not None
    before = patches
    for site, count in zip(trimming.vision, counts, strict=True):
        values = kept.counts[f"vision.{site}"]
        enough = (
            sum(values) / len(values)
            if trim.keep == "mean"
            else min(
                n for n in range(patches + 1) if sum(v <= n for v in values) >= 0.9 * len(values)
            )
        )
        assert 1 <= count <= before
        if count < before:  # not held down by the site before
            assert count >= enough - 1e-9
            assert count == 1 or count % trim.multiple == 0
            assert count - max(1, trim.multiple) < max(enough, 1)
        before = count


def test_counts_of_fusion_and_text_sites():
    trimming = TrimmingConfig(vision=(1,), fusion=(0, 1), text=(1, 2))
    kept = Kept(
        counts={
            "vision.1": [10.0, 20.0],
            "image.2": [9.0, 9.0],
            "image.3": [3.0, 4.0],
            "text.1": [6.0, 7.0],
            "text.2": [0.0, 0.0],
        }
    )
    found = keep_counts(trimming, kept, TrimConfig(multiple=2), 2, 36)
    assert (found.vision_keep, found.fusion_keep, found.text_keep) == ((16,), (10, 4), (8, 1))
    replace(found, mode="bucket")  # all that it needs is there
