"""Chooses each method's learning rate: the best of the study's budget, on pictures and a seed that are not reported."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from catpo.core.errors import UserError
from catpo.evaluation.coverage import at_equal_coverage
from catpo.evaluation.folder import Evaluation
from catpo.evaluation.metric_names import good_side
from catpo.experiments.study.cells import Cell
from catpo.experiments.study.results import EQUAL, LEAST_COVER, covered, evaluation_of, first_captions, full_name, metrics_of


@dataclass(frozen=True)
class Choice:
    """The learning rate of one row, and why."""

    rate: float
    values: Mapping[float, float] = field(default_factory=dict)
    """Rate -> the value it was chosen by; NaN where it covers too little."""

    @property
    def is_at_the_edge(self) -> bool:
        """The best is the smallest or largest of several rates tried, so a wider budget might hold a better one."""
        return len(self.values) > 2 and self.rate in (min(self.values), max(self.values))


def choose(cells: Mapping[float, Cell], untrained: Cell, metric: str, output: Path) -> Choice:
    """The best learning rate of one method.

    Args:
        cells: rate -> finished cell on the tuning pictures.
        untrained: the untrained model on the same pictures.
        metric: `equal_coverage`, or a metric of the benchmark.
        output: folder of the studies.

    Raises:
        UserError: the benchmark does not have the metric, or the metric has no better direction.
    """
    evaluations = {rate: evaluation_of(cell, output, str(rate)) for rate, cell in cells.items()}
    if metric == EQUAL:
        values, side = _at_equal_coverage(evaluations, evaluation_of(untrained, output, "untrained")), -1
    else:
        values = {rate: _value(evaluation, metric) for rate, evaluation in evaluations.items()}
        side = good_side(metric)
        if not side or all(map(math.isnan, values.values())):
            raise UserError(
                f"tuning.metric: '{metric}' is no metric of the tuning benchmarks that has a better side. Name another."
            )
    known = [rate for rate, value in sorted(values.items()) if not math.isnan(value)]
    return Choice(max(known or sorted(values), key=lambda rate: side * values[rate]), values)


def _at_equal_coverage(evaluations: Mapping[float, Evaluation], untrained: Evaluation) -> dict[float, float]:
    """CHAIRi of each rate when all and the untrained model are cut to the same Cover; NaN for one that covers too little."""
    if math.isnan(covered(untrained)):
        raise UserError("tuning.metric: the tuning benchmarks have no captions. Name a metric of theirs, such as accuracy.")
    least = LEAST_COVER * covered(untrained)
    enough = [evaluation for evaluation in evaluations.values() if covered(evaluation) >= least]
    rows = first_captions(at_equal_coverage([untrained, *enough], resamples=1))
    chair_i = {row.model: row.chair_i.value for row in rows}
    return {rate: chair_i.get(str(rate), math.nan) for rate in evaluations}


def _value(evaluation: Evaluation, metric: str) -> float:
    values = metrics_of(evaluation)
    return values.get(full_name(metric, list(values)), math.nan)
