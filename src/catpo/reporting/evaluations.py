"""Evaluations for the page: a table per benchmark, CHAIRi at equal coverage, answers that changed. Knows no model."""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from markupsafe import Markup

from catpo.core import registry
from catpo.core.errors import UserError
from catpo.core.types import Picture
from catpo.data.datasets import Dataset
from catpo.data.read import open_data
from catpo.evaluation.benchmarks import FolderBenchmark
from catpo.evaluation.benchmarks._files import Folder
from catpo.evaluation.bootstrap import Estimate
from catpo.evaluation.coverage import Coverage, at_equal_coverage, coverage_curves
from catpo.evaluation.folder import HALLUCINATED, Evaluation, mentions
from catpo.evaluation.metric_names import good_side, metric_label
from catpo.evaluation.paired import Difference, incomparable, paired_differences
from catpo.reporting.pictures import Album
from catpo.reporting.plots import Series, curves
from catpo.text.object_words import mentions as find_mentions

MAX_CHANGED = 12
"""Changed answers shown per model, category and way."""


MAIN_OF_A_SPLIT = ("/accuracy", "/f1")


@dataclass(frozen=True)
class Cell:
    """One model's value of one metric."""

    value: Estimate
    difference: Difference | None
    """Against the base; None for the base itself, or where items differ."""
    tone: str
    """`better`, `worse`, or empty where the difference is not clear or the metric has no good side."""


@dataclass(frozen=True)
class BenchmarkTable:
    """One benchmark over all models."""

    name: str
    options: str
    item_count: int
    models: list[str]
    rows: list[tuple[str, list[Cell | None]]]
    """(label of the metric, a cell per model): what is shown at once."""
    more_rows: list[tuple[str, list[Cell | None]]]
    """The same for what is folded away: of each split all but its accuracy and F1."""
    coverage: list[Coverage]
    lead_of_best: Coverage | None
    """The lowest CHAIRi at equal coverage, its difference being that to the next lowest; None with fewer than three models."""
    drawing: Markup | None
    """Cover against CHAIRi as captions are cut."""
    notes: list[str] = field(default_factory=list)
    """What a reader must know: the judge, evaluations in part, figures that are not those of papers."""

    @property
    def lead(self) -> int:
        """How many rows stand before that of equal coverage: all up to Cover."""
        labels = [label for label, _ in self.rows]
        return labels.index("Cover") + 1 if "Cover" in labels else len(labels)

    @property
    def has_differences(self) -> bool:
        return any(cell is not None and cell.difference is not None for _, cells in self.rows for cell in cells)


@dataclass(frozen=True)
class Part:
    """A stretch of an answer."""

    text: str
    label: str
    """grounded, hallucinated, or empty."""


@dataclass(frozen=True)
class ChangedAnswer:
    """An item that one model answered rightly, or without hallucinations, and the other not."""

    model: str
    benchmark: str
    category: str
    """The benchmark's group of items: captions, or a kind of question."""
    item: str
    way: str
    """`fixed`: the base was wrong and the model is not; `broken`: the other way round."""
    prompt: str
    before: list[Part]
    after: list[Part]
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


def benchmark_tables(
    evaluations: Sequence[Evaluation], colours: Mapping[str, int], *, resamples: int = 1000
) -> list[BenchmarkTable]:
    """A table per benchmark; the first evaluation is the base."""
    base, *others = evaluations
    differences = {
        (other.name, row.benchmark, row.metric): row
        for other in others
        for row in paired_differences(base, other, resamples=resamples)
    }
    return [
        _table(name, having, differences, colours, resamples)
        for name in _benchmarks(evaluations)
        for having in _by_judge(name, evaluations)
    ]


def _by_judge(benchmark: str, evaluations: Sequence[Evaluation]) -> list[list[Evaluation]]:
    """The evaluations that have a benchmark, a list per judge: figures of different judges share no table."""
    having = [evaluation for evaluation in evaluations if benchmark in evaluation.benchmarks]
    judges = dict.fromkeys(each.judge(benchmark) for each in having)
    return [[each for each in having if each.judge(benchmark) == judge] for judge in judges]


def _table(
    benchmark: str,
    having: Sequence[Evaluation],
    differences: Mapping[tuple[str, str, str], Difference],
    colours: Mapping[str, int],
    resamples: int,
) -> BenchmarkTable:
    values = {evaluation.name: evaluation.metrics(benchmark) for evaluation in having}
    rows: list[tuple[str, list[Cell | None]]] = []
    more_rows: list[tuple[str, list[Cell | None]]] = []
    for metric in dict.fromkeys(metric for metrics in values.values() for metric in metrics):
        cells: list[Cell | None] = []
        for evaluation in having:
            difference = differences.get((evaluation.name, benchmark, metric))
            value = values[evaluation.name].get(metric)
            cells.append(None if value is None else Cell(value, difference, tone(metric, difference)))
        is_main = "/" not in metric or metric.endswith(MAIN_OF_A_SPLIT)
        (rows if is_main else more_rows).append((metric_label(metric), cells))
    about = having[0].scores["benchmarks"][benchmark]
    same = [each for each in having if each.scores["benchmarks"][benchmark].get("options") == about.get("options")]
    coverage = [row for row in at_equal_coverage(same, resamples=resamples) if row.benchmark == benchmark]
    return BenchmarkTable(
        benchmark,
        str(about.get("options", benchmark)),
        int(about.get("items", 0)),
        [evaluation.name for evaluation in having],
        rows,
        more_rows,
        coverage,
        _lead_of_best(same, coverage, resamples),
        _coverage_drawing(same, benchmark, colours) if coverage else None,
        _notes(benchmark, having),
    )


def _notes(benchmark: str, having: Sequence[Evaluation]) -> list[str]:
    judge = having[0].judge(benchmark)
    notes = [f"Judge: {judge}."] if judge else []
    for each in having:
        about = each.scores["benchmarks"][benchmark]
        parts = ", ".join(f"{part} {n['graded']:,} of {n['asked']:,}" for part, n in about.get("parts", {}).items())
        notes += [] if about.get("complete", True) else [f"{each.name} is not complete: {parts}."]
        figures = about.get("tools", {}).get("figures", "")
        notes += [f"{each.name}: {figures}."] if figures.startswith("not") else []
    return notes


def _lead_of_best(evaluations: Sequence[Evaluation], coverage: Sequence[Coverage], resamples: int) -> Coverage | None:
    """The lowest CHAIRi at equal coverage against the next lowest; the others still decide how much is cut."""
    if len(coverage) < 3:
        return None
    ranked = sorted(range(len(coverage)), key=lambda place: coverage[place].chair_i.value)
    next_first = [evaluations[place] for place in (ranked[1], ranked[0], *ranked[2:])]
    rows = at_equal_coverage(next_first, resamples=resamples)
    return next(row for row in rows if row.benchmark == coverage[0].benchmark and row.model == coverage[ranked[0]].model)


def _coverage_drawing(evaluations: Sequence[Evaluation], benchmark: str, colours: Mapping[str, int]) -> Markup:
    lines = [
        Series(cover, chair_i, colours[name]) for name, (cover, chair_i) in coverage_curves(evaluations, benchmark).items()
    ]
    description = "CHAIRi over Cover, one line per model, as captions are cut after one object, two objects and so on"
    return curves(lines, x="Cover, %", y="CHAIRi, %", description=description, markers=True)


def tone(metric: str, difference: Difference | None) -> str:
    """Whether a clear difference is good or bad."""
    if difference is None or not difference.is_clear:
        return ""
    side = good_side(metric)
    if not side:
        return ""
    return "better" if difference.difference.value * side > 0 else "worse"


def _benchmarks(evaluations: Sequence[Evaluation]) -> list[str]:
    return list(dict.fromkeys(name for evaluation in evaluations for name in evaluation.benchmarks))


# ---- answers that changed -------------------------------------------------------------------------------------------------


def changed_answers(evaluations: Sequence[Evaluation], album: Album) -> Changes:
    """Answers that only one of two models got wrong, base (the first) against each other model."""
    base, *others = evaluations
    counts, answers = [], []
    for benchmark in base.benchmarks:
        ways = {other.name: _ways(base, other, benchmark) for other in others}
        shown = {item for each in ways.values() for items in each.values() for item in items[:MAX_CHANGED]}
        dataset = _open(base, benchmark) if shown else None
        pictures = _pictures(evaluations, benchmark, dataset, shown)
        for other in others:
            found = ways[other.name]
            for category in dict.fromkeys(category for category, _ in found):
                fixed, broken = (len(found.get((category, way), ())) for way in ("fixed", "broken"))
                counts.append((other.name, benchmark, category, fixed, broken))
            for (category, way), items in found.items():
                for item in items[:MAX_CHANGED]:
                    prompt = str(base.answers.get((benchmark, item), {}).get("prompt", ""))
                    before, after = (list(_marked(each, benchmark, item, dataset)) for each in (base, other))
                    image = album.add(pictures[item], side=288) if item in pictures else None
                    answers.append(ChangedAnswer(other.name, benchmark, category, item, way, prompt, before, after, image))
    return Changes(counts, answers)


def _ways(base: Evaluation, other: Evaluation, benchmark: str) -> dict[tuple[str, str], list[str]]:
    """(category, way) -> ids of the items that changed so."""
    ways: dict[tuple[str, str], list[str]] = {}
    if not incomparable(base, other, benchmark):
        for (group, item), row in base.grades.get(benchmark, {}).items():
            was, now = _is_right(row), _is_right(other.grades.get(benchmark, {}).get((group, item), {}))
            if was is not None and now is not None and was != now:
                ways.setdefault((group, "broken" if was else "fixed"), []).append(item)
    return ways


def _is_right(row: Mapping[str, Any]) -> bool | None:
    """Whether an answer is right, or a caption names nothing that is absent; None for what is neither."""
    if "right" in row:
        return bool(row["right"])
    named = mentions(row)
    return None if named is None else all(label != HALLUCINATED for _, label in named)


def _marked(evaluation: Evaluation, benchmark: str, item: str, dataset: Dataset | None) -> Iterator[Part]:
    """An answer with its object words labelled as they were graded."""
    text = str(evaluation.answers.get((benchmark, item), {}).get("answer", ""))
    labels = dict(evaluation.labels(benchmark).get(item, ()))
    vocabulary = dataset.vocabulary if dataset else {word: name for name in labels for word in (name, f"{name}s")}
    end = 0
    for mention in find_mentions(text, vocabulary) if labels else ():
        if mention.object in labels:
            yield Part(text[end : mention.start], "")
            yield Part(text[mention.start : mention.end], labels[mention.object])
            end = mention.end
    yield Part(text[end:], "")


def _open(evaluation: Evaluation, benchmark: str) -> Dataset | None:
    """The data set behind a benchmark, where it can be had again."""
    try:
        return open_data(evaluation.scores["benchmarks"][benchmark]["data"])
    except (KeyError, UserError):
        return None


def _pictures(
    evaluations: Sequence[Evaluation], benchmark: str, dataset: Dataset | None, wanted: Container[str]
) -> dict[str, Picture]:
    """Item id -> picture; none where the models were shown others (`shuffled`), or where it is not at hand."""
    if any(evaluation.scores.get("shuffled") for evaluation in evaluations):
        return {}
    try:
        if dataset is None:
            return dict(_official_pictures(evaluations[0], benchmark, wanted))
        return {sample.id: sample.images[0] for sample in dataset.samples() if sample.id in wanted and sample.images}
    except UserError:
        return {}


def _official_pictures(evaluation: Evaluation, benchmark: str, wanted: Container[str]) -> Iterator[tuple[str, Picture]]:
    """Pictures of a benchmark made of official files, out of the folder that it was evaluated with."""
    make = registry.load("benchmarks", benchmark)
    place = evaluation.data
    if place and issubclass(make, FolderBenchmark) and make.pictures is not None:
        folder = Folder(Path(place), benchmark, make.sources, make.pictures)
        for (_, item), row in evaluation.grades[benchmark].items():
            picture = folder.picture(str(row["picture"]))
            if item in wanted and picture.path is not None and picture.path.is_file():
                yield item, picture
