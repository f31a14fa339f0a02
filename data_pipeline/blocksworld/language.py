"""What is said about a scene: captions, region descriptions, statements and referring expressions.

All words are lower case, without punctuation; numbers are digits. Every phrase is built from the
word lists and templates of this file and of `questions.py`; `vocabulary.py` collects its words
from there.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from data_pipeline.blocksworld.render import pixel_box
from data_pipeline.blocksworld.scenes import COLOURS, SHAPES, SIZES, Draw, Scene, Thing

__all__ = [
    "CAPTION_TEMPLATES",
    "MARGIN",
    "PLURAL",
    "RELATIONS",
    "STATEMENT_TEMPLATES",
    "Look",
    "captions",
    "count",
    "elems",
    "expressions",
    "holds",
    "look_of",
    "retrieval_captions",
    "shortest_unique",
    "statements",
]

MARGIN = 16  # units between centres from which one thing counts as left of / above another
PLURAL = {
    "circle": "circles",
    "square": "squares",
    "triangle": "triangles",
    "cross": "crosses",
    "thing": "things",
}
RELATIONS = ("left of", "right of", "above", "below")
INVERSE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}


class Look(NamedTuple):
    """A description by attributes; None leaves one open."""

    size: str | None = None
    colour: str | None = None
    shape: str | None = None

    def fits(self, thing: Thing) -> bool:
        """Whether the thing has every named attribute."""
        return (
            (self.size is None or self.size == thing.size)
            and (self.colour is None or self.colour == thing.colour)
            and (self.shape is None or self.shape == thing.shape)
        )

    def words(self, plural: bool = False) -> str:
        """ "small red circle", with "thing" where the shape is open."""
        noun = self.shape or "thing"
        noun = PLURAL[noun] if plural else noun
        return " ".join(part for part in (self.size, self.colour, noun) if part)


def look_of(thing: Thing, parts: str = "scf") -> Look:
    """The thing's attributes named in `parts`: s(ize), c(olour), f(orm)."""
    return Look(
        thing.size if "s" in parts else None,
        thing.colour if "c" in parts else None,
        thing.shape if "f" in parts else None,
    )


def count(things: Iterable[Thing], look: Look) -> int:
    """How many things fit."""
    return sum(map(look.fits, things))


def shortest_unique(things: Sequence[Thing], thing: Thing, orders: Sequence[str]) -> Look | None:
    """The first of the attribute sets `orders` that fits this thing only; None if none does."""
    for parts in orders:
        look = look_of(thing, parts)
        if count(things, look) == 1:
            return look
    return None


def holds(relation: str, one: Thing, other: Thing) -> bool:
    """Whether `one` stands clearly in the relation to `other`."""
    if relation == "left of":
        return other.x - one.x >= MARGIN
    if relation == "right of":
        return one.x - other.x >= MARGIN
    if relation == "above":
        return other.y - one.y >= MARGIN
    if relation == "below":
        return one.y - other.y >= MARGIN
    raise ValueError(f"unknown relation {relation!r}")


def pair_relations(one: Thing, other: Thing) -> list[str]:
    """The relations in which `one` clearly stands to `other`."""
    return [relation for relation in RELATIONS if holds(relation, one, other)]


CAPTION_TEMPLATES = (
    "a picture of {list}",
    "there is {list}",
    "{list}",
    "there are {n} things in the picture",
    "{n} things {list}",
    "{one} {relation} {other}",
    "from left to right {list}",
    "from top to bottom {list}",
)


def _listed(things: Sequence[Thing], parts: str = "scf") -> str:
    return " and ".join("a " + look_of(thing, parts).words() for thing in things)


def _relation_caption(draw: Draw, things: Sequence[Thing]) -> str | None:
    """ "a small red circle left of a large blue square" about two random things."""
    one, other = draw.shuffled(things)[:2]
    relations = pair_relations(one, other)
    if not relations:
        return None
    return f"{_listed([one])} {draw.pick(relations)} {_listed([other])}"


def captions(scene: Scene, how_many: int = 4) -> list[str]:
    """Several wordings about the whole picture; the first ones name every thing."""
    draw = Draw("captions", scene.key)
    things = scene.things
    listed = _listed(draw.shuffled(things))
    n = len(things)
    counted = f"{n} things {listed}" if n > 1 else f"there is {listed}"
    out = [draw.pick((f"a picture of {listed}", listed, counted))]
    out.append(_listed(draw.shuffled(things)))
    out.append(draw.pick(retrieval_captions(scene)))
    if n > 1:
        related = _relation_caption(draw, things)
        if related:
            out.append(related)
    unique = list(dict.fromkeys(out))
    return unique[:how_many]


def retrieval_captions(scene: Scene) -> list[str]:
    """Captions naming all attributes of all things and their order: they identify the picture."""
    across = sorted(scene.things, key=lambda thing: (thing.x, thing.y))
    down = sorted(scene.things, key=lambda thing: (thing.y, thing.x))
    if len(across) == 1:
        return [f"a picture of {_listed(across)}"]
    return [f"from left to right {_listed(across)}", f"from top to bottom {_listed(down)}"]


def _union(one: Sequence[int], other: Sequence[int]) -> list[int]:
    left, top = min(one[0], other[0]), min(one[1], other[1])
    right = max(one[0] + one[2], other[0] + other[2])
    bottom = max(one[1] + one[3], other[1] + other[3])
    return [left, top, right - left, bottom - top]


def elems(scene: Scene, image: int) -> list[dict]:
    """Region descriptions: every thing (caption, attributes) and a pair with its common box."""
    draw = Draw("elems", scene.key)
    out: list[dict] = []
    for thing in scene.things:
        caption = look_of(thing, "cf").words()
        out.append({"caption": caption, "bb": pixel_box(thing, image), "attributes": thing.size})
    if len(scene.things) > 1:
        one, other = draw.shuffled(scene.things)[:2]
        relations = pair_relations(one, other)
        if relations:
            words = f"{_listed([one], 'cf')} {draw.pick(relations)} {_listed([other], 'cf')}"
            box = _union(pixel_box(one, image), pixel_box(other, image))
            out.append({"caption": words, "bb": box})
    return out


def expressions(scene: Scene, image: int) -> list[dict]:
    """Referring expressions that fit exactly one thing, each with that thing's box."""
    draw = Draw("expressions", scene.key)
    out: list[dict] = []
    for thing in scene.things:
        look = shortest_unique(scene.things, thing, ("f", "c", "cf", "sf", "sc", "scf"))
        texts = [f"the {look.words()}"] if look else []
        if count(scene.things, look_of(thing)) == 1:
            texts.append(f"the {look_of(thing).words()}")
        related = _relative_expression(draw, scene.things, thing)
        if related:
            texts.append(related)
        out.extend({"text": text, "bb": pixel_box(thing, image)} for text in dict.fromkeys(texts))
    return out


def clearly_related(things: Sequence[Thing], relation: str, anchor: Thing) -> list[Thing] | None:
    """The things in the relation to `anchor`; None where one is on that side but too near."""
    across = relation in ("left of", "right of")
    sign = -1 if relation in ("left of", "above") else 1
    clear = [thing for thing in things if holds(relation, thing, anchor)]
    steps = [thing.x - anchor.x if across else thing.y - anchor.y for thing in things]
    side = [step for step in steps if sign * step > 0]
    return clear if len(side) == len(clear) else None


def _relative_expression(draw: Draw, things: Sequence[Thing], thing: Thing) -> str | None:
    """ "the circle left of the red square": unique among the clear neighbours on that side."""
    for anchor in draw.shuffled(things):
        named = shortest_unique(things, anchor, ("cf", "scf"))
        if anchor is thing or named is None:
            continue
        for relation in draw.shuffled(pair_relations(thing, anchor)):
            clear = clearly_related(things, relation, anchor)
            if clear is None:
                continue
            look = shortest_unique(clear, thing, ("f", "c", "cf"))
            if look is not None:
                return f"the {look.words()} {relation} the {named.words()}"
    return None


STATEMENT_TEMPLATES = (
    "both pictures show a {look}",
    "exactly 1 of the pictures shows a {look}",
    "there are {n} {look} in total",
    "the left picture has more {look} than the right picture",
    "the right picture has more {look} than the left picture",
    "the left picture shows a {look} and the right picture shows a {other}",
)


def _looks(parts: str) -> list[Look]:
    return [
        Look(size, colour, shape)
        for size in (SIZES if "s" in parts else (None,))
        for colour in (COLOURS if "c" in parts else (None,))
        for shape in (SHAPES if "f" in parts else (None,))
    ]


def statements(left: Scene, right: Scene, how_many: int = 4) -> list[dict]:
    """Statements about two pictures; the truth is drawn first, so labels are balanced."""
    draw = Draw("statements", left.key, right.key)
    out: dict[str, bool] = {}
    start = draw.below(len(_STATEMENTS))
    for step in range(3 * len(_STATEMENTS)):
        if len(out) == how_many:
            break
        make = _STATEMENTS[(start + step) % len(_STATEMENTS)]
        label = draw.coin()
        sentences = make(left.things, right.things)
        # A template is used only where it can be both true and false: else its truth would show.
        if sentences[True] and sentences[False]:
            out.setdefault(draw.pick(sentences[label]), label)
    return [{"sentence": sentence, "label": label} for sentence, label in out.items()]


Things = Sequence[Thing]
Sorted = dict[bool, list[str]]


def _both(left: Things, right: Things) -> Sorted:
    out: Sorted = {True: [], False: []}
    for look in _looks("cf") + _looks("c") + _looks("f"):
        seen = (count(left, look) > 0) + (count(right, look) > 0)
        if seen:
            out[seen == 2].append(f"both pictures show a {look.words()}")
    return out


def _exactly_one(left: Things, right: Things) -> Sorted:
    out: Sorted = {True: [], False: []}
    for look in _looks("c") + _looks("f"):
        seen = (count(left, look) > 0) + (count(right, look) > 0)
        out[seen == 1].append(f"exactly 1 of the pictures shows a {look.words()}")
    return out


def _total(left: Things, right: Things) -> Sorted:
    out: Sorted = {True: [], False: []}
    for look in [*_looks("c"), *_looks("f"), Look()]:
        n = count(left, look) + count(right, look)
        if n < 2:
            continue
        out[True].append(f"there are {n} {look.words(True)} in total")
        for other in (n - 1, n + 1):
            if other >= 2:
                out[False].append(f"there are {other} {look.words(True)} in total")
    return out


def _more(left: Things, right: Things) -> Sorted:
    out: Sorted = {True: [], False: []}
    for look in [*_looks("c"), *_looks("f"), Look()]:
        a, b = count(left, look), count(right, look)
        if a == b:
            continue
        words = look.words(True)
        out[a > b].append(f"the left picture has more {words} than the right picture")
        out[b > a].append(f"the right picture has more {words} than the left picture")
    return out


def _each(left: Things, right: Things) -> Sorted:
    out: Sorted = {True: [], False: []}
    for one in left:
        for other in right:
            a, b = look_of(one, "cf"), look_of(other, "cf")
            if a == b:
                continue
            sentence = "the left picture shows a {} and the right picture shows a {}"
            out[True].append(sentence.format(a.words(), b.words()))
            if not (count(left, b) and count(right, a)):
                out[False].append(sentence.format(b.words(), a.words()))
    return out


_STATEMENTS = (_both, _exactly_one, _total, _more, _each)
