"""`espalier predict` and Predictor against the model's own methods, called by hand."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data_pipeline.blocksworld.vocabulary import write_tokenizer
from data_pipeline.text import load_tokenizer
from models import from_pretrained, presets
from models.generation import GenerationSettings, generate
from models.initialise import task_form_from_pretrained
from train.evaluation.commands import _SAID
from train.evaluation.predictor import TASKS, Box, Predictor, draw_box, read_picture
from train.main import main

FORMS = ("pretrain", "vqa", "captioning", "retrieval", "nlvr2", "grounding")
ANSWERS = ["red", "blue", "2", "yes", "no"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model folder of each form with its tokenizer, and two pictures."""
    root = tmp_path_factory.mktemp("predict")
    write_tokenizer(root / "tokenizer")
    tokenizer = load_tokenizer(root / "tokenizer")
    torch.manual_seed(0)
    model = presets.create("blocksworld-micro-student", text={"vocab_size": len(tokenizer)})
    with torch.no_grad():
        for parameter in model.parameters():  # fresh weights alone have no opinions
            parameter.add_(0.3 * torch.randn_like(parameter))
    for form in FORMS:
        made = model if form == "pretrain" else task_form_from_pretrained(model, form)
        made.save_pretrained(root / form, tokenizer)
    (root / "vqa" / "answers.json").write_text(json.dumps(ANSWERS))
    rng = np.random.default_rng(0)
    for name, shape in (("a.png", (40, 60, 3)), ("b.png", (48, 48, 3))):
        Image.fromarray(rng.integers(0, 256, shape, np.uint8)).save(root / name)
    return root


def by_hand(root: Path, form: str, text: str, *names: str):
    """Model, ids, mask and the states of each picture."""
    model, tokenizer = from_pretrained(root / form), load_tokenizer(root / form)
    ids = tokenizer([text], return_tensors="pt")["input_ids"]
    pixels = [np.array(Image.open(root / name)) for name in names]
    states = [model.encode_image(square(array)).last for array in pixels]
    return model, ids, torch.ones_like(ids, dtype=torch.bool), states


def square(pixels: np.ndarray) -> torch.Tensor:
    """(1, 3, 48, 48) uint8, as loaders make it."""
    images = torch.from_numpy(pixels).permute(2, 0, 1)[None]
    if images.shape[2:] == (48, 48):
        return images
    return torch.nn.functional.interpolate(images, (48, 48), mode="bicubic", antialias=True)


@torch.no_grad()
def test_answers_are_the_likeliest_of_the_list(root: Path) -> None:
    question = "how many red circles are there"
    model, ids, mask, (states,) = by_hand(root, "vqa", question, "a.png")
    fused = model.multimodal(ids, mask, states).last
    tokenizer, likelihood = load_tokenizer(root / "vqa"), {}
    for answer in ANSWERS:
        row = tokenizer([answer], return_tensors="pt")["input_ids"]
        scores = model.decode(row[:, :-1], None, fused, mask).logits.log_softmax(-1)
        likelihood[answer] = float(scores.gather(2, row[:, 1:, None]).sum())
    predictor = Predictor(root / "vqa")
    assert predictor.answer(root / "a.png", "How many RED circles are there?") == max(
        likelihood, key=likelihood.__getitem__
    )
    least = min(likelihood, key=likelihood.__getitem__)
    others = Predictor(root / "vqa", answers=[least])
    assert others.answer(Image.open(root / "a.png"), question) == least


@torch.no_grad()
def test_captions_go_on_from_the_prompt(root: Path) -> None:
    model, ids, _, (states,) = by_hand(root, "captioning", "a picture of", "a.png")
    tokenizer = load_tokenizer(root / "captioning")
    assert isinstance(tokenizer.sep_token_id, int) and isinstance(tokenizer.pad_token_id, int)
    rules = GenerationSettings(end_id=tokenizer.sep_token_id, pad_id=tokenizer.pad_token_id)
    found = generate(model, ids[:, :-1], states, settings=rules)
    expected = tokenizer.decode(found.ids[0], skip_special_tokens=True)
    assert isinstance(expected, str)
    said = Predictor(root / "captioning").caption(root / "a.png")
    assert said and expected == f"{tokenizer.decode(ids[0, 1:-1])} {said}"
    assert said != Predictor(root / "captioning").caption(root / "a.png", "two blue squares")


@torch.no_grad()
@pytest.mark.parametrize("form", ["pretrain", "retrieval"])
def test_matches_are_similarity_and_matching_head(root: Path, form: str) -> None:
    model, ids, mask, (states,) = by_hand(root, form, "a red circle", "a.png")
    features = model.image_feature(states), model.text_feature(model.encode_text(ids, mask).last)
    probability = model.match_logits(model.multimodal(ids, mask, states).last).softmax(-1)[0, 1]
    found = Predictor(root / form).match(root / "a.png", "A red circle.")
    assert found.similarity == pytest.approx(float(features[0] @ features[1].T), abs=1e-5)
    assert found.probability == pytest.approx(float(probability), abs=1e-5)
    assert -1 <= found.similarity <= 1 and 0 < found.probability < 1


@torch.no_grad()
def test_truth_reads_the_first_picture_first(root: Path) -> None:
    text = "the left picture shows a red circle"
    model, ids, mask, states = by_hand(root, "nlvr2", text, "a.png", "b.png")
    predictor, found = Predictor(root / "nlvr2"), {}
    for order in ((0, 1), (1, 0)):
        pair = [states[i] for i in order]
        expected = model.truth_logits(model.multimodal(ids, mask, pair).last).softmax(-1)[0, 1]
        first, second = (root / ("a.png", "b.png")[i] for i in order)
        found[order] = predictor.truth(first, second, text)
        assert found[order].probability == pytest.approx(float(expected), abs=1e-5)
        assert found[order].true == (float(expected) > 0.5)
    assert found[0, 1] != found[1, 0]


@torch.no_grad()
@pytest.mark.parametrize("shift", [0.0, 3.0])  # 3: a large box in the corner that sticks out
@pytest.mark.parametrize("form", ["pretrain", "grounding"])
def test_boxes_are_pixels_of_the_file_and_inside_it(root: Path, form: str, shift: float) -> None:
    model, ids, mask, (states,) = by_hand(root, form, "the red circle", "a.png")
    predictor = Predictor(root / form)
    for head in (model.bbox_head, predictor.model.bbox_head):
        head.output.bias.add_(shift)
    cx, cy, w, h = model.predict_box(model.multimodal(ids, mask, states).last)[0].tolist()
    box = predictor.locate(root / "a.png", "the red circle")
    left, right = max(0, (cx - w / 2) * 60), min(60, (cx + w / 2) * 60)
    top, bottom = max(0, (cy - h / 2) * 40), min(40, (cy + h / 2) * 40)
    assert box == pytest.approx((left, top, right - left, bottom - top), abs=1e-3)
    assert not shift or ((cx + w / 2) > 1 and box.x + box.width == 60)


def test_a_box_is_drawn_where_it_is(tmp_path: Path) -> None:
    Image.new("RGB", (60, 40), (0, 0, 255)).save(tmp_path / "plain.png")
    draw_box(tmp_path / "plain.png", Box(10, 5, 30, 20), tmp_path / "out" / "box.png")
    drawn = np.array(Image.open(tmp_path / "out" / "box.png"))
    red = (drawn == (255, 0, 0)).all(-1)
    rows, columns = np.nonzero(red)
    assert (columns.min(), rows.min(), columns.max(), rows.max()) == (10, 5, 40, 25)
    assert not red[8:22, 13:37].any() and (drawn[~red] == (0, 0, 255)).all()
    with pytest.raises(ValueError, match=r"box\.jpg: .* PNG"):
        draw_box(tmp_path / "plain.png", Box(1, 1, 2, 2), tmp_path / "box.jpg")


def test_photos_are_turned_as_the_camera_noted(tmp_path: Path) -> None:
    upright = Image.fromarray(np.arange(24, dtype=np.uint8).reshape(2, 4, 3))
    exif = Image.Exif()
    exif[0x0112] = 6  # lies on its right side
    upright.rotate(90, expand=True).save(tmp_path / "lying.png", exif=exif)
    assert np.array_equal(np.array(read_picture(tmp_path / "lying.png")), np.array(upright))


@pytest.mark.parametrize("form", FORMS)
def test_forms_and_tasks_that_do_not_fit(root: Path, form: str) -> None:
    predictor, picture = Predictor(root / form), root / "a.png"
    calls = {
        "vqa": lambda: predictor.answer(picture, "red"),
        "captioning": lambda: predictor.caption(picture),
        "retrieval": lambda: predictor.match(picture, "red"),
        "nlvr2": lambda: predictor.truth(picture, picture, "red"),
        "grounding": lambda: predictor.locate(picture, "red"),
    }
    assert calls.keys() == TASKS.keys() == _SAID.keys()
    for task, call in calls.items():
        if form in TASKS[task]:
            call()
            continue
        with pytest.raises(ValueError, match=f"{form}' does not do {task}; that takes") as error:
            call()
        able = [name for name, forms in TASKS.items() if form in forms]
        assert str(error.value).endswith(f"This one does {', '.join(able)}")


def test_what_cannot_be_read_is_named(root: Path, tmp_path: Path) -> None:
    predictor = Predictor(root / "retrieval")
    with pytest.raises(FileNotFoundError, match=r"nowhere\.png: no such picture"):
        predictor.match(tmp_path / "nowhere.png", "red")
    (tmp_path / "cut.png").write_bytes((root / "a.png").read_bytes()[:200])
    with pytest.raises(ValueError, match=r"cut\.png: cannot be read"):
        predictor.match(tmp_path / "cut.png", "red")
    with pytest.raises(ValueError, match=r"'\?!' has no words"):
        predictor.match(root / "a.png", "?!")
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json"):
        from_pretrained(root / "vqa").save_pretrained(tmp_path / "bare")
        Predictor(tmp_path / "bare")
    from_pretrained(root / "vqa").save_pretrained(tmp_path / "bare", root / "tokenizer")
    with pytest.raises(FileNotFoundError, match="--answers"):
        Predictor(tmp_path / "bare").answer(root / "a.png", "red")


# --- the verb -------------------------------------------------------------------------------------


def say(root: Path, form: str, task: str, *more: str) -> int:
    argv = ["predict", str(root / form), "--task", task, "--image", str(root / "a.png")]
    return main([*argv, "--device", "cpu", *more])


@pytest.mark.parametrize(
    ("form", "task", "keys"),
    [
        ("vqa", "vqa", ["answer"]),
        ("captioning", "captioning", ["caption"]),
        ("retrieval", "retrieval", ["similarity", "probability"]),
        ("nlvr2", "nlvr2", ["true", "probability"]),
        ("grounding", "grounding", ["box"]),
    ],
)
def test_the_verb_says_what_python_says(root, form, task, keys, capsys) -> None:
    more = [] if task == "captioning" else ["--text", "a red circle"]
    more += ["--image", str(root / "b.png")] if task == "nlvr2" else []
    predictor, picture = Predictor(root / form, device="cpu"), root / "a.png"
    expected = {
        "vqa": lambda: [predictor.answer(picture, "a red circle")],
        "captioning": lambda: [predictor.caption(picture)],
        "retrieval": lambda: list(predictor.match(picture, "a red circle")),
        "nlvr2": lambda: list(predictor.truth(picture, root / "b.png", "a red circle")),
        "grounding": lambda: [list(predictor.locate(picture, "a red circle"))],
    }[task]()
    capsys.readouterr()
    assert say(root, form, task, *more, "--json") == 0
    said = json.loads(capsys.readouterr().out)
    assert list(said) == keys and list(said.values()) == expected
    assert say(root, form, task, *more) == 0
    line = capsys.readouterr().out
    assert line.count("\n") == 1 and not line.startswith("{")


def test_the_verb_draws_the_box(root: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "box.png"
    assert say(root, "grounding", "grounding", "--text", "the circle", "--out", str(out)) == 0
    assert Image.open(out).size == (60, 40)
    changed = np.array(Image.open(out)) != np.array(Image.open(root / "a.png"))
    assert changed.any()


@pytest.mark.parametrize(
    ("form", "task", "more", "named"),
    [
        ("vqa", "vqa", (), "--text"),
        ("nlvr2", "nlvr2", ("--text", "red"), "2 picture"),
        ("vqa", "vqa", ("--text", "red", "--image", "b.png"), "1 picture"),
        ("vqa", "vqa", ("--text", "red", "--out", "a.png"), "--task grounding"),
        ("vqa", "retrieval", ("--text", "red"), "does not do retrieval"),
    ],
)
def test_the_verb_refuses(root, form, task, more, named, capsys) -> None:
    assert say(root, form, task, *more) == 2
    assert named in capsys.readouterr().err
