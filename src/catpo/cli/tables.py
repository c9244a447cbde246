"""Results as tables and lines for the terminal. Knows nothing of how they were computed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from catpo.rewards.quality import Separation, SignalQuality, measured
from catpo.text.tables import Fitting, fitting, for_terminal, one_line, table_of
from catpo.text.words import plain

if TYPE_CHECKING:
    from catpo.scoring.probe import Learned
    from catpo.scoring.search import Found


def quality_table(rows: Sequence[SignalQuality], pair_count: int) -> Table:
    """AUROC of each signal for grounded against hallucinated object tokens, with 95 % intervals."""
    counts = "none"
    if rows:
        overall = rows[0].overall
        counts = f"{overall.grounded_count} grounded, {overall.hallucinated_count} hallucinated in {measured(pair_count)}"
    title = f"Do the signals tell grounded from hallucinated object words? AUROC, 0.5 is chance ({counts})"
    table = table_of("signal", "all", "chosen", "rejected", title=title)
    for row in rows:
        table.add_row(for_terminal(row.signal), *map(_separation, (row.overall, row.chosen, row.rejected)))
    return table


def _separation(auroc: Separation) -> str:
    return "-" if math.isnan(auroc.value) else f"{auroc.value:.2f} [{auroc.low:.2f}, {auroc.high:.2f}]"


def probe_table(learned: Learned) -> Fitting:
    """AUROC of each feature and of the probe, on pictures that the probe did not see, by kinds of words."""
    kinds = list(dict.fromkeys(row.words for row in learned.rows))
    counts = {row.words: f"{row.present + row.absent} {row.words}" for row in learned.rows}
    title = f"Do they tell words that are in the picture from others? AUROC over {learned.pictures} pictures not learned from"
    rows = []
    for score in dict.fromkeys(row.score for row in learned.rows):
        cells = [f"{row.auroc:.3f} [{row.low:.3f}, {row.high:.3f}]" for row in learned.rows if row.score == score]
        rows.append([score, *(cell.replace("nan [nan, nan]", "-") for cell in cells)])
    return fitting(["score", *(counts[kind] for kind in kinds)], rows, title=title)


def search_table(found: Sequence[Found]) -> Table:
    """AUROC of a model's signals, the best first."""
    most = max(found, key=_word_count)
    words = f"{most.grounded} grounded, {most.hallucinated} hallucinated words"
    table = table_of("signal", "best of", "AUROC", "95 % interval", texts=2, title=f"Which signal tells them apart? {words}")
    for row in found:
        part = "" if _word_count(row) == _word_count(most) else f" ({_word_count(row)} of {_word_count(most)} words)"
        table.add_row(row.signal + part, row.chosen_from, f"{row.auroc:.3f}", f"{row.low:.3f} to {row.high:.3f}")
    return table


def _word_count(row: Found) -> int:
    return row.grounded + row.hallucinated


def scores_table(scores: Mapping[str, Any]) -> Table:
    """Every metric of an evaluation (`scores.json`), with its 95 % interval."""
    table = table_of("benchmark", "metric", "value", "95 % interval", texts=2)
    for name, benchmark in scores["benchmarks"].items():
        shown = name if benchmark.get("complete", True) else f"{name} (in part)"
        for metric, figure in benchmark["metrics"].items():
            cells = ("-", "-")
            if figure["value"] is not None and not math.isnan(figure["value"]):
                cells = (f"{figure['value']:.1f}", f"{figure['low']:.1f} to {figure['high']:.1f}")
            table.add_row(for_terminal(shown), for_terminal(metric), *cells)
    return table


def official_lines(scores: Mapping[str, Any]) -> list[str]:
    """The figures as the official programs print them, one line per block."""
    lines = []
    for name, benchmark in scores["benchmarks"].items():
        for block, figures in _blocks(benchmark.get("official", {})):
            shown = ", ".join(f"{label} {figure}" for label, figure in figures.items())
            lines.append(one_line(f"{name} as the official program prints it{block}: {shown}"))
    return lines


def _blocks(figures: Mapping[str, Any], name: str = "") -> list[tuple[str, dict[str, Any]]]:
    """(name, figures) of each block that has figures, and of those inside it."""
    own = {label: figure for label, figure in figures.items() if not isinstance(figure, Mapping)}
    blocks = [(name, own)] if own else []
    for label, figure in figures.items():
        if isinstance(figure, Mapping):
            blocks += _blocks(figure, f"{name}, {label}")
    return blocks


def scores_warnings(scores: Mapping[str, Any]) -> list[str]:
    """What a reader of the numbers must know: answers that are missing, are empty, or got no verdict."""
    warnings = config_warnings(scores.get("generation_config", {}))
    if unknown := scores.get("unknown_pictures"):
        warnings.append(
            f"the built-in model knows nothing but the built-in scenes: what it says of the pictures of {', '.join(unknown)} "
            "means nothing. Name another --model."
        )
    for name, benchmark in scores["benchmarks"].items():
        missing, empty, unread = (benchmark.get(kind, {"count": 0}) for kind in ("missing", "empty", "without_verdict"))
        if missing["count"]:
            parts = [f"{part} {count['graded']:,} of {count['asked']:,}" for part, count in benchmark["parts"].items()]
            warnings.append(
                f"{name} is graded in part, {missing['count']:,} answers are missing: {_some(missing)}. "
                f"Graded: {', '.join(parts)}."
            )
        if empty["count"]:
            warnings.append(f"{name}: {empty['count']:,} answers are empty: {_some(empty)}. They are graded as they are.")
        warnings += _thought_warnings(name, benchmark)
        unparsed = (benchmark["metrics"].get("unparsed") or {}).get("value")
        if unparsed:
            warnings.append(f"{name}: {unparsed:.1f} % of the answers cannot be read. They count as wrong.")
        figures = benchmark.get("tools", {}).get("figures", "")
        if figures.startswith("not comparable"):
            warnings.append(f"{name}: figures are {figures}.")
        if unread["count"]:
            warnings.append(
                f"{name}: the judge's reply to {unread['count']:,} answers cannot be read: {_some(unread)}. They count as the "
                f"official program counts them; grades.jsonl has the replies.{_quoted(unread)}"
            )
    return warnings


def _quoted(unread: Mapping[str, Any]) -> str:
    reply, form = unread.get("reply"), unread.get("form")
    return f" The first: {plain(reply)!r}; expected: {form}." if reply is not None and form else ""


def config_warnings(changed: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What the model's generation_config asks for, and what became of it."""
    texts = {
        "switched_off": "generation_config.json of the model asks for {}, which is switched off: the options alone decide.",
        "kept": "generation_config.json of the model forbids tokens ({}), which stay forbidden.",
    }
    shown = {kind: ", ".join(f"{name}={str(value)[:60]}" for name, value in values.items()) for kind, values in changed.items()}
    return [texts[kind].format(values) for kind, values in shown.items()]


def _thought_warnings(name: str, benchmark: Mapping[str, Any]) -> list[str]:
    """Thoughts of a reasoning model are not graded; one that does not end leaves no answer."""
    removed, unfinished = (benchmark.get(f"thoughts_{kind}", {"count": 0}) for kind in ("removed", "unfinished"))
    warnings = []
    if removed["count"]:
        warnings.append(f"{name}: thoughts were taken out of {removed['count']:,} answers before grading.")
    if unfinished["count"]:
        warnings.append(
            f"{name}: {unfinished['count']:,} answers were cut off in a thought and graded without it: {_some(unfinished)}. "
            "Let the model write more: raise --max-new-tokens above the benchmark's own limit."
        )
    return warnings


def _some(listed: Mapping[str, Any]) -> str:
    more = f" and {listed['count'] - 10:,} more" if listed["count"] > 10 else ""
    return plain(", ".join(listed["first"][:10])) + more


def data_tables(report: Any) -> list[Table | Text | str]:
    """What `catpo data check` found: counts, lengths, and problems; equal ones of several rows with the first of them."""
    counts = f"{report.rows} rows: {report.pairs} pairs, {report.samples} samples, {report.pictures} different pictures"
    shown: list[Table | Text | str] = [for_terminal(f"{report.name}: {counts}")]
    if report.lengths:
        lengths = table_of("", "least", "median", "most", "", texts=5)
        for name, length in report.lengths.items():
            lengths.add_row(for_terminal(name), str(length.least), f"{length.median:g}", str(length.most), length.unit)
        shown.append(lengths)
    problems = table_of("problem", "rows", "first", "what", texts=4, title=f"{len(report.problems)} problems")
    for problem, count in report.grouped():
        problems.add_row(problem.kind, f"{count:,}", for_terminal(problem.where), for_terminal(problem.what))
    return [*shown, problems if report.problems else "No problems found."]
