"""Plan a scene: a context, and objects with places and sizes, from which all else follows. Draws nothing.

Per context, objects are as frequent as a power law says, and companions (cup and spoon) occur together more often than chance:
the language prior that tempts a model to name an absent companion, as photographs do.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from catpo.text.object_words import companion, contexts

Box = tuple[int, int, int, int]
"""x0, y0, x1, y1 in pixels of the canvas; x1 and y1 are outside."""

CANVAS = 96
SIZES = (24, 28, 32, 36, 40, 44)
CLASS_COUNTS = (2, 3, 3, 4, 4, 5)
COPIES = (1, 1, 1, 1, 1, 1, 2, 2, 3)
MAX_OBJECTS = 6
STRAY_SHARE = 0.08
"""Probability that an object is drawn from anywhere instead of the context."""
COMPANION_WEIGHT = 4.0
"""Factor on an object's probability when its companion is there."""
PLACE_TRIES = 24
MAX_OVERLAP = 0.3
"""Fraction of the smaller of two boxes that may be covered, unless no better place is found."""


@dataclass(frozen=True)
class Placed:
    """One object on the canvas; later ones are drawn over earlier ones."""

    name: str
    box: Box
    is_mirrored: bool


@dataclass(frozen=True)
class Scene:
    """A picture before it is drawn, and what is true of it."""

    key: str
    """"split/seed/index": the seed of everything random about it."""
    context: str
    objects: tuple[Placed, ...]

    @cached_property
    def boxes(self) -> dict[str, list[Box]]:
        """Object -> boxes of its copies, typical objects first, as a person would name them."""
        grouped: dict[str, list[Box]] = {}
        for name in sorted({placed.name for placed in self.objects}, key=self._typicality):
            grouped[name] = [placed.box for placed in self.objects if placed.name == name]
        return grouped

    @cached_property
    def present(self) -> list[str]:
        return list(self.boxes)

    @cached_property
    def counts(self) -> dict[str, int]:
        return {name: len(boxes) for name, boxes in self.boxes.items()}

    @cached_property
    def tempting(self) -> list[str]:
        """Absent objects of the context: companions of present ones first, then by frequency."""
        absent = [name for name in contexts()[self.context] if name not in self.boxes]
        return sorted(absent, key=lambda name: (not self.is_companion(name), self._typicality(name)))

    def is_companion(self, name: str) -> bool:
        """Whether its companion is on the scene."""
        return companion(self.context, name) in self.boxes

    def generator(self, purpose: str) -> random.Random:
        """This scene's random numbers for one purpose, the same on every machine."""
        return random.Random(f"{self.key}/{purpose}")

    def _typicality(self, name: str) -> tuple[int, str]:
        members = contexts()[self.context]
        return (members.index(name) if name in members else len(members), name)


def scene(*, split: str, seed: int, index: int) -> Scene:
    """Scene number `index` of an endless stream; streams of different splits or seeds share none."""
    key = f"{split}/{seed}/{index}"
    rng = random.Random(f"{key}/plan")
    context = rng.choice(sorted(contexts()))
    placed: list[Placed] = []
    for name in _instances(context, rng):
        placed.append(Placed(name, _place(placed, rng), rng.random() < 0.5))
    return Scene(key, context, tuple(placed))


def weights(context: str, chosen: Sequence[str]) -> dict[str, float]:
    """Weight of each object of the context as the next one, given those chosen; not normalised."""
    table = {name: (rank + 1) ** -0.5 for rank, name in enumerate(contexts()[context])}
    for name in chosen:
        other = companion(context, name)
        if other is not None:
            table[other] *= COMPANION_WEIGHT
    return {name: weight for name, weight in table.items() if name not in chosen}


def _instances(context: str, rng: random.Random) -> list[str]:
    """Names of the objects to place, one per copy, in random order."""
    chosen: list[str] = []
    for _ in range(rng.choice(CLASS_COUNTS)):
        chosen.append(_next_class(context, chosen, rng))
    names = [name for name in chosen for _ in range(rng.choice(COPIES))]
    extra = len(names) - MAX_OBJECTS
    for name in reversed(chosen):
        while extra > 0 and names.count(name) > 1:
            names.remove(name)
            extra -= 1
    rng.shuffle(names)
    return names


def _next_class(context: str, chosen: list[str], rng: random.Random) -> str:
    if rng.random() < STRAY_SHARE:
        everything = sorted({name for members in contexts().values() for name in members} - set(chosen))
        return rng.choice(everything)
    table = weights(context, chosen)
    return rng.choices(list(table), list(table.values()))[0]


def _place(placed: list[Placed], rng: random.Random) -> Box:
    """A place with little overlap, the best of a few tries."""
    others = [other.box for other in placed]
    best, best_overlap = (0, 0, 0, 0), 2.0
    for _ in range(PLACE_TRIES):
        size = rng.choice(SIZES)
        x, y = rng.randint(0, CANVAS - size), rng.randint(0, CANVAS - size)
        box = (x, y, x + size, y + size)
        overlap = _overlap(box, others)
        if overlap <= MAX_OVERLAP:
            return box
        if overlap < best_overlap:
            best, best_overlap = box, overlap
    return best


def _overlap(box: Box, others: list[Box]) -> float:
    """Largest overlap with another box, as a fraction of the smaller of the two."""
    worst = 0.0
    x0, y0, x1, y1 = box
    for a0, b0, a1, b1 in others:
        width, height = min(x1, a1) - max(x0, a0), min(y1, b1) - max(y0, b0)
        if width > 0 and height > 0:
            worst = max(worst, width * height / min((x1 - x0) ** 2, (a1 - a0) ** 2))
    return worst
