"""Answers that one of two models got right and the other wrong, with prompt, picture and labelled words."""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from catpo.core import registry
from catpo.core.errors import UserError
from catpo.core.types import Picture
from catpo.data.datasets import Dataset
from catpo.data.read import open_data
from catpo.evaluation.benchmarks import Folder, FolderBenchmark
from catpo.evaluation.folder import HALLUCINATED, Evaluation, mentions
from catpo.evaluation.paired import incomparable
from catpo.reporting.pictures import Album
from catpo.text.object_words import mentions as find_mentions

MAX_CHANGED = 12
"""Changed answers shown per model, category and way."""


@dataclass(frozen=True)
class ChangedAnswer:
    """An item that one model answered correctly, or without hallucinations, and the other did not."""

    model: str
    benchmark: str
    category: str
    """The benchmark's group of items: captions, or a kind of question."""
    item: str
    way: str
    """`fixed`: the base was wrong and the model is not; `broken`: the other way round."""
    prompt: str
    before: list[tuple[str, str]]
    """(part of the base's answer, label): `grounded`, `hallucinated`, or empty."""
    after: list[tuple[str, str]]
    image: int | None


@dataclass(frozen=True)
class Changes:
    """How many answers changed, and the first of them."""

    counts: list[tuple[str, str, str, int, int]]
    """(model, benchmark, category, fixed, broken)."""
    answers: list[ChangedAnswer]

    @property
    def categories(self) -> list[tuple[str, str]]:
        """(benchmark, category) of all that changed."""
        return list(dict.fromkeys((benchmark, category) for _, benchmark, category, _, _ in self.counts))


def changed_answers(evaluations: Sequence[Evaluation], album: Album) -> Changes:
    """Answers that only one of two models got wrong: the base (the first) against each other model."""
    base, *others = evaluations
    counts, answers = [], []
    for benchmark in base.benchmarks:
        changed = {other.name: _changed_items(base, other, benchmark) for other in others}
        shown: set[str] = set()
        for ways in changed.values():
            shown.update(item for items in ways.values() for item in items[:MAX_CHANGED])
        dataset = _open(base, benchmark) if shown else None
        pictures = _pictures(evaluations, benchmark, dataset, shown)
        for other in others:
            ways = changed[other.name]
            for category in dict.fromkeys(category for category, _ in ways):
                fixed, broken = (len(ways.get((category, way), ())) for way in ("fixed", "broken"))
                counts.append((other.name, benchmark, category, fixed, broken))
            for (category, way), items in ways.items():
                for item in items[:MAX_CHANGED]:
                    prompt = str(base.answers.get((benchmark, item), {}).get("prompt", ""))
                    before, after = (list(_labelled(model, benchmark, item, dataset)) for model in (base, other))
                    image = album.add(pictures[item], side=288) if item in pictures else None
                    answers.append(ChangedAnswer(other.name, benchmark, category, item, way, prompt, before, after, image))
    return Changes(counts, answers)


def _changed_items(base: Evaluation, other: Evaluation, benchmark: str) -> dict[tuple[str, str], list[str]]:
    """(category, way) -> ids of the items that changed."""
    changed: dict[tuple[str, str], list[str]] = {}
    if incomparable(base, other, benchmark):
        return changed
    after = other.grades.get(benchmark, {})
    for (category, item), row in base.grades.get(benchmark, {}).items():
        was_right, is_right = _is_right(row), _is_right(after.get((category, item), {}))
        if was_right is not None and is_right is not None and was_right != is_right:
            changed.setdefault((category, "broken" if was_right else "fixed"), []).append(item)
    return changed


def _is_right(row: Mapping[str, Any]) -> bool | None:
    """Whether an answer is right, or a caption names nothing that is absent; None if it is neither answer nor caption."""
    if "right" in row:
        return bool(row["right"])
    named = mentions(row)
    return None if named is None else all(label != HALLUCINATED for _, label in named)


def _labelled(evaluation: Evaluation, benchmark: str, item: str, dataset: Dataset | None) -> Iterator[tuple[str, str]]:
    """Parts of an answer, object words with the label that they were graded with."""
    text = str(evaluation.answers.get((benchmark, item), {}).get("answer", ""))
    labels = dict(evaluation.labels(benchmark).get(item, ()))
    vocabulary = dataset.vocabulary if dataset else {word: name for name in labels for word in (name, f"{name}s")}
    end = 0
    for mention in find_mentions(text, vocabulary) if labels else ():
        if mention.object in labels:
            yield text[end : mention.start], ""
            yield text[mention.start : mention.end], labels[mention.object]
            end = mention.end
    yield text[end:], ""


def _open(evaluation: Evaluation, benchmark: str) -> Dataset | None:
    """The data set that a benchmark was made of, if it can be opened."""
    try:
        return open_data(evaluation.scores["benchmarks"][benchmark]["data"])
    except (KeyError, UserError):
        return None


def _pictures(
    evaluations: Sequence[Evaluation], benchmark: str, dataset: Dataset | None, wanted: Container[str]
) -> dict[str, Picture]:
    """Item id -> picture; none where models were shown other pictures (`shuffled`), or the files are not at hand."""
    if any(evaluation.scores.get("shuffled") for evaluation in evaluations):
        return {}
    try:
        if dataset is None:
            return _official_pictures(evaluations[0], benchmark, wanted)
        return {sample.id: sample.images[0] for sample in dataset.samples() if sample.id in wanted and sample.images}
    except UserError:
        return {}


def _official_pictures(evaluation: Evaluation, benchmark: str, wanted: Container[str]) -> dict[str, Picture]:
    """Pictures of a benchmark made of official files, from the folder that it was evaluated with."""
    make = registry.load("benchmarks", benchmark)
    data = evaluation.data
    pictures = {}
    if data and issubclass(make, FolderBenchmark) and make.pictures is not None:
        folder = Folder(Path(data), benchmark, make.sources, make.pictures)
        for (_, item), row in evaluation.grades[benchmark].items():
            picture = folder.picture(str(row["picture"]))
            if item in wanted and picture.path is not None and picture.path.is_file():
                pictures[item] = picture
    return pictures
