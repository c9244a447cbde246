"""Bootstrap over pictures: intervals of any metric, paired or not."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from catpo.core.intervals import bootstrap_indices, interval
from catpo.evaluation.benchmarks import Floats, Sums


class Estimate(NamedTuple):
    """A number with its 95 % bootstrap interval."""

    value: float
    low: float
    high: float


def resample(
    summarise: Callable[[Sums], Mapping[str, Floats]],
    rows: Sequence[Mapping[str, Any]],
    *,
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Floats]:
    """Metric -> [1 + resamples]: its value on all rows, then on each bootstrap draw.

    Pictures are drawn, not items: answers about one picture are not independent. The same pictures give the same draws, so
    two models' values can be subtracted draw by draw.

    Args:
        summarise: the benchmark's metrics of summed counts.
        rows: of grades.jsonl.
        resamples: number of draws.
        seed: of the draws.
    """
    draws = Draws.of(rows, resamples, seed)
    sums: dict[str, dict[str, Floats]] = {}
    for group in dict.fromkeys(row["group"] for row in rows):
        indices = [index for index, row in enumerate(rows) if row["group"] == group]
        for name in rows[indices[0]]["counts"]:
            counts = np.zeros(len(rows))
            counts[indices] = [rows[index]["counts"][name] for index in indices]
            sums.setdefault(group, {})[name] = draws.sum(counts)
    return dict(summarise(sums))


@dataclass(frozen=True)
class Draws:
    """Bootstrap draws of whole pictures; the first takes every picture once."""

    picture: NDArray[np.int64]
    """[rows]: index of each row's picture."""
    times: Floats
    """[1 + resamples, pictures]: how often each is drawn."""

    @classmethod
    def of(cls, rows: Sequence[Mapping[str, Any]], resamples: int, seed: int) -> Draws:
        names = dict.fromkeys(row["picture"] for row in rows)
        indices = {name: index for index, name in enumerate(names)}
        times = np.ones((1 + resamples, len(indices)))
        for draw, pictures in enumerate(bootstrap_indices(len(indices), resamples=resamples, seed=seed), start=1):
            times[draw] = np.bincount(pictures, minlength=len(indices))
        return cls(np.array([indices[row["picture"]] for row in rows], dtype=np.int64), times)

    def sum(self, values: Floats) -> Floats:
        """[rows] or [rows, columns] -> [1 + resamples] or [1 + resamples, columns]."""
        by_picture = np.zeros((self.times.shape[1], *values.shape[1:]))
        np.add.at(by_picture, self.picture, values)
        return self.times @ by_picture


def estimate(values: Floats) -> Estimate:
    """The first of [1 + resamples] values, with the interval of the others."""
    low, high = interval(values[1:])
    return Estimate(float(values[0]), low, high)
