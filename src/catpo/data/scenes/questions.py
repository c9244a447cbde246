"""Yes/no questions about a scene, balanced as in POPE: each split has as many with the answer yes as with no.

The splits differ in the absent objects asked for: any (random), frequent in all scenes (popular), usually seen with what is
there (adversarial).
"""

from __future__ import annotations

import random
from functools import lru_cache

from catpo.data.scenes.plan import Scene
from catpo.text.object_words import classes, contexts

SPLITS = ("random", "popular", "adversarial")


def questions(scene: Scene, *, per_answer: int = 3) -> list[dict[str, str]]:
    """Rows {"question", "answer", "split", "object"}: up to `per_answer` with yes and as many with no, for each split."""
    rng = scene.generator("questions")
    rows: list[dict[str, str]] = []
    for split in SPLITS:
        count = min(per_answer, len(scene.present))
        absent = negatives(scene, split, count, rng)
        for present_name, absent_name in zip(rng.sample(scene.present, len(absent)), absent, strict=True):
            rows.append(_row(present_name, "yes", split))
            rows.append(_row(absent_name, "no", split))
    return rows


def negatives(scene: Scene, split: str, count: int, rng: random.Random) -> list[str]:
    """Absent objects to ask for, at most `count`."""
    if split == "random":
        return rng.sample([name for name in classes() if name not in scene.boxes], count)
    if split == "popular":
        return [name for name in popular() if name not in scene.boxes][:count]
    return scene.tempting[:count]


def question(name: str) -> str:
    """The question about an object.

    >>> question("apple")
    'Is there an apple in the image?'
    """
    return f"Is there {classes()[name].one} in the image?"


@lru_cache(maxsize=1)
def popular() -> list[str]:
    """All objects by frequency over all contexts (the sum of their power laws)."""
    weight = dict.fromkeys(classes(), 0.0)
    for members in contexts().values():
        for rank, name in enumerate(members):
            weight[name] += (rank + 1) ** -0.5
    return sorted(weight, key=lambda name: (-weight[name], name))


def _row(name: str, answer: str, split: str) -> dict[str, str]:
    return {"question": question(name), "answer": answer, "split": split, "object": name}
