"""Evaluations for the page: a table per benchmark with differences to the base, and CHAIRi at equal coverage."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from markupsafe import Markup

from catpo.evaluation.bootstrap import Estimate
from catpo.evaluation.coverage import Coverage, at_equal_coverage, coverage_curves
from catpo.evaluation.folder import Evaluation
from catpo.evaluation.metric_names import good_side, metric_label
from catpo.evaluation.paired import Difference, paired_differences
from catpo.reporting.plots import Series, curves

MAIN_OF_A_SPLIT = ("/accuracy", "/f1")
"""Metrics of a split (of questions) that are shown at once; its others are folded away."""


@dataclass(frozen=True)
class Cell:
    """One model's value of one metric."""

    value: Estimate
    difference: Difference | None
    """To the base; None for the base itself, or where items differ."""

    @property
    def tone(self) -> str:
        """`better`, `worse`, or empty where the difference is not clear or the metric has no good side."""
        if self.difference is None or not self.difference.is_clear:
            return ""
        gain = self.difference.difference.value * good_side(self.difference.metric)
        return "better" if gain > 0 else "worse" if gain < 0 else ""


Row = tuple[str, list[Cell | None]]
"""Label of a metric, and a cell per model."""


@dataclass(frozen=True)
class BenchmarkTable:
    """One benchmark over all models."""

    name: str
    options: str
    item_count: int
    models: list[str]
    rows: list[Row]
    """What is shown at once."""
    more_rows: list[Row]
    """What is folded away."""
    coverage: list[Coverage]
    lead_of_best: Coverage | None
    """The lowest CHAIRi at equal coverage, with its difference to the next lowest; None with fewer than three models."""
    drawing: Markup | None
    """CHAIRi over Cover as captions are cut."""
    notes: list[str] = field(default_factory=list)
    """What a reader must know: the judge, incomplete evaluations, figures that cannot be compared with those of papers."""

    @property
    def lead(self) -> int:
        """Number of rows above that of equal coverage: all up to Cover."""
        labels = [label for label, _ in self.rows]
        return labels.index("Cover") + 1 if "Cover" in labels else len(labels)

    @property
    def has_differences(self) -> bool:
        return any(cell is not None and cell.difference is not None for _, cells in self.rows for cell in cells)


def benchmark_tables(
    evaluations: Sequence[Evaluation], colours: Mapping[str, int], *, resamples: int = 1000
) -> list[BenchmarkTable]:
    """A table per benchmark and judge; the first evaluation is the base."""
    base, *others = evaluations
    differences = {}
    for other in others:
        for difference in paired_differences(base, other, resamples=resamples):
            differences[other.name, difference.benchmark, difference.metric] = difference
    judged: dict[tuple[str, str], list[Evaluation]] = {}  # figures of different judges share no table
    for benchmark in dict.fromkeys(name for evaluation in evaluations for name in evaluation.benchmarks):
        for evaluation in evaluations:
            if benchmark in evaluation.benchmarks:
                judged.setdefault((benchmark, evaluation.judge(benchmark)), []).append(evaluation)
    return [_table(benchmark, some, differences, colours, resamples) for (benchmark, _), some in judged.items()]


def _table(
    benchmark: str,
    evaluations: Sequence[Evaluation],
    differences: Mapping[tuple[str, str, str], Difference],
    colours: Mapping[str, int],
    resamples: int,
) -> BenchmarkTable:
    models = [evaluation.name for evaluation in evaluations]
    metrics = {evaluation.name: evaluation.metrics(benchmark) for evaluation in evaluations}
    rows: list[Row] = []
    more_rows: list[Row] = []
    for metric in dict.fromkeys(metric for values in metrics.values() for metric in values):
        cells: list[Cell | None] = []
        for model in models:
            value = metrics[model].get(metric)
            cells.append(Cell(value, differences.get((model, benchmark, metric))) if value else None)
        is_main = "/" not in metric or metric.endswith(MAIN_OF_A_SPLIT)
        (rows if is_main else more_rows).append((metric_label(metric), cells))
    scores = evaluations[0].scores["benchmarks"][benchmark]
    options = scores.get("options")
    same = [other for other in evaluations if other.scores["benchmarks"][benchmark].get("options") == options]
    coverage = [row for row in at_equal_coverage(same, resamples=resamples) if row.benchmark == benchmark]
    return BenchmarkTable(
        name=benchmark,
        options=str(options or benchmark),
        item_count=int(scores.get("items", 0)),
        models=models,
        rows=rows,
        more_rows=more_rows,
        coverage=coverage,
        lead_of_best=_lead_of_best(same, coverage, resamples),
        drawing=_coverage_drawing(same, benchmark, colours) if coverage else None,
        notes=_notes(benchmark, evaluations),
    )


def _notes(benchmark: str, evaluations: Sequence[Evaluation]) -> list[str]:
    judge = evaluations[0].judge(benchmark)
    notes = [f"Judge: {judge}."] if judge else []
    for evaluation in evaluations:
        scores = evaluation.scores["benchmarks"][benchmark]
        if not scores.get("complete", True):
            parts = [f"{part} {count['graded']:,} of {count['asked']:,}" for part, count in scores.get("parts", {}).items()]
            notes.append(f"{evaluation.name} is not complete: {', '.join(parts)}.")
        figures = scores.get("tools", {}).get("figures", "")
        if figures.startswith("not"):
            notes.append(f"{evaluation.name}: {figures}.")
    return notes


def _lead_of_best(evaluations: Sequence[Evaluation], coverage: Sequence[Coverage], resamples: int) -> Coverage | None:
    """The lowest CHAIRi at equal coverage, compared with the next lowest; the other models still decide how much is cut.

    None unless at least three models have a CHAIRi: of a model that names nothing it is 0 of 0.
    """
    if sum(not math.isnan(row.chair_i.value) for row in coverage) < 3:
        return None
    best, second, *others = sorted(range(len(coverage)), key=lambda number: _nan_last(coverage[number].chair_i.value))
    reordered = [evaluations[number] for number in (second, best, *others)]  # the first is what others are compared with
    rows = at_equal_coverage(reordered, resamples=resamples)
    return next(row for row in rows if row.benchmark == coverage[0].benchmark and row.model == coverage[best].model)


def _nan_last(value: float) -> float:
    return math.inf if math.isnan(value) else value


def _coverage_drawing(evaluations: Sequence[Evaluation], benchmark: str, colours: Mapping[str, int]) -> Markup:
    lines = []
    for name, (cover, chair_i) in coverage_curves(evaluations, benchmark).items():
        lines.append(Series(cover, chair_i, colours[name]))
    description = "CHAIRi over Cover, one line per model, as captions are cut after one object, two objects and so on"
    return curves(lines, x="Cover, %", y="CHAIRi, %", description=description, markers=True)
