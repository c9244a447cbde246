"""Results as tables for the terminal. Knows nothing of how they were computed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from rich.markup import escape
from rich.table import Table

from catpo.rewards.quality import Separation, SignalQuality, measured
from catpo.text.words import plain


def quality_table(rows: Sequence[SignalQuality], pair_count: int) -> Table:
    """AUROC of each signal for grounded against hallucinated object tokens in a store of so many pairs; 95 % intervals."""
    counts = rows[0].overall if rows else None
    found = (
        f"{counts.grounded_count} grounded, {counts.hallucinated_count} hallucinated in {measured(pair_count)}"
        if counts
        else "none"
    )
    table = Table(title=f"Do the signals tell grounded from hallucinated object words? AUROC, 0.5 is chance ({found})")
    for heading in ("signal", "all", "chosen", "rejected"):
        table.add_column(heading, justify="left" if heading == "signal" else "right")
    for row in rows:
        table.add_row(row.signal, *(_separation(each) for each in (row.overall, row.chosen, row.rejected)))
    return table


def scores_table(scores: Mapping[str, Any]) -> Table:
    """Every metric of an evaluation (`scores.json`), with its 95 % interval."""
    table = Table("benchmark", "metric")
    for heading in ("value", "95 % interval"):
        table.add_column(heading, justify="right")
    for name, benchmark in scores["benchmarks"].items():
        shown = name if benchmark.get("complete", True) else f"{name} (in part)"
        for metric, figure in benchmark["metrics"].items():
            is_known = figure["value"] is not None and not math.isnan(figure["value"])
            value = f"{figure['value']:.1f}" if is_known else "-"
            table.add_row(shown, metric, value, f"{figure['low']:.1f} to {figure['high']:.1f}" if is_known else "-")
    return table


def official_lines(scores: Mapping[str, Any]) -> list[str]:
    """The figures as the official programs print them, one line per block."""
    lines = []
    for name, benchmark in scores["benchmarks"].items():
        official = benchmark.get("official", {})
        single = {label: figure for label, figure in official.items() if not isinstance(figure, Mapping)}
        blocks = {"": single} | {label: block for label, block in official.items() if isinstance(block, Mapping)}
        for block, figures in _flat(blocks).items():
            shown = ", ".join(f"{label} {figure}" for label, figure in figures.items())
            lines += [f"{name} as the official program prints it{block and f', {block}'}: {shown}"] if shown else []
    return lines


def _flat(blocks: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Blocks of figures, those inside blocks after them."""
    found: dict[str, dict[str, Any]] = {}
    for name, block in blocks.items():
        found[name] = {label: figure for label, figure in block.items() if not isinstance(figure, Mapping)}
        inner = {label: figure for label, figure in block.items() if isinstance(figure, Mapping)}
        found |= {f"{name}, {label}": figures for label, figures in _flat(inner).items()}
    return found


def scores_warnings(scores: Mapping[str, Any]) -> list[str]:
    """What a reader of the numbers must know: answers that are missing, are empty, or got no verdict."""
    warnings = []
    for name, benchmark in scores["benchmarks"].items():
        missing, empty, unread = (benchmark.get(kind, {"count": 0}) for kind in ("missing", "empty", "without_verdict"))
        if missing["count"]:
            parts = ", ".join(f"{part} {each['graded']:,} of {each['asked']:,}" for part, each in benchmark["parts"].items())
            warnings.append(
                f"{name} is graded in part, {missing['count']:,} answers are missing: {_some(missing)}. Graded: {parts}."
            )
        if empty["count"]:
            warnings.append(f"{name}: {empty['count']:,} answers are empty: {_some(empty)}. They are graded as they are.")
        figures = benchmark.get("tools", {}).get("figures", "")
        if figures.startswith("not comparable"):
            warnings.append(f"{name}: figures are {figures}.")
        if unread["count"]:
            warnings.append(
                f"{name}: the judge's reply to {unread['count']:,} answers cannot be read: {_some(unread)}. They count as the "
                "official program counts them; grades.jsonl has the replies."
            )
    return warnings


def _some(listed: Mapping[str, Any]) -> str:
    more = f" and {listed['count'] - 10:,} more" if listed["count"] > 10 else ""
    return plain(", ".join(listed["first"][:10])) + more


def _cell(text: str) -> str:
    """Somebody's text, which the terminal shows and does not act on."""
    return escape(plain(text))


def data_tables(report: Any) -> list[Table | str]:
    """What `catpo data check` found: counts, lengths, and every problem with its row."""
    counts = f"{report.rows} rows: {report.pairs} pairs, {report.samples} samples, {report.pictures} different pictures"
    lengths = Table("", "least", "median", "most", "")
    for name, found in report.lengths.items():
        lengths.add_row(name, str(found.least), f"{found.median:g}", str(found.most), found.unit)
    problems = Table("problem", "where", "what", title=f"{len(report.problems)} problems")
    for problem in report.problems:
        problems.add_row(problem.kind, _cell(problem.where), _cell(problem.what))
    shown: list[Table | str] = [_cell(f"{report.name}: {counts}")]
    shown += [lengths] if report.lengths else []
    return [*shown, problems if report.problems else "No problems found."]


def _separation(auroc: Separation) -> str:
    return "-" if math.isnan(auroc.value) else f"{auroc.value:.2f} [{auroc.low:.2f}, {auroc.high:.2f}]"
