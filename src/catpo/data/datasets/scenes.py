"""Built-in pictures: scenes composed of emoji art and drawn on the fly, with exact truth.

    scenes(count=500, seed=1, split='test')

Samples only; `catpo pair` makes preference pairs of them. A scene depends only on its split, seed and number.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from catpo.core.errors import UserError, did_you_mean
from catpo.core.types import Picture, Sample
from catpo.data import datasets
from catpo.data.scenes.captions import true_caption
from catpo.data.scenes.draw import draw, encode
from catpo.data.scenes.plan import CANVAS, Scene, scene
from catpo.data.scenes.questions import questions
from catpo.text.object_words import default_vocabulary

SPLITS = ("train", "test")
PROMPTS = ("Describe the image.", "What can be seen in this image?", "Describe this picture in detail.")


class Dataset(datasets.Dataset):
    """Scenes 0 to `count` - 1 of a stream.

    Args:
        source: not used; scenes are not read from a file.
        count: number of scenes.
        seed: which stream; scene number i of a stream is the same for any count.
        split: 'train' or 'test'; the built-in VLM has seen no scene of 'test', and they share none with 'train'.
        size: width and height in pixels; the built-in VLM looks at 96.
        questions: at most this many yes/no questions per scene, split and answer; fewer on scenes with fewer objects.
        prompts: number of prompts that take turns, 1 to 3; the first is "Describe the image."
        start: number of the first scene.
    """

    name = "scenes"
    vocabulary = default_vocabulary()

    def __init__(
        self,
        source: str | Path | None = None,
        *,
        count: int = 1000,
        seed: int = 0,
        split: str = "train",
        size: int = CANVAS,
        questions: int = 3,
        prompts: int = 1,
        start: int = 0,
    ) -> None:
        if source is not None:
            raise UserError(f"scenes are drawn, not read from '{source}'. Give options instead: scenes(count=400, seed=1).")
        if split not in SPLITS:
            raise UserError(f"scenes: '{split}' is not a split. {did_you_mean(str(split), SPLITS)}")
        _check_range("count", count, low=1)
        _check_range("size", size, low=16, high=1024)
        _check_range("questions", questions, low=0, high=6)
        _check_range("prompts", prompts, low=1, high=len(PROMPTS))
        _check_range("start", start, low=0)
        self.count, self.seed, self.split, self.size = count, seed, split, size
        self.question_count, self.prompt_count, self.start = questions, prompts, start

    def __len__(self) -> int:
        return self.count

    def samples(self) -> Iterator[Sample]:
        """Scenes with their truth; reading the truth is cheap, since a picture is drawn only when opened."""
        for index in range(self.start, self.start + self.count):
            planned = scene(split=self.split, seed=self.seed, index=index)
            name = f"scenes-{self.split}-{self.seed}-{index:06d}"
            yield Sample(
                id=name,
                images=(ScenePicture(name=name, scene=planned, size=self.size),),
                prompt=PROMPTS[index % self.prompt_count],
                references=(true_caption(planned, planned.generator("reference")),),
                truth=truth(planned, questions_per_answer=self.question_count),
            )


@dataclass(frozen=True)
class ScenePicture(Picture):
    """A scene that is drawn when it is read, so that a million of them fit in memory."""

    scene: Scene | None = None
    size: int = CANVAS

    def read(self) -> bytes:
        assert self.scene is not None
        return _drawn(self.scene, self.size) if self.size <= CANVAS else encode(draw(self.scene, size=self.size))


@lru_cache(maxsize=1024)
def _drawn(scene: Scene, size: int) -> bytes:
    """A small picture, 8 kB on average, kept for the next model that answers questions about it."""
    return encode(draw(scene, size=size))


def truth(planned: Scene, *, questions_per_answer: int = 3) -> dict[str, Any]:
    """All that is known of a scene, in plain lists and dictionaries.

    Keys: "context"; "present", typical objects first; "counts"; "tempting", absent objects of the context, the most tempting
    first; "boxes" [[x0, y0, x1, y1], ...] per object in pixels of a 96 x 96 picture; "questions", see `data.scenes.questions`.
    """
    return {
        "context": planned.context,
        "present": planned.present,
        "counts": planned.counts,
        "tempting": planned.tempting,
        "boxes": {name: [list(box) for box in boxes] for name, boxes in planned.boxes.items()},
        "questions": questions(planned, per_answer=questions_per_answer),
    }


def _check_range(option: str, value: int, *, low: int, high: int | None = None) -> None:
    if type(value) is not int or value < low or (high is not None and value > high):
        limits = f"{low} or more" if high is None else f"{low} to {high}"
        raise UserError(f"scenes: {option}={value!r} must be a whole number, {limits}.")
