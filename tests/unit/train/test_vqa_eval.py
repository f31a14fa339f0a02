"""Ranking of answers, scores, the language-only baseline and the evaluation runner."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from models import presets
from models.outputs import EncoderOutput
from models.xvlm import XVLM
from tests.unit.train.synthetic import synthetic_batch
from train.build import build_task
from train.config import EvalConfig, RunConfig
from train.data_config import DataConfig
from train.evaluation import runner, vqa
from train.evaluation.pictures import vqa_pictures
from train.evaluation.vqa import AnswerList, BlindBaseline, rank_answers, vqa_score
from train.trim_config import TrimConfig


class Words:
    """A tokenizer stand-in: one id per word, [CLS] 1, [SEP] 2, padding 0."""

    def __call__(self, texts, padding, return_tensors):
        rows = [[1, *(3 + sum(map(ord, word)) % 60 for word in text.split()), 2] for text in texts]
        length = max(map(len, rows))
        ids = torch.tensor([row + [0] * (length - len(row)) for row in rows])
        mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows])
        return {"input_ids": ids, "attention_mask": mask}


@pytest.fixture(scope="module")
def model() -> XVLM:
    torch.manual_seed(0)
    made = presets.create("blocksworld-micro-student", form="vqa", text={"vocab_size": 80}).eval()
    with torch.no_grad():  # fresh weights answer everything alike; larger ones have opinions
        for name, value in made.named_parameters():
            if value.dim() > 1 and ("cross_attention" in name or "word" in name):
                value.mul_(5)
    return made


@pytest.fixture(scope="module")
def answers() -> AnswerList:
    return AnswerList.of(["red", "dark red", "two", "two small ones", "yes", "no"], Words())


def brute_force(model: XVLM, batch, answers: AnswerList, published: bool) -> list[int]:
    """Every answer of every question alone, unpadded: the definition."""
    best = []
    for row in range(batch.rows):
        image = model.encode_image(batch.images[batch.image_index[row]][None]).last
        ids = batch.question_ids[row : row + 1]
        fused = model.multimodal(ids, batch.question_mask[row : row + 1], image, None).last
        scores = []
        for ids, mask in zip(answers.ids, answers.mask, strict=True):
            ids = ids[mask][None]
            logits = model.decode(
                ids, torch.ones_like(ids).bool(), fused, batch.question_mask[row][None]
            ).logits
            log_p = logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
            scores.append(float(log_p.sum() + (log_p[0] if published else 0.0)))
        best.append(max(range(len(answers)), key=scores.__getitem__))
    return best


@pytest.mark.parametrize("published", [False, True])
@torch.no_grad()
def test_ranking_all_answers_is_the_definition(model, answers, published) -> None:
    batch = synthetic_batch(12, 48, 7, answers, seed=1, vocabulary=80)
    # Questions share pictures, and the last ones are padded.
    mask = batch.question_mask.clone()
    mask[8:, 5:] = False
    batch = dataclasses.replace(
        batch, images=batch.images[:4], image_index=torch.arange(12) % 4, question_mask=mask
    )
    expected = brute_force(model, batch, answers, published)
    assert len(set(expected)) > 1
    assert rank_answers(model, batch, answers, 128, published).tolist() == expected


@torch.no_grad()
def test_top_1_is_the_likeliest_first_token(model, answers) -> None:
    batch = synthetic_batch(5, 48, 7, answers, vocabulary=80)
    image = model.encode_image(batch.images).last
    fused = model.multimodal(batch.question_ids, batch.question_mask, image, None).last
    first = model.decode(answers.ids[:1, :1].expand(5, 1), None, fused, batch.question_mask).logits
    expected = first[:, 0][:, answers.ids[:, 1]].amax(1)
    chosen = rank_answers(model, batch, answers, 1)
    # Compared by score: "two" and "two small ones" begin alike.
    said = first[:, 0].gather(1, answers.ids[chosen, 1][:, None])[:, 0]
    assert said.tolist() == pytest.approx(expected.tolist(), abs=1e-4)


@torch.no_grad()
def test_ranking_in_several_decoder_calls_is_the_same(model, answers, monkeypatch) -> None:
    batch = synthetic_batch(9, 48, 7, answers, vocabulary=80)
    whole = rank_answers(model, batch, answers, 4)
    monkeypatch.setattr(vqa, "_MAX_LOGITS", 4 * 80 * 5 * 2)
    assert torch.equal(rank_answers(model, batch, answers, 4), whole)


def test_the_published_score_counts_the_first_token_twice(answers) -> None:
    """A model that prefers "two small ones" as a whole, and "red" by the first token counted twice."""
    log_p = {"red": (-1.0, -2.0), "two small ones": (-1.6, -0.3, -0.3, -0.3)}
    ids = AnswerList.of(list(log_p), Words())

    class Fixed:
        guided = False

        def encode_image(self, images, capture):
            return EncoderOutput(torch.zeros(images.shape[0], 2, 4))

        def multimodal(self, ids, mask, image_states, image_mask, text=None):
            return EncoderOutput(torch.zeros(*ids.shape, 4), mask=mask)

        def decode(self, given, mask, states, state_mask):
            logits = torch.full((*given.shape, 80), -20.0)
            for answer, values in log_p.items():
                row = Words()([answer], True, "pt")["input_ids"][0]
                for place, value in enumerate(values):
                    fits = (
                        (given[:, : place + 1] == row[: place + 1]).all(1)
                        if place
                        else given[:, 0] == 1
                    )
                    if place < given.shape[1]:
                        logits[fits, place, row[place + 1]] = value
            # One more token takes the rest of the probability, so that the values are
            # log-probabilities.
            rest = torch.log1p(-logits.exp().sum(-1).clamp(max=0.999999))
            logits[..., 79] = rest
            return SimpleNamespace(logits=logits)

    batch = synthetic_batch(1, 8, 3, ids, vocabulary=80)
    assert rank_answers(Fixed(), batch, ids, published=False).item() == 1  # -2.5 against -3.0
    assert rank_answers(Fixed(), batch, ids, published=True).item() == 0  # -4.1 against -4.0


def test_answer_list_loads_from_the_data_folder_or_the_file(tmp_path: Path) -> None:
    split = tmp_path / "vqa" / "test"
    split.mkdir(parents=True)
    (tmp_path / "vqa" / "answers.json").write_text(json.dumps(["red", "two small ones"]))
    for source in (tmp_path, tmp_path / "vqa", split, tmp_path / "vqa" / "answers.json"):
        listed = AnswerList.load(source, Words())
        assert listed.strings == ("red", "two small ones")
        assert listed.mask.sum(1).tolist() == [3, 5]


@pytest.mark.parametrize(
    ("content", "told"), [({"a": 1}, "list of strings"), ([], "empty"), ([""], "''")]
)
def test_bad_answer_list_is_refused_with_its_file(tmp_path: Path, content, told) -> None:
    path = tmp_path / "answers.json"
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=told) as error:
        AnswerList.load(path, Words())
    assert "answers.json" in str(error.value)


def test_missing_answer_list_says_where_it_looked(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"answers\.json"):
        AnswerList.load(tmp_path, Words())


def test_scores() -> None:
    answers = {"Red": 0.2, "dark red": 0.8}
    assert vqa_score("red", answers) == pytest.approx(0.2)
    assert vqa_score("Dark  red.", answers) == pytest.approx(0.8)
    assert vqa_score("blue", answers) == 0.0
    assert vqa_score("red", answers, annotators=10) == pytest.approx(2 / 3)
    assert vqa_score("dark red", answers, annotators=10) == 1.0


def test_blind_baseline_falls_back_from_words_to_template_to_type() -> None:
    blind = BlindBaseline(lambda text: text.replace("red", "COLOUR").replace("blue", "COLOUR"))
    for _ in range(20):
        blind.add("how many red?", "count", {"2": 1.0})
    for _ in range(30):
        blind.add("how many blue?", "count", {"3": 1.0})
    blind.add("how many green?", "count", {"5": 1.0})
    blind.add("what is it?", "shape", {"circle": 0.6, "square": 0.4})
    assert blind.predict("How many RED", "count") == "2"
    assert (
        blind.predict("how many green?", "count") == "5"
    )  # 1 question: its template, not its words
    assert blind.predict("is it big?", "shape") == "circle"
    assert blind.predict("is it big?", "unknown") == "3"
    scores = blind.score([("how many red?", "count", {"2": 1.0}), ("a", "shape", {"square": 1.0})])
    assert scores == {
        "blind_accuracy": 0.5,
        "blind_accuracy/count": 1.0,
        "blind_accuracy/shape": 0.0,
        "questions": 2.0,
    }


def test_blind_baseline_refuses_nothing_to_count() -> None:
    with pytest.raises(ValueError, match="no training question"):
        BlindBaseline().predict("a", "b")
    with pytest.raises(ValueError, match="no questions"):
        BlindBaseline().score([])


def test_evaluate_batch_leaves_padding_out(model, answers) -> None:
    batch = synthetic_batch(4, 48, 5, answers, vocabulary=80)
    batch = dataclasses.replace(
        batch,
        valid=torch.tensor([True, True, True, False]),
        question_types=("a", "a", "b", "c"),
        answers=tuple(dict.fromkeys(answers.strings, 0.5) for _ in range(4)),
    )
    with torch.no_grad():
        sums = vqa.evaluate_batch(model, batch, answers, 4)
    assert {name: (float(s), float(n)) for name, (s, n) in sums.items()} == {
        "accuracy": (1.5, 3.0),
        "accuracy/a": (1.0, 2.0),
        "accuracy/b": (0.5, 1.0),
    }


def test_questions_with_hidden_answers_are_not_counted(model, answers) -> None:
    batch = synthetic_batch(3, 48, 5, answers, vocabulary=80)
    known = dict.fromkeys(answers.strings, 0.5)
    batch = dataclasses.replace(
        batch, question_types=("a", "b", "a"), answers=({}, {}, known), questions=("x", "y", "z")
    )
    with torch.no_grad():
        sums = vqa.evaluate_batch(model, batch, answers, 4)
    assert {name: (float(s), float(n)) for name, (s, n) in sums.items()} == {
        "accuracy": (0.5, 1.0),
        "accuracy/a": (0.5, 1.0),
    }
    shown: list[str] = []

    class Board:
        def pictures(self, step, tag, images, captions):
            shown.extend(captions)

    here = SimpleNamespace(device=torch.device("cpu"))
    vqa_pictures(Board(), 1, model, answers, [batch], here)  # type: ignore[arg-type]
    assert len(shown) == 3
    assert all("the right answer is hidden" in text for text in shown[:2])
    assert "hidden" not in shown[2]


def test_the_blind_baseline_does_not_count_hidden_answers_either() -> None:
    baseline = BlindBaseline()
    baseline.add("a", "k", {"yes": 1.0})
    scores = baseline.score([("a", "k", {"yes": 1.0}), ("a", "k", {})])
    assert scores == {"blind_accuracy": 1.0, "blind_accuracy/k": 1.0, "questions": 1.0}
    with pytest.raises(ValueError, match="hidden"):
        baseline.score([("a", "k", {})])


class Counting:
    """Two batches with different metrics, as a task would give them."""

    def __init__(self, *parts):
        self.parts = list(parts)

    def evaluate(self, model, batch):
        assert not model.training and torch.is_inference_mode_enabled()
        return self.parts.pop(0)


def test_runner_divides_sums_once_and_restores_the_mode() -> None:
    module = torch.nn.Linear(1, 1).train()
    one = {"accuracy": (torch.tensor(3.0), torch.tensor(4.0))}
    two = {"accuracy": (0.0, 1.0), "accuracy/count": (0.0, 1.0)}
    loader = [SimpleNamespace(to=lambda device: None)] * 2
    result = runner.evaluate(module, Counting(one, two), loader)  # type: ignore[arg-type]
    assert result == {"accuracy": 0.6, "accuracy/count": 0.0, "accuracy_count": 5.0}
    assert module.training


def test_runner_adds_up_ranks_that_saw_different_types(monkeypatch) -> None:
    def gather(out, mine):
        out[0], out[1] = mine, {"accuracy": [1.0, 5.0], "accuracy/shape": [1.0, 5.0]}

    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    dist = SimpleNamespace(device=torch.device("cpu"), rank=0, world_size=2)
    task = Counting({"accuracy": (4.0, 5.0), "accuracy/count": (4.0, 5.0)})
    loader = [SimpleNamespace(to=lambda device: None)]
    result = runner.evaluate(torch.nn.Linear(1, 1), task, loader, dist)  # type: ignore[arg-type]
    assert result["accuracy"] == 0.5 and result["accuracy_count"] == 10.0
    assert result["accuracy/count"] == 0.8 and result["accuracy/shape"] == 0.2


@pytest.mark.parametrize("stage", ["finetune", "trim"])
@pytest.mark.parametrize(("annotators", "expected"), [(None, 0.2), (10, 2 / 3)])
def test_validation_of_a_run_scores_by_its_annotators(model, answers, stage, annotators, expected):
    trim = TrimConfig() if stage == "trim" else None
    config = RunConfig(
        stage=stage, task="vqa", out="x", data=DataConfig(train="x"), model="x", trim=trim,
        eval=EvalConfig(annotators=annotators, top_k=4),
    )  # fmt: skip
    # Two of ten annotators gave whatever the model says.
    said = dict.fromkeys(answers.strings, 0.2)
    batch = synthetic_batch(3, 48, 5, answers, vocabulary=80)
    batch = dataclasses.replace(batch, answers=(said,) * 3)
    task = build_task(config, model, None, answers)
    with torch.no_grad():
        total, count = task.evaluate(model, batch)["accuracy"]
    assert float(total / count) == pytest.approx(expected)
