"""A family without a model: answers made by a function, batch by batch, so that engines are tested in milliseconds."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence

from catpo.core.types import Sample
from catpo.data.scenes.captions import web_caption
from catpo.data.scenes.plan import Scene, scene
from catpo.models.family import Family


def scene_of(sample: Sample) -> Scene:
    """The scene behind a sample of the built-in pictures (or behind a question about one), found by its id."""
    _, split, seed, index, *_ = re.split("[-/]", sample.id)
    return scene(split=split, seed=int(seed), index=int(index))


def say_web_caption(sample: Sample, rng: random.Random) -> str:
    """What a caption on the web would say of a scene; for a yes/no question, yes most of the time."""
    if sample.prompt.startswith("Is there"):
        return rng.choice(["Yes.", "Yes.", "No.", "no", "Maybe."])
    return web_caption(scene_of(sample), rng)


class FakeFamily(Family):
    """What engines ask of a family, and a switch that breaks it after so many calls."""

    shares_prefix = False

    model_id = "fake"
    model_hash, precision = "1234", "float32"
    processor_hash = template_hash = "none"

    def __init__(
        self, answer: Callable[[Sample, random.Random], str] = say_web_caption, *, fail_after: int | None = None
    ) -> None:
        self.answer = answer
        self.fail_after = fail_after
        self.calls: list[int] = []
        self.options: list[dict[str, object]] = []

    def changed_by_config(self, *, is_sampled: bool) -> dict[str, dict[str, object]]:
        return {}

    def generate(
        self, samples: Sequence[Sample], *, seed: int = 0, temperature: float = 0.0, batch_size: int = 32, **options: object
    ) -> list[str]:
        if self.fail_after is not None and len(self.calls) >= self.fail_after:
            raise KeyboardInterrupt
        self.calls.append(len(samples))
        self.options.append({"seed": seed, "temperature": temperature, **options})
        rng = random.Random(f"{seed}/{samples[0].id}")  # one stream per call, as in real batches
        return [self.answer(sample, rng) for sample in samples]
