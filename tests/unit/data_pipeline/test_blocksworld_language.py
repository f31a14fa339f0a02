"""Everything said about a scene against a naive second reading of the words."""

import re
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.blocksworld import language, questions
from data_pipeline.blocksworld.blind import blind_accuracy
from data_pipeline.blocksworld.render import pixel_box
from data_pipeline.blocksworld.scenes import COLOURS, SHAPES, SIZES, draw_scene

SINGULAR = {"circles": "circle", "squares": "square", "triangles": "triangle", "crosses": "cross"}
AT_LEAST = 16  # units: how clearly one thing must stand beside another
INDICES = st.integers(0, 10**6)


def scene_of(index):
    return draw_scene(9, "train", index)[0]


def fitting(things, words):
    """Things that fit "the small red circle", read word by word."""
    for word in words.split():
        word = SINGULAR.get(word, word)
        if word in (*COLOURS, *SHAPES, *SIZES):
            things = [t for t in things if word in (t.size, t.colour, t.shape)]
        else:
            assert word in ("a", "the", "thing", "things"), word
    return list(things)


def beside(one, relation, other):
    step = {
        "left of": other.x - one.x,
        "right of": one.x - other.x,
        "above": other.y - one.y,
        "below": one.y - other.y,
    }[relation]
    return step >= AT_LEAST


def only(things, words):
    found = fitting(things, words)
    assert len(found) == 1, f"{words!r} must name one thing, names {len(found)}"
    return found[0]


REL = "(left of|right of|above|below)"


def naive_answer(things, question):
    """The answer from the question's words alone and the scene, without the grammar's help."""
    yes_no = {True: "yes", False: "no"}
    if m := re.fullmatch(f"what (colour|shape) is the thing {REL} (the .*)", question):
        anchor = only(things, m[3])
        found = [t for t in things if beside(t, m[2], anchor)]
        assert len(found) == 1
        return getattr(found[0], m[1])
    if m := re.fullmatch("(?:what|which) (colour|shape) (?:is|has) (the .*)", question):
        return getattr(only(things, m[2]), m[1])
    if m := re.fullmatch("how many (.*) (?:are there|do you see)", question):
        return str(len(fitting(things, m[1])))
    if m := re.fullmatch("(?:is there|do you see) (a .*)", question):
        return yes_no[bool(fitting(things, m[1]))]
    if m := re.fullmatch(f"is (the .*) {REL} (the .*)", question):
        one, other = only(things, m[1]), only(things, m[3])
        assert beside(one, m[2], other) or beside(other, m[2], one), "must be clear either way"
        return yes_no[beside(one, m[2], other)]
    if m := re.fullmatch("is (the .*) (larger|smaller) than (the .*)", question):
        one, other = only(things, m[1]), only(things, m[3])
        assert one.size != other.size
        return yes_no[one.size == {"larger": "large", "smaller": "small"}[m[2]]]
    m = re.fullmatch("are there (more|fewer) (.*) than (.*)", question)
    assert m, question
    one, other = len(fitting(things, m[2])), len(fitting(things, m[3]))
    assert one != other
    return yes_no[(one > other) == (m[1] == "more")]


@settings(max_examples=150, deadline=None)
@given(INDICES)
def test_answers_equal_a_naive_recomputation(index):
    scene = scene_of(index)
    asked = questions.questions(scene)
    assert asked == questions.questions(scene)
    assert len(asked) <= 8  # few where balance or doubt leaves little to ask
    assert len({item["question"] for item in asked}) == len(asked)
    for item in asked:
        assert item["answer"] == naive_answer(scene.things, item["question"]), item
        assert item["answer"] in questions.ANSWERS
        assert len(item["question"].split()) <= 14


@pytest.fixture(scope="module")
def tallies():
    """(train, test) tallies of 4000 and 1000 scenes."""
    out = []
    for split, scenes in (("train", 4000), ("test", 1000)):
        tally = Counter()
        for index in range(scenes):
            for item in questions.questions(draw_scene(4, split, index)[0]):
                tally[item["type"], item["question"], item["answer"]] += 1
        out.append(tally)
    return out


def test_every_type_keeps_its_share(tallies):
    train, _ = tallies
    for kind, share in questions.DEFAULT_MIX.items():
        found = sum(n for (k, _, _), n in train.items() if k == kind) / train.total()
        assert found == pytest.approx(share, abs=0.03)
    assert train.total() / 4000 > 6.5


def test_answers_are_balanced_within_each_type(tallies):
    train, _ = tallies
    table = {kind: Counter() for kind in questions.TYPES}
    for (kind, _, answer), n in train.items():
        table[kind][answer] += n
    limits = {"colour": 0.22, "shape": 0.3, "count": 0.3, "existence": 0.54, "comparison": 0.55}
    for kind, limit in limits.items():
        assert max(table[kind].values()) / table[kind].total() < limit, (kind, table[kind])
    yes, no = table["relation"]["yes"], table["relation"]["no"]
    assert abs(yes - no) / (yes + no) < 0.08


def test_the_question_alone_helps_little(tallies):
    blind = blind_accuracy(*tallies)
    assert set(blind) == {"overall", *questions.TYPES}
    assert 0.25 < blind["overall"] < 0.45
    assert max(blind.values()) < 0.65


def test_blind_accuracy_by_hand():
    train = Counter({("colour", "what colour is the circle", "red"): 25})
    train["colour", "what colour is the circle", "blue"] = 5
    train["count", "how many things are there", "2"] = 1
    test = Counter({("colour", "what colour is the circle", "red"): 3})
    test["colour", "what colour is the square", "blue"] = 1  # same template: guesses red, wrong
    test["count", "how many red things are there", "2"] = 1  # by type: right
    assert blind_accuracy(train, test) == {"overall": 0.8, "colour": 0.75, "count": 1.0}


def test_a_mix_may_leave_types_out():
    kinds = {
        item["type"]
        for index in range(30)
        for item in questions.questions(scene_of(index), 8, {"colour": 1.0, "count": 1.0})
    }
    assert kinds == {"colour", "count"}


@settings(max_examples=100, deadline=None)
@given(INDICES)
def test_captions_are_true_and_short_enough(index):
    scene = scene_of(index)
    for caption in (*language.captions(scene), *language.retrieval_captions(scene)):
        assert len(caption.split()) + 2 <= 40
        said = re.findall(r"a (\w+ \w+ \w+)", caption.replace("a picture of ", ""))
        assert said, caption
        for words in said:
            assert fitting(scene.things, words), (words, scene)
        if m := re.fullmatch(f"(a .*) {REL} (a .*)", caption):
            ones, others = fitting(scene.things, m[1]), fitting(scene.things, m[3])
            assert any(beside(a, m[2], b) for a in ones for b in others)
        else:
            assert Counter(said) == Counter(f"{t.size} {t.colour} {t.shape}" for t in scene.things)


def test_retrieval_captions_follow_the_order():
    scene = scene_of(12)
    across, _ = language.retrieval_captions(scene)
    said = re.findall(r"a (\w+) (\w+) (\w+)", across)
    assert said == [tuple(t[:3]) for t in sorted(scene.things, key=lambda t: t.x)]


def test_retrieval_captions_identify_their_picture():
    captions = [language.retrieval_captions(scene_of(index))[0] for index in range(1000)]
    assert len(set(captions)) > 930  # few-thing scenes repeat


@settings(max_examples=100, deadline=None)
@given(INDICES)
def test_regions_carry_the_box_of_what_they_name(index):
    scene = scene_of(index)
    for elem in language.elems(scene, 64):
        x, y, w, h = elem["bb"]
        assert x >= 0 and y >= 0 and w > 0 and h > 0 and x + w <= 64 and y + h <= 64
        if m := re.fullmatch(f"(a .*) {REL} (a .*)", elem["caption"]):
            ones, others = fitting(scene.things, m[1]), fitting(scene.things, m[3])
            pairs = [(a, b) for a in ones for b in others if beside(a, m[2], b)]
            assert elem["bb"] in [union(pixel_box(a, 64), pixel_box(b, 64)) for a, b in pairs]
        else:
            found = fitting(scene.things, f"{elem['attributes']} {elem['caption']}")
            assert elem["bb"] in [pixel_box(thing, 64) for thing in found]


def union(a, b):
    left, top = min(a[0], b[0]), min(a[1], b[1])
    right, bottom = max(a[0] + a[2], b[0] + b[2]), max(a[1] + a[3], b[1] + b[3])
    return [left, top, right - left, bottom - top]


@settings(max_examples=100, deadline=None)
@given(INDICES)
def test_referring_expressions_fit_one_thing(index):
    scene = scene_of(index)
    for said in language.expressions(scene, 48):
        if m := re.fullmatch(f"(the .*) {REL} (the .*)", said["text"]):
            anchor = only(scene.things, m[3])
            near = [t for t in scene.things if t is not anchor and beside(t, m[2], anchor)]
            thing = only(near, m[1])
        else:
            thing = only(scene.things, said["text"])
        assert said["bb"] == pixel_box(thing, 48)


def naive_truth(left, right, sentence):
    if m := re.fullmatch("both pictures show (a .*)", sentence):
        return bool(fitting(left, m[1])) and bool(fitting(right, m[1]))
    if m := re.fullmatch("exactly 1 of the pictures shows (a .*)", sentence):
        return bool(fitting(left, m[1])) != bool(fitting(right, m[1]))
    if m := re.fullmatch(r"there are (\d+) (.*) in total", sentence):
        return len(fitting(left, m[2])) + len(fitting(right, m[2])) == int(m[1])
    if m := re.fullmatch(
        "the (left|right) picture has more (.*) than the (left|right) picture", sentence
    ):
        difference = len(fitting(left, m[2])) - len(fitting(right, m[2]))
        return difference > 0 if m[1] == "left" else difference < 0
    m = re.fullmatch("the left picture shows (a .*) and the right picture shows (a .*)", sentence)
    assert m, sentence
    return bool(fitting(left, m[1])) and bool(fitting(right, m[2]))


@settings(max_examples=100, deadline=None)
@given(INDICES, INDICES)
def test_statements_about_two_pictures_are_labelled_right(one, other):
    left, right = scene_of(one), scene_of(other)
    said = language.statements(left, right)
    for item in said:
        assert item["label"] is naive_truth(left.things, right.things, item["sentence"]), item


def test_statement_labels_are_balanced_in_every_template():
    table = {}
    for index in range(0, 3000, 2):
        for item in language.statements(scene_of(index), scene_of(index + 1)):
            words = item["sentence"]
            start = words.split()[1] if words.startswith("the") else words.split()[0]
            table.setdefault(start, Counter())[item["label"]] += 1
    for start, labels in table.items():
        assert abs(labels[True] / labels.total() - 0.5) < 0.06, (start, labels)
