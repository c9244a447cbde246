"""What the numbers say, in sentences with intervals. Knows numbers, not where they come from."""

from __future__ import annotations

import math
from collections.abc import Sequence

from catpo.evaluation.bootstrap import Estimate
from catpo.evaluation.coverage import Coverage
from catpo.evaluation.metric_names import good_side
from catpo.evaluation.paired import Difference
from catpo.reporting.evaluations import BenchmarkTable, Cell
from catpo.reporting.signals import SignalSection
from catpo.rewards.quality import Separation

CHAIR, COVER = "CHAIRi", "Cover"
NEAR_ZERO = 0.02
"""A mean net coefficient closer to 0 than this is as in DPO."""


def number(value: float, digits: int = 1) -> str:
    """A number as people read it.

    >>> number(-8.84), number(float("nan"))
    ('−8.8', '–')
    """
    if math.isnan(value):
        return "–"
    text = f"{value:.{digits}f}"
    return text.removeprefix("-") if float(text) == 0 else text.replace("-", "−")


def signed(value: float, digits: int = 1) -> str:
    """A difference, with its sign.

    >>> signed(2), signed(-0.04), signed(0.0)
    ('+2.0', '0.0', '0.0')
    """
    text = number(value, digits)
    return f"+{text}" if value > 0 and float(text) != 0 else text


def between(estimate: Estimate) -> str:
    """A difference with its interval, as words.

    >>> between(Estimate(-8.8, -10.9, -6.7))
    'difference −8.8, 95 % interval −10.9 to −6.7'
    """
    value, low, high = map(signed, estimate)
    return f"difference {value}, 95 % interval {low} to {high}"


def evaluation_verdicts(tables: Sequence[BenchmarkTable]) -> list[str]:
    """Who hallucinates least at equal coverage, then a sentence per model and benchmark against the base."""
    rankings, sentences = [], []
    for table in tables:
        best = table.lead_of_best
        if best is not None and best.difference is not None:
            rankings.append(_ranking(table, best, best.difference))
        for column, model in enumerate(table.models):
            cells = {label: cells[column] for label, cells in table.rows}
            clauses = [_clause(label, change) for label, change in _main(cells)]
            if clauses:
                sentences.append(f"{model} {'; '.join(clauses)}.{_equal_coverage(table, model, cells.get(CHAIR))}")
    return rankings + sentences


def _ranking(table: BenchmarkTable, best: Coverage, lead: Estimate) -> str:
    """The lowest CHAIRi at equal coverage; a tie where its lead is not clear."""
    others = [row for row in table.coverage if row.model != best.model and not math.isnan(row.chair_i.value)]
    second = min(others, key=lambda row: row.chair_i.value)
    cut = f"At equal coverage (every model cut to name {number(best.cover)} % of what is there)"
    lowest = f"the lowest {CHAIR} of {len(table.coverage)} models"
    first, next_best = number(best.chair_i.value), number(second.chair_i.value)
    if lead.high >= 0:
        return f"{cut} {best.model} and {second.model} tie for {lowest}, {first} and {next_best} ({between(lead)})."
    return f"{cut} {best.model} has {lowest}, {first}; {second.model} comes next with {next_best} ({between(lead)})."


def _main(cells: dict[str, Cell | None]) -> list[tuple[str, Difference]]:
    """Differences worth a sentence: of CHAIRi, Cover and the first accuracy; without these, of the first two rows.

    A metric that one of the models does not have (0 of 0) is worth none.
    """
    labels = [label for label in (CHAIR, COVER) if label in cells]
    labels += [label for label in cells if "accuracy" in label.lower()][:1]
    main = []
    for label in labels or list(cells)[:2]:
        cell = cells[label]
        if cell is not None and cell.difference is not None and not math.isnan(cell.difference.difference.value):
            main.append((label, cell.difference))
    return main


def _clause(label: str, change: Difference) -> str:
    before, after, how = number(change.base), number(change.other), between(change.difference)
    if not change.is_clear:
        return f"left {label} about where it was, {before} and {after} ({how})"
    verb = "raised" if change.difference.value > 0 else "cut" if good_side(label) < 0 else "lowered"
    return f"{verb} {label} from {before} to {after} ({how})"


def _equal_coverage(table: BenchmarkTable, model: str, chair: Cell | None) -> str:
    """What is left of a lower CHAIRi when all captions are cut to the same Cover."""
    rows = {row.model: row for row in table.coverage}
    base = next((row for row in table.coverage if row.difference is None), None)
    cut = rows.get(model)
    if base is None or cut is None or cut.difference is None or math.isnan(cut.difference.value):
        return ""
    sentence = (
        f" At equal coverage ({number(cut.cover)} %) its {CHAIR} is "
        f"{number(cut.chair_i.value)} against {number(base.chair_i.value)} ({between(cut.difference)})"
    )
    has_gained = chair is not None and chair.difference is not None and chair.difference.difference.high < 0
    if not has_gained:
        return f"{sentence}."
    return f"{sentence}: " + (
        "the gain is not from saying less." if cut.difference.high < 0 else "saying less may explain the gain."
    )


def signal_verdicts(section: SignalSection) -> list[str]:
    """How well the weights separate grounded from hallucinated words, and what they do to the shared prefix."""
    sentences = []
    best, final = section.best, section.final
    if best is not None:
        sentences.append(
            f"Of the signals, {best.signal} separates grounded from hallucinated words best: AUROC {_auroc(best.overall)} "
            f"({section.grounded_count} grounded and {section.hallucinated_count} hallucinated tokens)."
        )
    if final is not None and not math.isnan(final.overall.value):
        low, high = final.overall.low, final.overall.high
        chance = "better than chance" if low > 0.5 else "worse than chance" if high < 0.5 else "no better than chance"
        sentences.append(f"The final weight's T reaches AUROC {_auroc(final.overall)}, {chance}.")
    if not math.isnan(section.net_shared):
        effect = "words that both responses begin with cancel, as in DPO"
        if abs(section.net_shared) > NEAR_ZERO:
            direction = "down" if section.net_shared < 0 else "up"
            effect = f"training pushes words that both responses begin with {direction}"
        sentences.append(f"The mean net coefficient of shared-prefix tokens is {signed(section.net_shared, 2)}: {effect}.")
    return sentences


def _auroc(separation: Separation) -> str:
    return f"{separation.value:.2f} (95 % interval {separation.low:.2f} to {separation.high:.2f})"
