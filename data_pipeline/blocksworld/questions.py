"""Questions about one scene, with answers balanced so that the question alone helps little.

For yes/no questions the truth is a fair coin, and a wording is used only where the scene allows
both answers; mirrored wordings ("left of" / "right of") carry both answers equally often.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from data_pipeline.blocksworld.language import (
    INVERSE,
    Look,
    clearly_related,
    count,
    look_of,
    pair_relations,
    shortest_unique,
)
from data_pipeline.blocksworld.scenes import (
    COLOURS,
    MAX_THINGS,
    SHAPES,
    SIZES,
    Draw,
    Scene,
    Thing,
)

__all__ = ["ANSWERS", "DEFAULT_MIX", "QUESTION_TEMPLATES", "TYPES", "normalise", "questions"]

DEFAULT_MIX: Mapping[str, float] = {
    "colour": 0.25,
    "shape": 0.20,
    "count": 0.15,
    "existence": 0.20,
    "relation": 0.10,
    "comparison": 0.10,
}
TYPES = tuple(DEFAULT_MIX)
ANSWERS = (*COLOURS, *SHAPES, *(str(n) for n in range(MAX_THINGS + 1)), "yes", "no")

_COLOUR = ("what colour is the {look}", "which colour has the {look}")
_SHAPE = ("what shape is the {look}", "which shape has the {look}")
_COUNT = ("how many {looks} are there", "how many {looks} do you see")
_EXISTENCE = ("is there a {look}", "do you see a {look}")
_RELATION = ("is the {one} {relation} the {other}",)
_RELATION_OPEN = ("what {attribute} is the thing {relation} the {other}",)
_LARGER = ("is the {one} {comparison} than the {other}",)
_MORE = ("are there {comparison} {ones} than {others}",)
QUESTION_TEMPLATES = (
    *_COLOUR, *_SHAPE, *_COUNT, *_EXISTENCE, *_RELATION, *_RELATION_OPEN, *_LARGER, *_MORE,
)  # fmt: skip

# Small counts are far more frequent in scenes than large ones; this evens out the answers.
_COUNT_ANSWER_WEIGHTS = (0.5, 0.5, 1.0, 2.0, 3.0, 4.0, 5.0)
_OPEN_RELATION = 0.33
_MORE_SHARE = 0.33

# Wordings of one meaning, what fills them, and the answer.
Asked = tuple[Sequence[str], dict[str, str], str] | None
Things = Sequence[Thing]


def _attribute(
    draw: Draw, things: Things, orders: Sequence[str], templates: Sequence[str], field: int
) -> Asked:
    """Ask for one attribute of a thing that the others single out."""
    open_to = []
    for thing in things:
        look = shortest_unique(things, thing, orders)
        if look is not None:
            open_to.append((look, thing[field]))
    if not open_to:
        return None
    look, answer = draw.pick(open_to)
    return templates, {"look": look.words()}, answer


def _colour(draw: Draw, things: Things) -> Asked:
    return _attribute(draw, things, draw.pick((("f", "sf"), ("sf", "f"))), _COLOUR, 1)


def _shape(draw: Draw, things: Things) -> Asked:
    return _attribute(draw, things, draw.pick((("c", "sc"), ("sc", "c"))), _SHAPE, 2)


_COUNTED = (
    *(Look(colour=colour) for colour in COLOURS),
    *(Look(shape=shape) for shape in SHAPES),
    *(Look(size=size) for size in SIZES),
    Look(),
)


def _count(draw: Draw, things: Things) -> Asked:
    by_answer: list[list[Look]] = [[] for _ in range(MAX_THINGS + 1)]
    for look in _COUNTED:
        by_answer[count(things, look)].append(look)
    weights = [
        weight if looks else 0.0
        for weight, looks in zip(_COUNT_ANSWER_WEIGHTS, by_answer, strict=True)
    ]
    answer = draw.weighted(weights)
    look = draw.pick(by_answer[answer])
    return _COUNT, {"looks": look.words(True)}, str(answer)


def _existence(draw: Draw, things: Things) -> Asked:
    """Yes: the attributes of a thing. No: attributes that may be there, but not together."""
    truth = draw.coin()
    if draw.coin(0.25):
        pool = [Look(colour=c) for c in COLOURS] if draw.coin() else [Look(shape=s) for s in SHAPES]
        fitting = [look for look in pool if count(things, look)]
        absent = [look for look in pool if not count(things, look)]
        if not fitting or not absent:
            return None
        look = draw.pick(fitting if truth else absent)
    elif truth:
        look = look_of(draw.pick(things), "cf")
    else:
        colours = sorted({thing.colour for thing in things})
        shapes = sorted({thing.shape for thing in things})
        near = [Look(None, c, s) for c in colours for s in shapes]
        near = [look for look in near if not count(things, look)]
        far = [Look(None, c, s) for c in COLOURS for s in SHAPES]
        far = [look for look in far if not count(things, look)]
        look = draw.pick(near if near and draw.coin() else far)
    return _EXISTENCE, {"look": look.words()}, "yes" if truth else "no"


def _named_pairs(things: Things, orders: Sequence[str]) -> list[tuple[Thing, Look]]:
    named = ((thing, shortest_unique(things, thing, orders)) for thing in things)
    return [(thing, look) for thing, look in named if look is not None]


def _relation(draw: Draw, things: Things) -> Asked:
    if draw.coin(_OPEN_RELATION):
        return _relation_open(draw, things)
    named = _named_pairs(things, ("cf", "scf"))
    if len(named) < 2:
        return None
    (one, one_look), (other, other_look) = draw.shuffled(named)[:2]
    relations = pair_relations(one, other)
    if not relations:
        return None
    relation = draw.pick(relations)
    truth = draw.coin()
    said = relation if truth else INVERSE[relation]
    fields = {"one": one_look.words(), "relation": said, "other": other_look.words()}
    return _RELATION, fields, "yes" if truth else "no"


def _relation_open(draw: Draw, things: Things) -> Asked:
    """Ask about the only thing that stands in a relation to a named one."""
    for anchor, look in draw.shuffled(_named_pairs(things, ("cf", "scf"))):
        for relation in draw.shuffled(tuple(INVERSE)):
            clear = clearly_related(things, relation, anchor)
            if clear is None or len(clear) != 1:
                continue
            attribute = draw.pick(("colour", "shape"))
            fields = {"attribute": attribute, "relation": relation, "other": look.words()}
            return _RELATION_OPEN, fields, getattr(clear[0], attribute)
    return None


def _comparison(draw: Draw, things: Things) -> Asked:
    truth = draw.coin()
    answer = "yes" if truth else "no"
    if draw.coin(_MORE_SHARE):
        looks = [look for look in _COUNTED[:-1] if look.size is None and count(things, look)]
        one, other = draw.shuffled(looks)[:2] if len(looks) > 1 else (Look(), Look())
        difference = count(things, one) - count(things, other)
        if difference == 0:
            return None
        comparison = "more" if (difference > 0) == truth else "fewer"
        fields = {"ones": one.words(True), "others": other.words(True), "comparison": comparison}
        return _MORE, fields, answer
    named = _named_pairs(things, ("cf",))
    pairs = [(a, b) for a in named for b in named if a[0].size != b[0].size]
    if not pairs:
        return None
    (one, one_look), (_, other_look) = draw.pick(pairs)
    comparison = "larger" if (one.size == "large") == truth else "smaller"
    fields = {"one": one_look.words(), "other": other_look.words(), "comparison": comparison}
    return _LARGER, fields, answer


_ASK: dict[str, Callable[[Draw, Things], Asked]] = {
    "colour": _colour,
    "shape": _shape,
    "count": _count,
    "existence": _existence,
    "relation": _relation,
    "comparison": _comparison,
}


def questions(
    scene: Scene, how_many: int = 8, mix: Mapping[str, float] = DEFAULT_MIX
) -> list[dict[str, str]]:
    """Up to `how_many` different questions: {"question", "answer", "type"}.

    The types of one scene are drawn by systematic sampling from `mix`, so that every picture has a
    spread of types. A type that the scene allows no question of is left out.
    """
    draw = Draw("questions", scene.key)
    total = sum(mix.values())
    edges, edge = [], 0.0
    for kind in TYPES:
        edge += mix.get(kind, 0.0) / total
        edges.append((edge, kind))
    offset = draw.unit()
    asked: dict[str, dict[str, str]] = {}
    for slot in range(how_many):
        at = (slot + offset) / how_many
        kind = next((kind for edge, kind in edges if at < edge), edges[-1][1])
        for _ in range(4):
            made = _ASK[kind](draw, scene.things)
            if made is None:
                continue
            wordings, fields, answer = made
            meaning = wordings[0].format(**fields)
            if meaning not in asked:
                question = draw.pick(wordings).format(**fields)
                asked[meaning] = {"question": question, "answer": answer, "type": kind}
                break
    return list(asked.values())


_CLASS = {
    **dict.fromkeys(COLOURS, "COLOUR"),
    **dict.fromkeys(SHAPES, "SHAPE"),
    **dict.fromkeys(("circles", "squares", "triangles", "crosses"), "SHAPES"),
    **dict.fromkeys(SIZES, "SIZE"),
}


def normalise(question: str) -> str:
    """The question's template: attribute words replaced by their class."""
    return " ".join(_CLASS.get(word, word) for word in question.split())
