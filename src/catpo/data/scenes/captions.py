"""Describe a scene in English: truthfully, or as web captions do, naming tempting objects that are absent.

Each object is introduced with its number and its place relative to one already named. An absent object gets an invented place
and the same phrases, so that only the picture tells the difference.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from catpo.data.scenes.plan import CANVAS, SIZES, Box, Scene
from catpo.text.object_words import classes, contexts

SECOND_TEMPTATION = 0.15
"""Probability that a web caption with one absent object names another."""
COMPANION_TEMPTATION, OTHER_TEMPTATION = 0.9, 0.5
"""Probability that a web caption names an absent object: with and without its companion on the scene."""
FORGETTING = 0.06
"""Probability that a web caption leaves out a present object."""
NEAR = 36
"""Distance of centres, in pixels, below which two objects may be called next to each other."""

OPENINGS = (
    "This picture shows {place} with {thing}.",
    "{In_place} there {is_are} {thing}.",
    "The image shows {thing} {in_place}.",
    "{Thing} can be seen {in_place}.",
    "Here is a view of {place} with {thing}.",
)
SENTENCES = (
    "There {is_are} {thing} {relation} {anchor}.",
    "{Relation} {anchor} there {is_are} {thing}.",
    "{Thing} can be seen {relation} {anchor}.",
    "{Relation} {anchor} we see {thing}.",
    "{Thing} {is_are} {relation} {anchor}.",
)
CLOSINGS = (
    "The colours are bright and clear.",
    "Nobody else is around.",
    "It looks like a calm day.",
    "The whole view is simple and tidy.",
)
PLACES = {
    "kitchen": ("in", "a kitchen"),
    "street": ("on", "a busy street"),
    "farm": ("on", "a farm"),
    "beach": ("on", "a sunny beach"),
    "park": ("in", "a green park"),
    "office": ("in", "an office"),
    "living room": ("in", "a living room"),
    "forest": ("in", "a dark forest"),
    "airport": ("at", "an airport"),
    "party": ("at", "a birthday party"),
}
MIN_WORDS = 15


@dataclass(frozen=True)
class _Thing:
    """An object in a caption, real or invented, with its number and place."""

    name: str
    count: int
    centre: tuple[float, float]

    @property
    def phrase(self) -> str:
        return classes()[self.name].phrase(self.count)

    @property
    def definite(self) -> str:
        """To refer back to it: "the dog", "the dogs", "the loaf of bread"."""
        item = classes()[self.name]
        return "the " + (item.one.split(" ", 1)[1] if self.count == 1 else item.plural)

    @property
    def is_are(self) -> str:
        return "is" if self.count == 1 else "are"


def true_caption(scene: Scene, rng: random.Random) -> str:
    """A caption that names every present object and nothing else."""
    return _compose(scene, _present_things(scene), rng)


def web_caption(scene: Scene, rng: random.Random) -> str:
    """A caption as on the web: it leaves out a present object now and then, and names tempting absent ones."""
    things = [thing for thing in _present_things(scene) if rng.random() >= FORGETTING] or _present_things(scene)[:1]
    invented = [_invent(name, rng) for name in tempted(scene, rng)]
    return _compose(scene, things + invented, rng)


def tempted(scene: Scene, rng: random.Random) -> list[str]:
    """Absent objects that a web caption names, at most two, mostly the most tempting (a power law over ranks)."""
    names = scene.tempting
    if not names:
        return []
    chance = COMPANION_TEMPTATION if scene.is_companion(names[0]) else OTHER_TEMPTATION
    if rng.random() >= chance:
        return []
    chosen: list[str] = []
    for _ in range(2 if rng.random() < SECOND_TEMPTATION else 1):
        left = [name for name in names if name not in chosen]
        if left:
            chosen.append(rng.choices(left, [(rank + 1) ** -3.0 for rank in range(len(left))])[0])
    return chosen


def _present_things(scene: Scene) -> list[_Thing]:
    return [_Thing(name, len(boxes), _centre(boxes)) for name, boxes in scene.boxes.items()]


def _invent(name: str, rng: random.Random) -> _Thing:
    half = rng.choice(SIZES) // 2
    centre = (rng.uniform(half, CANVAS - half), rng.uniform(half, CANVAS - half))
    return _Thing(name, rng.choice((1, 1, 1, 1, 1, 2)), centre)


def _compose(scene: Scene, things: list[_Thing], rng: random.Random) -> str:
    """An opening, one sentence per further object, sometimes a closing; typical objects tend to come first."""
    members = contexts()[scene.context]
    rank = {thing.name: members.index(thing.name) if thing.name in members else len(members) for thing in things}
    things = sorted(things, key=lambda thing: rank[thing.name] + rng.uniform(-2, 2))
    sentences = [_fill(rng.choice(OPENINGS), things[0], place=PLACES[scene.context])]
    for number, thing in enumerate(things[1:]):
        anchor = things[number] if rng.random() < 0.7 else rng.choice(things[: number + 1])
        sentences.append(_fill(rng.choice(SENTENCES), thing, relation=_relation(thing, anchor, rng), anchor=anchor.definite))
    if rng.random() < 0.2 or sum(len(sentence.split()) for sentence in sentences) < MIN_WORDS:
        sentences.append(rng.choice(CLOSINGS))
    return " ".join(sentences)


def _fill(template: str, thing: _Thing, *, relation: str = "", anchor: str = "", place: tuple[str, str] = ("", "")) -> str:
    in_place = " ".join(place)
    words = {"thing": thing.phrase, "relation": relation, "in_place": in_place}
    capitals = {name.capitalize(): text[:1].upper() + text[1:] for name, text in words.items()}
    return template.format(**words, **capitals, is_are=thing.is_are, anchor=anchor, place=place[1])


def _relation(thing: _Thing, anchor: _Thing, rng: random.Random) -> str:
    """Where `thing` is relative to `anchor`, along the axis of the larger distance."""
    dx, dy = thing.centre[0] - anchor.centre[0], thing.centre[1] - anchor.centre[1]
    if dx * dx + dy * dy < NEAR * NEAR and rng.random() < 0.3:
        return "next to"
    if abs(dx) > abs(dy):
        return "to the left of" if dx < 0 else "to the right of"
    return "above" if dy < 0 else "below"


def _centre(boxes: list[Box]) -> tuple[float, float]:
    """The mean of the boxes' centres."""
    xs = [(x0 + x1) / 2 for x0, _, x1, _ in boxes]
    ys = [(y0 + y1) / 2 for _, y0, _, y1 in boxes]
    return sum(xs) / len(xs), sum(ys) / len(ys)
