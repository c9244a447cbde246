"""What the numbers say, in sentences with intervals. Knows numbers, not where they come from."""

from __future__ import annotations

import math
from collections.abc import Sequence

from catpo.evaluation.bootstrap import Estimate
from catpo.evaluation.coverage import Coverage
from catpo.evaluation.metric_names import good_side
from catpo.reporting.evaluations import BenchmarkTable, Cell
from catpo.reporting.signals import SignalSection
from catpo.rewards.quality import Separation

CHAIR, COVER = "CHAIRi", "Cover"
NEAR_ZERO = 0.02
"""A mean net coefficient nearer to 0 than this is as in DPO."""


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
    return text if text.startswith("−") or value <= 0 or float(text) == 0 else f"+{text}"


def between(estimate: Estimate, digits: int = 1) -> str:
    """A difference with its interval, as words.

    >>> between(Estimate(-8.8, -10.9, -6.7))
    'difference −8.8, 95 % interval −10.9 to −6.7'
    """
    value, low, high = (signed(each, digits) for each in estimate)
    return f"difference {value}, 95 % interval {low} to {high}"


def evaluation_verdicts(tables: Sequence[BenchmarkTable]) -> list[str]:
    """A sentence per model and benchmark against the base."""
    sentences = []
    for table in tables:
        for place, model in enumerate(table.models):
            cells = {label: row[place] for label, row in table.rows}
            said = [clause for clause in (_clause(label, cell) for label, cell in _main(cells)) if clause]
            if not said:
                continue
            sentence = f"{model} {said[0]}" + "".join(f"; {clause}" for clause in said[1:])
            cut = next((row for row in table.coverage if row.model == model and row.difference is not None), None)
            sentences.append(f"{sentence}.{_equal_coverage(cut, table, cells.get(CHAIR))}")
    return [sentence for table in tables for sentence in _ranking(table)] + sentences


def _ranking(table: BenchmarkTable) -> list[str]:
    """Who hallucinates least when all say equally much, and whether that is clear."""
    best = table.lead_of_best
    if best is None or best.difference is None:
        return []
    following = min((row for row in table.coverage if row.model != best.model), key=lambda row: row.chair_i.value)
    clear = "" if best.difference.high < 0 else "; which of the two is better is not clear"
    return [
        f"At equal coverage (every model cut to name {number(best.cover)} % of what is there) {best.model} has the lowest "
        f"{CHAIR} of {len(table.coverage)} models, {number(best.chair_i.value)}; {following.model} comes next with "
        f"{number(following.chair_i.value)} ({between(best.difference)}){clear}."
    ]


def _main(cells: dict[str, Cell | None]) -> list[tuple[str, Cell]]:
    """The metrics worth a sentence: CHAIRi and Cover, or what stands in the first rows, and accuracy."""
    main = [(label, cells[label]) for label in (CHAIR, COVER) if label in cells]
    main += [(label, cell) for label, cell in cells.items() if "accuracy" in label.lower()][:1]
    main = main or list(cells.items())[:2]
    return [(label, cell) for label, cell in main if cell is not None]


def _clause(label: str, cell: Cell) -> str:
    if cell.difference is None:
        return ""
    change = cell.difference
    before, after, how = number(change.base), number(change.other), between(change.difference)
    if not change.is_clear:
        return f"left {label} about where it was, {before} and {after} ({how})"
    verb = "raised" if change.difference.value > 0 else ("cut" if good_side(label) < 0 else "lowered")
    return f"{verb} {label} from {before} to {after} ({how})"


def _equal_coverage(cut: Coverage | None, table: BenchmarkTable, chair: Cell | None) -> str:
    """What is left of a gain when all models say equally much."""
    if cut is None or cut.difference is None:
        return ""
    base = next(row for row in table.coverage if row.benchmark == cut.benchmark and row.difference is None)
    said = (
        f" At equal coverage ({number(cut.cover)} %) its {CHAIR} is "
        f"{number(cut.chair_i.value)} against {number(base.chair_i.value)} ({between(cut.difference)})"
    )
    gained = chair is not None and chair.difference is not None and chair.difference.difference.high < 0
    if not gained:
        return f"{said}."
    if cut.difference.high < 0:
        return f"{said}: the gain is not from saying less."
    return f"{said}: saying less may explain the gain."


def signal_verdicts(section: SignalSection) -> list[str]:
    """How well the weights tell grounded from hallucinated words, and what they do to the shared prefix."""
    sentences = []
    best, final = section.best, section.final
    if best is not None:
        sentences.append(
            f"Of the signals, {best.signal} tells grounded from hallucinated words best: AUROC {_auroc(best.overall)} "
            f"({section.grounded_count} grounded and {section.hallucinated_count} hallucinated tokens)."
        )
    if final is not None and not math.isnan(final.overall.value):
        low, high = final.overall.low, final.overall.high
        chance = "no better than chance" if low <= 0.5 <= high else "better than chance" if low > 0.5 else "worse than chance"
        sentences.append(f"The final weight's T reaches AUROC {_auroc(final.overall)}, {chance}.")
    if not math.isnan(section.net_shared):
        net = signed(section.net_shared, 2)
        if section.net_shared < -NEAR_ZERO:
            effect = "training pushes words that both responses begin with down"
        elif section.net_shared > NEAR_ZERO:
            effect = "training pushes words that both responses begin with up"
        else:
            effect = "words that both responses begin with cancel, as in DPO"
        sentences.append(f"The mean net coefficient of shared-prefix tokens is {net}: {effect}.")
    return sentences


def _auroc(separation: Separation) -> str:
    return f"{separation.value:.2f} (95 % interval {separation.low:.2f} to {separation.high:.2f})"
