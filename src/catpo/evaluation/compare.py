"""`catpo compare`: evaluations side by side, as a table for the terminal, for Markdown or for LaTeX. Needs no model.

Every metric of the first evaluation, and the difference of each other on the same items, with its 95 % interval: models are
resampled with the same pictures.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.table import Table

from catpo.core.checks import check_positive
from catpo.core.errors import UserError
from catpo.evaluation.folder import Evaluation, load_evaluation
from catpo.evaluation.paired import Difference, incomparable, paired_differences
from catpo.text.tables import Fitting, for_markdown, for_terminal, latex_table, markdown_table, one_line, table_of

Format = Literal["terminal", "markdown", "latex"]
CLEAR = "* the interval excludes 0"


@dataclass(frozen=True)
class SideBySide:
    """Evaluations compared with the first."""

    names: list[str]
    """The first is the base."""
    rows: list[tuple[str, str, list[Difference | None]]]
    """Benchmark, metric, and the difference of each other evaluation; None where the two cannot be compared."""
    notes: list[str]
    """What a reader must know: what could not be compared, and why; incomplete evaluations."""


def compare(evaluations: Sequence[str | Path], *, limit: int | None = None) -> SideBySide:
    """Paired differences of finished evaluations, each from the first.

    Args:
        evaluations: two or more folders that `catpo evaluate` wrote.
        limit: only the first N pictures of each benchmark.

    Raises:
        UserError: fewer than two are given, one is not finished, or they have nothing in common.
    """
    if len(evaluations) < 2:
        raise UserError("one evaluation cannot be compared. Give two or more folders: `catpo compare A B`.")
    check_positive(limit=limit)
    base, *others = (load_evaluation(path, name=name) for path, name in zip(evaluations, _names(evaluations), strict=True))
    rows: dict[tuple[str, str], list[Difference | None]] = {}
    for index, other in enumerate(others):
        for difference in paired_differences(base, other, limit=limit):
            row = rows.setdefault((difference.benchmark, difference.metric), [None] * len(others))
            row[index] = difference
    notes = _notes(base, others)
    if not rows:
        raise UserError(f"nothing can be compared. {' '.join(notes)}")
    names = [evaluation.name for evaluation in (base, *others)]
    return SideBySide(names, [(*key, differences) for key, differences in rows.items()], notes)


def _names(folders: Sequence[str | Path]) -> list[str]:
    """The folders' names, with their parents' where two have the same."""
    paths = [Path(folder).resolve() for folder in folders]
    names = [path.name for path in paths]
    return [f"{path.parent.name}/{path.name}" if names.count(path.name) > 1 else path.name for path in paths]


def _notes(base: Evaluation, others: Sequence[Evaluation]) -> list[str]:
    notes = []
    for other in others:
        for benchmark in dict.fromkeys([*base.benchmarks, *other.benchmarks]):
            reason = incomparable(base, other, benchmark)
            if reason:
                notes.append(f"{benchmark}: {other.name} cannot be compared with {base.name}: {reason}.")
    for evaluation in (base, *others):
        for benchmark, scores in evaluation.scores["benchmarks"].items():
            if not scores.get("complete", True):
                notes.append(f"{benchmark} of {evaluation.name} is not complete; only items that both have are compared.")
    return notes


def show(sides: SideBySide, format: Format) -> str:
    """The comparison as text."""
    headings, rows = _cells(sides)
    if format == "latex":
        return latex_table(headings, rows, left=2, notes=[CLEAR, *sides.notes])
    if format == "markdown":
        notes = [f"\n{for_markdown(note)}" for note in sides.notes]
        return "\n".join([markdown_table(headings, rows, left=2), "", f"\\{CLEAR}", *notes])
    wide = table_of(*headings, texts=2)
    for row in rows:
        wide.add_row(*map(for_terminal, row))
    console = Console()
    with console.capture() as captured:
        console.print(Fitting(wide, _narrow(sides, rows)))
    return captured.get() + "\n".join([CLEAR, *map(one_line, sides.notes)])


def _cells(sides: SideBySide) -> tuple[list[str], list[list[str]]]:
    """Headings, and rows as text: base, then value and difference of each other."""
    base, *others = sides.names
    headings = ["benchmark", "metric", base]
    for name in others:
        headings += [name, f"{name} - {base}"]
    rows = []
    for benchmark, metric, differences in sides.rows:
        values = [difference.base for difference in differences if difference is not None]
        row = [benchmark, metric, _number(values[0])]
        for difference in differences:
            row += ["-", "-"] if difference is None else [_number(difference.other), _change(difference)]
        rows.append(row)
    return headings, rows


def _narrow(sides: SideBySide, rows: list[list[str]]) -> Table:
    """A block for each metric, with a line for each evaluation: its value, and the difference from the base."""
    base, *others = sides.names
    table = table_of("", "", f"difference from {base}", is_plain=True)
    for benchmark, metric, of_base, *cells in rows:
        table.add_row(for_terminal(f"{benchmark} {metric}"), style="bold")
        table.add_row(for_terminal(f"  {base}"), of_base)
        for name, value, change in zip(others, cells[::2], cells[1::2], strict=True):
            table.add_row(for_terminal(f"  {name}"), value, for_terminal(change))
    return table


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.2f}"


def _change(difference: Difference) -> str:
    value, low, high = difference.difference
    if math.isnan(value):
        return "-"
    return f"{value:+.2f} [{low:+.2f}, {high:+.2f}]{'*' if difference.is_clear else ''}"
