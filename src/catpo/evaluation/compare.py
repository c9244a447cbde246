"""`catpo compare`: evaluations side by side, as a table for the terminal, for Markdown or for LaTeX. Needs no model.

Every metric of the first evaluation, and what the others have more or less on the same items, with a 95 % interval of that
difference: models are resampled with the same pictures.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from catpo.core.errors import UserError
from catpo.evaluation.bootstrap import Estimate
from catpo.evaluation.folder import Evaluation, load_evaluation
from catpo.evaluation.paired import Difference, incomparable, paired_differences
from catpo.text.tables import for_markdown, latex_table, markdown_table
from catpo.text.words import plain

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
    """What a reader must know: what could not be compared, and why; evaluations in part."""


def compare(evaluations: Sequence[str | Path], *, limit: int | None = None) -> SideBySide:
    """Paired differences of finished evaluations, each against the first.

    Args:
        evaluations: two or more folders that `catpo evaluate` wrote.
        limit: only the first so many pictures of each benchmark.

    Raises:
        UserError: fewer than two are given, one is not finished, or they have nothing in common.
    """
    if len(evaluations) < 2:
        raise UserError("one evaluation is nothing to compare. Give two or more folders: `catpo compare A B`.")
    if limit is not None and limit < 1:
        raise UserError(f"limit={limit} must be 1 or more.")
    base, *others = (load_evaluation(path, name=name) for path, name in zip(evaluations, _names(evaluations), strict=True))
    found = [{(row.benchmark, row.metric): row for row in paired_differences(base, other, limit=limit)} for other in others]
    keys = dict.fromkeys(key for rows in found for key in rows)
    if not keys:
        raise UserError(f"nothing can be compared. {' '.join(_notes(base, others))}")
    rows = [(*key, [each.get(key) for each in found]) for key in keys]
    return SideBySide([each.name for each in (base, *others)], rows, _notes(base, others))


def show(sides: SideBySide, format: Format) -> str:
    """The comparison as text."""
    return {"terminal": _terminal, "markdown": _markdown, "latex": _latex}[format](sides)


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
            notes += [f"{benchmark}: {other.name} cannot be compared with {base.name}: {reason}."] if reason else []
    for each in (base, *others):
        parts = [name for name, scores in each.scores["benchmarks"].items() if not scores.get("complete", True)]
        notes += [f"{name} of {each.name} is not complete; only items that both have are compared." for name in parts]
    return notes


def _cells(sides: SideBySide) -> tuple[list[str], list[list[str]]]:
    """Headings, and rows as text: base, then value and difference of each other."""
    base, *others = sides.names
    headings = ["benchmark", "metric", base, *(heading for name in others for heading in (name, f"{name} - {base}"))]
    rows = []
    for benchmark, metric, differences in sides.rows:
        first = next(each for each in differences if each is not None)
        row = [benchmark, metric, _number(first.base)]
        for each in differences:
            row += ["-", "-"] if each is None else [_number(each.other), _change(each.difference, is_clear=each.is_clear)]
        rows.append(row)
    return headings, rows


def _terminal(sides: SideBySide) -> str:
    headings, rows = _cells(sides)
    table = Table(*headings[:2])
    for heading in headings[2:]:
        table.add_column(escape(plain(heading)), justify="right")
    for row in rows:
        table.add_row(*(escape(plain(cell)) for cell in row))
    console = Console()
    with console.capture() as captured:
        console.print(table)
    return captured.get() + "\n".join([CLEAR, *map(plain, sides.notes)])


def _markdown(sides: SideBySide) -> str:
    headings, rows = _cells(sides)
    notes = [f"\n{for_markdown(note)}" for note in sides.notes]
    return "\n".join([markdown_table(headings, rows, left=2), "", f"\\{CLEAR}", *notes])


def _latex(sides: SideBySide) -> str:
    headings, rows = _cells(sides)
    return latex_table(headings, rows, left=2, notes=[CLEAR, *sides.notes])


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.2f}"


def _change(change: Estimate, *, is_clear: bool) -> str:
    if math.isnan(change.value):
        return "-"
    return f"{change.value:+.2f} [{change.low:+.2f}, {change.high:+.2f}]{'*' if is_clear else ''}"
