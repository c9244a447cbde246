"""Which learning rate a method gets: the best of the study's budget on pictures and a seed that are not reported."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from catpo.core.errors import UserError
from catpo.evaluation.coverage import at_equal_coverage
from catpo.evaluation.folder import Evaluation, load_evaluation
from catpo.evaluation.metric_names import good_side
from catpo.experiments.study.cells import Cell
from catpo.experiments.study.results import EQUAL, LEAST_COVER, covered, full_name


@dataclass(frozen=True)
class Choice:
    """The rate of one row, and why."""

    rate: float
    values: Mapping[float, float] = field(default_factory=dict)
    """Rate -> what it was judged by; NaN for one that covers too little."""

    @property
    def is_at_the_edge(self) -> bool:
        """The best is the smallest or largest of several that were tried: a wider budget might give a better one."""
        return len(self.values) > 2 and self.rate in (min(self.values), max(self.values))


def choose(cells: Mapping[float, Cell], untrained: Cell, metric: str, output: Path) -> Choice:
    """The best rate of one method.

    Args:
        cells: rate -> finished cell on the tuning pictures.
        untrained: the model itself on the same pictures.
        metric: `equal_coverage`, or one of the benchmark's.
        output: of the study.

    Raises:
        UserError: the benchmark has no such metric, or none that says which side is the good one.
    """
    found = {rate: load_evaluation(cell.folder(output) / "evaluation", name=str(rate)) for rate, cell in cells.items()}
    if metric == EQUAL:
        return _at_equal_coverage(found, load_evaluation(untrained.folder(output) / "evaluation", name="untrained"))
    values = {rate: _value(evaluation, metric) for rate, evaluation in found.items()}
    side = good_side(metric)
    if not side or all(map(math.isnan, values.values())):
        raise UserError(
            f"tuning.metric: '{metric}' is no metric of the tuning benchmarks that has a better side. Name another."
        )
    return Choice(max(values, key=lambda rate: -math.inf if math.isnan(values[rate]) else side * values[rate]), values)


def _at_equal_coverage(found: Mapping[float, Evaluation], untrained: Evaluation) -> Choice:
    """The lowest CHAIRi when candidates and the untrained model are cut to the same Cover; who covers too little is out."""
    if math.isnan(covered(untrained)):
        raise UserError("tuning.metric: the tuning benchmarks have no captions. Name a metric of theirs, such as accuracy.")
    enough = [each for each in found.values() if covered(each) >= LEAST_COVER * covered(untrained)]
    rows = at_equal_coverage([untrained, *enough], resamples=1)
    judged = {row.model: row.chair_i.value for row in rows if row.benchmark == rows[0].benchmark}
    values = {rate: judged.get(str(rate), math.nan) for rate in found}
    best = min(values, key=lambda rate: (math.inf if math.isnan(values[rate]) else values[rate], rate))
    return Choice(best, values)


def _value(evaluation: Evaluation, metric: str) -> float:
    every = {
        f"{name}/{each}": value.value for name in evaluation.benchmarks for each, value in evaluation.metrics(name).items()
    }
    return every.get(full_name(metric, list(every)), math.nan)
