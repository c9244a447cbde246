"""The results of a study: a row per method over its seeds, with intervals; as Markdown, LaTeX, CSV and Parquet.

Two kinds of 95 % intervals: of the mean over training seeds (Student's t), and of the difference to the reference row over
pictures (paired bootstrap, averaged over seeds). Reads finished cells; runs nothing.
"""

from __future__ import annotations

import csv
import io
import math
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from catpo.core.errors import UserError
from catpo.core.intervals import mean_interval
from catpo.evaluation.bootstrap import Estimate
from catpo.evaluation.coverage import Coverage, at_cover_over_runs, at_equal_coverage, at_equal_coverage_over_runs
from catpo.evaluation.folder import Evaluation, load_evaluation
from catpo.experiments.study.cells import DONE, Cell
from catpo.experiments.study.file import Study
from catpo.files.atomic import write_atomic
from catpo.files.json_files import read_json
from catpo.text.tables import Fitting, fitting, for_csv, for_markdown, latex_table, markdown_table

EQUAL, EQUAL_HEADING = "equal_coverage", "CHAIRi at equal Cover"
LEAST_COVER = 0.5
"""Share of the largest Cover below which a model is left out at equal Cover: all others would be cut to its few words."""
SCENES = {"CHAIRi": "chair_i", "CHAIRs": "chair_s", "Cover": "cover", "Cog": "cog", "words": "words"}
"""Columns for benchmarks that have these metrics, where a study names none."""


@dataclass(frozen=True)
class Result:
    """One row of the table."""

    name: str
    rate: float | None
    """The learning rate chosen; None where nothing is trained."""
    cells: Mapping[int, Cell]
    """Seed -> finished cell."""
    values: Mapping[str, Mapping[int, float]] = field(default_factory=dict)
    """Metric -> seed -> value."""
    difference: Estimate | None = None
    """CHAIRi at equal Cover minus that of the reference row, over pictures."""
    ratios: Mapping[float, Estimate] = field(default_factory=dict)
    """Cover in percent -> CHAIRi there divided by that of the reference row, over pictures."""

    def mean(self, metric: str) -> Estimate:
        """Mean over seeds with its interval; NaN without values."""
        values = [value for value in self.values.get(metric, {}).values() if not math.isnan(value)]
        return Estimate(statistics.fmean(values) if values else math.nan, *mean_interval(values))


@dataclass(frozen=True)
class Results:
    """The whole table."""

    study: Study
    rows: list[Result]
    notes: list[str] = field(default_factory=list)
    """What failed, and what is left out."""

    @property
    def metrics(self) -> list[str]:
        """All metrics that any row has."""
        return list(dict.fromkeys(metric for row in self.rows for metric in row.values))

    @property
    def columns(self) -> dict[str, str]:
        """Heading -> metric."""
        known = self.metrics
        if self.study.columns:
            return {heading: full_name(metric, known) for heading, metric in self.study.columns.items()}
        columns = {heading: full_name(metric, known) for heading, metric in SCENES.items() if _matches(metric, known)}
        if not columns:
            columns = {metric: metric for metric in known if metric != EQUAL}
        fixed = {f"CHAIRi at Cover {cover:g}": _at(cover) for cover in self.study.at_cover if _at(cover) in known}
        return columns | ({EQUAL_HEADING: EQUAL} if EQUAL in known else {}) | fixed

    @property
    def covers(self) -> list[float]:
        """At which Covers rows are compared."""
        return sorted({cover for row in self.rows for cover in row.ratios})

    def row(self, name: str) -> Result | None:
        return next((row for row in self.rows if row.name == name), None)


def collect(study: Study, output: Path, cells: Mapping[str, Mapping[int, Cell]], rates: Mapping[str, float | None]) -> Results:
    """The table of a study's finished cells: row -> seed -> cell."""
    evaluations: dict[str, dict[int, Evaluation]] = {}
    for name, by_seed in cells.items():
        evaluations[name] = {seed: evaluation_of(cell, output, name) for seed, cell in by_seed.items() if cell.benchmarks}
    equal, differences, notes = _equal_coverage(study, evaluations)
    fixed, ratios, short = _at_covers(study, evaluations)
    rows = []
    for name, by_seed in cells.items():
        values: dict[str, dict[int, float]] = {}
        for seed, cell in by_seed.items():
            figures = read_json(cell.folder(output) / DONE).get("figures", {})
            for metric, value in {**figures, **metrics_of(evaluations[name].get(seed))}.items():
                values.setdefault(metric, {})[seed] = float(value)
        if name in equal:
            values[EQUAL] = equal[name]
        values |= fixed.get(name, {})
        rows.append(Result(name, rates.get(name), by_seed, values, differences.get(name), ratios.get(name, {})))
    return Results(study, rows, notes + short)


def evaluation_of(cell: Cell, output: Path, name: str) -> Evaluation:
    return load_evaluation(cell.folder(output) / "evaluation", name=name)


def metrics_of(evaluation: Evaluation | None) -> dict[str, float]:
    """`scenes/chair_i` -> value."""
    values: dict[str, float] = {}
    if evaluation is None:
        return values
    for benchmark in evaluation.benchmarks:
        for metric, estimate in evaluation.metrics(benchmark).items():
            values[f"{benchmark}/{metric}"] = estimate.value
    return values


# ---- equal coverage -------------------------------------------------------------------------------------------------------


def _equal_coverage(
    study: Study, evaluations: Mapping[str, Mapping[int, Evaluation]]
) -> tuple[dict[str, dict[int, float]], dict[str, Estimate], list[str]]:
    """Row -> seed -> CHAIRi at equal Cover; row -> difference to the reference row; notes on rows left out."""
    complete = _complete(study, evaluations)
    names, left_out = _with_enough_cover(complete)
    has_reference = study.compared_with in names
    if len(names) < 2:
        return {}, {}, []
    runs = [[complete[name][seed] for name in names] for seed in study.seeds]
    values: dict[str, dict[int, float]] = {}
    for seed, run in zip(study.seeds, runs, strict=True):
        for row in first_captions(at_equal_coverage(run, resamples=1)):
            values.setdefault(row.model, {})[seed] = row.chair_i.value
    differences = {}
    for row in first_captions(at_equal_coverage_over_runs(runs)):
        if has_reference and row.difference is not None:
            differences[row.model] = row.difference
    notes = [
        f"{name} covers less than {LEAST_COVER:.0%} of what others do and is left out at equal Cover." for name in left_out
    ]
    return values, differences, notes if values else []


def _complete(study: Study, evaluations: Mapping[str, Mapping[int, Evaluation]]) -> dict[str, Mapping[int, Evaluation]]:
    """The rows with all seeds; the reference row comes first, since comparisons take the first as their base."""
    complete: dict[str, Mapping[int, Evaluation]] = {}
    for name, by_seed in evaluations.items():
        if by_seed.keys() >= set(study.seeds):
            complete[name] = {seed: by_seed[seed] for seed in study.seeds}
    first = [study.compared_with] if study.compared_with in complete else []
    return {name: complete[name] for name in [*first, *complete]}


def _at(cover: float) -> str:
    """The metric: CHAIRi with captions cut at this Cover."""
    return f"chair_i_at_{cover:g}"


def _at_covers(
    study: Study, evaluations: Mapping[str, Mapping[int, Evaluation]]
) -> tuple[dict[str, dict[str, dict[int, float]]], dict[str, dict[float, Estimate]], list[str]]:
    """Row -> metric -> seed -> CHAIRi at each Cover asked for; row -> Cover -> ratio to the reference row; who falls short.

    A row has a value only where all of its seeds reach the Cover: a mean over those that do would favour rows that lose it.
    """
    complete = _complete(study, evaluations)
    if study.compared_with not in complete:
        return {}, {}, []
    runs = [[by_seed[seed] for by_seed in complete.values()] for seed in study.seeds]
    values: dict[str, dict[str, dict[int, float]]] = {}
    ratios: dict[str, dict[float, Estimate]] = {}
    notes = []
    for cover in study.at_cover:
        for row in at_cover_over_runs(runs, cover):
            short = [str(seed) for seed, value in zip(study.seeds, row.chair_i, strict=True) if math.isnan(value)]
            if short:
                notes.append(f"{row.model} does not reach Cover {cover:g} with seed {', '.join(short)} and has no value there.")
                continue
            values.setdefault(row.model, {})[_at(cover)] = dict(zip(study.seeds, row.chair_i, strict=True))
            if row.ratio is not None:
                ratios.setdefault(row.model, {})[cover] = row.ratio
    return values, ratios, notes


def first_captions(rows: Sequence[Coverage]) -> list[Coverage]:
    """The rows of the first benchmark that has captions."""
    return [row for row in rows if row.benchmark == rows[0].benchmark]


def _with_enough_cover(evaluations: Mapping[str, Mapping[int, Evaluation]]) -> tuple[list[str], list[str]]:
    """Names that can be compared at equal Cover, and those that cover too little; names without captions are in neither."""
    means = {}
    for name, by_seed in evaluations.items():
        mean = statistics.fmean(covered(evaluation) for evaluation in by_seed.values())
        if not math.isnan(mean):
            means[name] = mean
    least = LEAST_COVER * max(means.values(), default=0.0)
    enough = [name for name, mean in means.items() if mean >= least]
    return enough, [name for name in means if name not in enough]


def covered(evaluation: Evaluation) -> float:
    """Cover of the first benchmark that has it; NaN if none has."""
    for name in evaluation.benchmarks:
        metrics = evaluation.metrics(name)
        if "cover" in metrics:
            return metrics["cover"].value
    return math.nan


def _matches(metric: str, known: Sequence[str]) -> list[str]:
    return [name for name in known if name == metric or name.endswith(f"/{metric}")]


def full_name(metric: str, known: Sequence[str]) -> str:
    """A metric by its name or the end of it: `chair_i` is `scenes/chair_i`. Returned unchanged if it is unknown.

    Raises:
        UserError: several benchmarks have it.
    """
    matches = _matches(metric, known)
    if metric in matches or not matches:
        return metric
    if len({name.split("/")[0] for name in matches}) > 1:
        raise UserError(f"metric '{metric}' is in {', '.join(matches)}. Give one of these full names.")
    return min(matches, key=len)


# ---- files ----------------------------------------------------------------------------------------------------------------


def write_tables(results: Results, folder: Path) -> None:
    """`table.md`, `table.tex`, `table.csv`, and `values.parquet` with the value of every seed."""
    write_atomic(folder / "table.md", as_markdown(results))
    write_atomic(folder / "table.tex", as_latex(results))
    write_atomic(folder / "table.csv", as_csv(results))
    write_atomic(folder / "values.parquet", _as_parquet(results))


def table_of(results: Results) -> tuple[list[str], list[list[str]]]:
    """Headings, and rows as text."""
    with_rates = any(row.rate is not None for row in results.rows)
    with_differences = any(row.difference is not None for row in results.rows)
    columns = results.columns
    headings = ["", *(["learning rate"] if with_rates else []), *columns]
    if with_differences:
        headings.append(f"Δ vs {results.study.compared_with}")
    headings += [f"÷ {results.study.compared_with} at Cover {cover:g}" for cover in results.covers]
    rows = []
    for row in results.rows:
        cells = [row.name, *([_rate(row.rate)] if with_rates else [])]
        cells += [_mean(row.mean(metric)) for metric in columns.values()]
        if with_differences:
            cells.append(_difference(row.difference))
        cells += [_ratio(row.ratios.get(cover)) for cover in results.covers]
        rows.append(cells)
    return headings, rows


def results_table(results: Results) -> Fitting:
    """The same for the terminal."""
    headings, rows = table_of(results)
    return fitting(headings, rows, title=results.study.title)


def footnotes(results: Results) -> list[str]:
    """How to read the numbers."""
    seeds = len(results.study.seeds)
    notes = ["One seed, so no interval over seeds."]
    if seeds > 1:
        notes = [f"Mean over {seeds} seeds ± half the width of its 95 % interval (Student's t)."]
    if any(row.difference is not None for row in results.rows):
        notes.append(
            "Δ: difference in CHAIRi at equal Cover, with 95 % intervals over pictures (paired bootstrap); * excludes 0."
        )
    if any(row.ratios for row in results.rows):
        notes.append("÷: ratio of CHAIRi at the same Cover, both averaged over seeds, with 95 % intervals over pictures.")
    if results.study.note:
        notes.append(results.study.note)
    return notes + results.notes


def as_markdown(results: Results) -> str:
    headings, rows = table_of(results)
    notes = "".join(f"\n\n{for_markdown(note)}" for note in footnotes(results))
    return f"# {for_markdown(results.study.title)}\n\n{markdown_table(headings, rows)}\n{notes[1:]}\n"


def as_latex(results: Results) -> str:
    headings, rows = table_of(results)
    table = latex_table(headings, rows, notes=[results.study.title, *footnotes(results)])
    return table.replace("Δ", r"$\Delta$") + "\n"


def as_csv(results: Results) -> str:
    """Every metric in full: value, low, high."""
    metrics = list(dict.fromkeys([*results.columns.values(), *results.metrics]))
    headings = ["row", "objective", "learning_rate", "seeds"]
    for name in (*metrics, "difference", *(f"ratio_at_{cover:g}" for cover in results.covers)):
        headings += [name, f"{name}_low", f"{name}_high"]
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(headings)
    for row in results.rows:
        numbers: list[float] = []
        for metric in metrics:
            numbers += row.mean(metric)
        for change in (row.difference, *(row.ratios.get(cover) for cover in results.covers)):
            numbers += change or [math.nan] * 3
        objective = results.study.rows[row.name].objective or ""
        rate = "" if row.rate is None else f"{row.rate:g}"
        texts = ["" if math.isnan(number) else f"{number:.6g}" for number in numbers]
        writer.writerow([for_csv(row.name), for_csv(objective), rate, len(row.cells), *texts])
    return stream.getvalue()


def _as_parquet(results: Results) -> bytes:
    """One line per row, metric and seed."""
    lines = []
    for row in results.rows:
        for metric, by_seed in row.values.items():
            for seed, value in by_seed.items():
                lines.append({"row": row.name, "metric": metric, "seed": seed, "value": value})
    schema = pa.schema({"row": pa.string(), "metric": pa.string(), "seed": pa.int64(), "value": pa.float64()})
    stream = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(lines, schema=schema), stream)
    return stream.getvalue()


def _rate(rate: float | None) -> str:
    return "-" if rate is None else re.sub(r"e([-+])0", r"e\1", f"{rate:.3g}")


def half_width(mean: Estimate) -> float | None:
    """Half of the interval; None for a single seed, or where all seeds agree."""
    half = mean.high - mean.value
    return None if math.isnan(half) or half < 1e-9 else half


def _mean(mean: Estimate) -> str:
    if math.isnan(mean.value):
        return "-"
    half = half_width(mean)
    return _number(mean.value) if half is None else f"{_number(mean.value)} ± {_number(half)}"


def _number(value: float) -> str:
    """With one decimal, or three digits for a small number."""
    if abs(value) >= 10 or value == 0:
        return f"{value:.1f}"
    return f"{value:.3g}" if abs(value) < 1 else f"{value:.2f}"


def _difference(change: Estimate | None) -> str:
    if change is None:
        return "-"
    star = "*" if change.low > 0 or change.high < 0 else ""
    return f"{change.value:+.1f} [{change.low:+.1f}, {change.high:+.1f}]{star}"


def _ratio(change: Estimate | None) -> str:
    return "-" if change is None else f"{change.value:.2f} [{change.low:.2f}, {change.high:.2f}]"
