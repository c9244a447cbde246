"""What a study found: a row per method over its seeds, with intervals, at equal coverage; as Markdown, LaTeX, CSV and Parquet.

Two kinds of intervals, both 95 %: of the mean over training seeds (Student's t), and of the difference to the row of reference
over pictures (paired bootstrap, averaged over seeds). Reads finished cells; runs nothing.
"""

from __future__ import annotations

import csv
import io
import math
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from catpo.core.errors import UserError
from catpo.core.intervals import mean_interval
from catpo.evaluation.bootstrap import Estimate
from catpo.evaluation.coverage import Coverage, at_equal_coverage, at_equal_coverage_over_runs
from catpo.evaluation.folder import Evaluation, load_evaluation
from catpo.experiments.study.cells import DONE, Cell
from catpo.experiments.study.file import Study
from catpo.files.atomic import write_atomic
from catpo.files.json_files import read_json
from catpo.text.tables import for_markdown, latex_table, markdown_table

EQUAL = "equal_coverage"
"""The column of CHAIRi at equal Cover."""
LEAST_COVER = 0.5
"""A model that covers less than this share of what the most covering one does has no place at equal Cover: all would be cut to
its few words."""
SCENES = {"CHAIRi": "chair_i", "CHAIRs": "chair_s", "Cover": "cover", "Cog": "cog", "words": "words"}
"""Columns where a study names none and its benchmark has them."""
HEADINGS = {EQUAL: "CHAIRi at equal Cover"}


class Spread(NamedTuple):
    """Mean over seeds with its interval."""

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        known = [value for value in values if not math.isnan(value)]
        if not known:
            return cls(math.nan, math.nan, math.nan)
        return cls(statistics.fmean(known), *mean_interval(known))


@dataclass(frozen=True)
class Result:
    """One row of the table."""

    name: str
    rate: float | None
    """The learning rate that was chosen; None where nothing is trained."""
    cells: Mapping[int, Cell]
    """Seed -> its finished cell."""
    values: Mapping[str, Mapping[int, float]] = field(default_factory=dict)
    """Metric -> seed -> value."""
    difference: Estimate | None = None
    """CHAIRi at equal Cover, less that of the row of reference, over pictures."""

    def spread(self, metric: str) -> Spread:
        return Spread.of(self.values.get(metric, {}).values())


@dataclass(frozen=True)
class Results:
    """The whole table."""

    study: Study
    rows: list[Result]
    columns: Mapping[str, str]
    """Heading -> metric."""
    notes: list[str] = field(default_factory=list)
    """What a reader must know: what failed, what is left out."""

    def row(self, name: str) -> Result | None:
        return next((row for row in self.rows if row.name == name), None)


def results(study: Study, output: Path, cells: Mapping[str, Mapping[int, Cell]], rates: Mapping[str, float | None]) -> Results:
    """The table of a study's finished cells: row -> seed -> cell."""
    loaded = {name: {seed: _evaluation(cell, output, name) for seed, cell in of.items()} for name, of in cells.items()}
    equal, differences, notes = _equal_coverage(study, loaded)
    rows = []
    for name, of in cells.items():
        values: dict[str, dict[int, float]] = {}
        for seed, cell in of.items():
            for metric, value in {**_figures(cell, output), **_metrics(loaded[name][seed])}.items():
                values.setdefault(metric, {})[seed] = value
        if name in equal:
            values[EQUAL] = equal[name]
        rows.append(Result(name, rates.get(name), of, values, differences.get(name)))
    known = list(dict.fromkeys(metric for row in rows for metric in row.values))
    return Results(study, rows, _columns(study, known), notes)


def _evaluation(cell: Cell, output: Path, name: str) -> Evaluation | None:
    return load_evaluation(cell.folder(output) / "evaluation", name=name) if cell.benchmarks else None


def _metrics(evaluation: Evaluation | None) -> dict[str, float]:
    """`scenes/chair_i` -> value."""
    if evaluation is None:
        return {}
    return {
        f"{name}/{metric}": each.value for name in evaluation.benchmarks for metric, each in evaluation.metrics(name).items()
    }


def _figures(cell: Cell, output: Path) -> dict[str, float]:
    """What a cell itself has to say: time, memory, log-probs, learned coefficients."""
    return {str(name): float(value) for name, value in read_json(cell.folder(output) / DONE).get("figures", {}).items()}


# ---- equal coverage -------------------------------------------------------------------------------------------------------


def _equal_coverage(
    study: Study, loaded: Mapping[str, Mapping[int, Evaluation | None]]
) -> tuple[dict[str, dict[int, float]], dict[str, Estimate], list[str]]:
    """Row -> seed -> CHAIRi at equal Cover; row -> difference to the row of reference; notes on rows left out."""
    complete = {name: [found for seed in study.seeds if (found := of.get(seed)) is not None] for name, of in loaded.items()}
    complete = {name: found for name, found in complete.items() if len(found) == len(study.seeds)}
    names, left_out = _with_enough_cover(complete)
    if study.compared_with in names:
        names = [study.compared_with, *(name for name in names if name != study.compared_with)]
    if len(names) < 2:
        return {}, {}, []
    runs = [[complete[name][place] for name in names] for place in range(len(study.seeds))]
    values: dict[str, dict[int, float]] = {}
    for seed, run in zip(study.seeds, runs, strict=True):
        for row in _of_captions(at_equal_coverage(run, resamples=1)):
            values.setdefault(row.model, {})[seed] = row.chair_i.value
    differences = {
        row.model: row.difference
        for row in _of_captions(at_equal_coverage_over_runs(runs))
        if row.difference is not None and names[0] == study.compared_with
    }
    notes = [
        f"{name} covers less than {LEAST_COVER:.0%} of what others do and is left out at equal Cover." for name in left_out
    ]
    return values, differences, notes if values else []


def _of_captions(rows: Sequence[Coverage]) -> list[Coverage]:
    """Those of the first benchmark that has captions."""
    return [row for row in rows if row.benchmark == rows[0].benchmark]


def _with_enough_cover(evaluations: Mapping[str, Sequence[Evaluation]]) -> tuple[list[str], list[str]]:
    """Names that can be compared at equal Cover, and those that say too little."""
    covers = {name: [covered(each) for each in found] for name, found in evaluations.items()}
    means = {name: statistics.fmean(values) for name, values in covers.items() if not any(map(math.isnan, values))}
    most = max(means.values(), default=0.0)
    enough = [name for name, value in means.items() if value >= LEAST_COVER * most]
    return enough, [name for name in means if name not in enough]


def covered(evaluation: Evaluation) -> float:
    """Cover of the first benchmark that has it; NaN if none has."""
    found = [metrics["cover"].value for name in evaluation.benchmarks if "cover" in (metrics := evaluation.metrics(name))]
    return found[0] if found else math.nan


# ---- columns --------------------------------------------------------------------------------------------------------------


def _columns(study: Study, known: Sequence[str]) -> dict[str, str]:
    if study.columns:
        return {heading: full_name(metric, known) for heading, metric in study.columns.items()}
    of_scenes = {heading: full_name(metric, known) for heading, metric in SCENES.items() if _matches(metric, known)}
    found = of_scenes or {metric: metric for metric in known if metric != EQUAL}
    return found | ({HEADINGS[EQUAL]: EQUAL} if EQUAL in known else {})


def _matches(metric: str, known: Sequence[str]) -> list[str]:
    return [name for name in known if name == metric or name.endswith(f"/{metric}")]


def full_name(metric: str, known: Sequence[str]) -> str:
    """A metric by its name or the end of it: `chair_i` is `scenes/chair_i`. Where nothing has it yet, the name as it is.

    Raises:
        UserError: several have it.
    """
    found = _matches(metric, known)
    if metric in found or not found:
        return metric
    if len({name.split("/")[0] for name in found}) > 1:
        raise UserError(f"metric '{metric}' is in {', '.join(found)}. Name one of them in full.")
    return min(found, key=len)


# ---- files ----------------------------------------------------------------------------------------------------------------


def write_tables(found: Results, folder: Path) -> None:
    """`table.md`, `table.tex`, `table.csv`, and `values.parquet` with the value of every seed."""
    write_atomic(folder / "table.md", as_markdown(found))
    write_atomic(folder / "table.tex", as_latex(found))
    write_atomic(folder / "table.csv", as_csv(found))
    write_atomic(folder / "values.parquet", _as_parquet(found))


def cells_of(found: Results) -> tuple[list[str], list[list[str]]]:
    """Headings, and rows as text."""
    with_rates = any(row.rate is not None for row in found.rows)
    with_differences = any(row.difference is not None for row in found.rows)
    headings = ["", *(["learning rate"] if with_rates else []), *found.columns]
    headings += [f"less that of {found.study.compared_with}"] if with_differences else []
    rows = []
    for row in found.rows:
        cells = [row.name, *([_rate(row.rate)] if with_rates else [])]
        cells += [_spread(row.spread(metric)) for metric in found.columns.values()]
        rows.append(cells + ([_difference(row.difference)] if with_differences else []))
    return headings, rows


def footnotes(found: Results) -> list[str]:
    """What the numbers are."""
    seeds = len(found.study.seeds)
    said = [
        f"Mean over {seeds} seeds ± half of its 95 % interval (Student's t)."
        if seeds > 1
        else "One seed: no interval over seeds."
    ]
    if any(row.difference is not None for row in found.rows):
        said.append(
            "Differences are of CHAIRi at equal Cover, with 95 % intervals over pictures (paired bootstrap); * leaves 0 out."
        )
    return [*said, *([found.study.note] if found.study.note else []), *found.notes]


def as_markdown(found: Results) -> str:
    headings, rows = cells_of(found)
    notes = [f"\n{for_markdown(note)}" for note in footnotes(found)]
    return "\n".join([f"# {for_markdown(found.study.title)}", "", markdown_table(headings, rows), *notes]) + "\n"


def as_latex(found: Results) -> str:
    headings, rows = cells_of(found)
    return latex_table(headings, rows, notes=[found.study.title, *footnotes(found)]) + "\n"


def as_csv(found: Results) -> str:
    """Every metric in full: value, low, high."""
    metrics = list(dict.fromkeys([*found.columns.values(), *(metric for row in found.rows for metric in row.values)]))
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    names = [f"{metric}{end}" for metric in metrics for end in ("", "_low", "_high")]
    writer.writerow(
        ["row", "objective", "learning_rate", "seeds", *names, *(f"difference{end}" for end in ("", "_low", "_high"))]
    )
    for row in found.rows:
        spreads = [number for metric in metrics for number in row.spread(metric)]
        difference = row.difference or Estimate(math.nan, math.nan, math.nan)
        objective = found.study.rows[row.name].objective or ""
        numbers = ["" if math.isnan(each) else f"{each:.6g}" for each in (*spreads, *difference)]
        writer.writerow([row.name, objective, "" if row.rate is None else f"{row.rate:g}", len(row.cells), *numbers])
    return stream.getvalue()


def _as_parquet(found: Results) -> bytes:
    """One line per row, metric and seed."""
    lines: dict[str, list[Any]] = {"row": [], "metric": [], "seed": [], "value": []}
    for row in found.rows:
        for metric, by_seed in row.values.items():
            for seed, value in by_seed.items():
                for name, each in zip(lines, (row.name, metric, seed, value), strict=True):
                    lines[name].append(each)
    stream = io.BytesIO()
    pq.write_table(pa.table(lines), stream)
    return stream.getvalue()


def _rate(rate: float | None) -> str:
    return "-" if rate is None else re.sub(r"e([-+])0", r"e\1", f"{rate:.3g}")


def _spread(spread: Spread) -> str:
    if math.isnan(spread.value):
        return "-"
    half = spread.high - spread.value  # nothing for one seed, or where no seed counts
    return _number(spread.value) if math.isnan(half) or half < 1e-9 else f"{_number(spread.value)} ± {_number(half)}"


def _number(value: float) -> str:
    """One place after the point, or three digits of a small number."""
    return f"{value:.1f}" if abs(value) >= 10 or value == 0 else f"{value:.3g}" if abs(value) < 1 else f"{value:.2f}"


def _difference(change: Estimate | None) -> str:
    if change is None:
        return "-"
    star = "*" if change.low > 0 or change.high < 0 else ""
    return f"{change.value:+.1f} [{change.low:+.1f}, {change.high:+.1f}]{star}"
