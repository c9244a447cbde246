"""AUROC, bootstrap resamples and confidence intervals. Knows nothing of tokens, benchmarks or models; NumPy only."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

RESAMPLES_AT_ONCE = 64
"""Resamples per batch; `bootstrap_auroc` holds this many rows of scores in memory."""
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)
"""97.5 % quantiles of Student's t with 1, 2, … degrees of freedom."""


class Interval(NamedTuple):
    """Lower and upper end."""

    low: float
    high: float


def auroc(scores: ArrayLike, labels: ArrayLike) -> float:
    """Share of (positive, negative) couples in which the positive scores higher; a tie counts half (mid-rank).

    0.5 is chance; NaN without positives or without negatives.

    Args:
        scores: [items], finite.
        labels: [items], true (or 1) for positives.

    >>> auroc([0.1, 0.4, 0.4, 0.8], [0, 0, 1, 1])
    0.875
    """
    ranked = _Ranked(scores, labels)
    return float(ranked.auroc(np.ones((1, np.size(labels))))[0])


def bootstrap_auroc(
    scores: ArrayLike, labels: ArrayLike, groups: ArrayLike, *, resamples: int = 1000, seed: int = 0
) -> NDArray[np.float64]:
    """AUROC of each bootstrap resample of whole groups, since tokens of one pair are not independent.

    Args:
        scores: [items], finite.
        labels: [items], true (or 1) for positives.
        groups: [items], integers; items of a group are drawn together.
        resamples: how many to draw.
        seed: see `bootstrap_indices`.

    Returns:
        [resamples]; NaN where a resample has no positive or no negative.
    """
    ranked = _Ranked(scores, labels)
    names, group = np.unique(np.asarray(groups), return_inverse=True)
    drawn = bootstrap_indices(len(names), resamples=resamples, seed=seed)
    results = np.full(resamples, np.nan)
    for start in range(0, resamples if len(names) else 0, RESAMPLES_AT_ONCE):
        block = drawn[start : start + RESAMPLES_AT_ONCE]
        times = np.stack([np.bincount(row, minlength=len(names)) for row in block])  # (resample, group)
        results[start : start + len(block)] = ranked.auroc(times[:, group].astype(np.float64))
    return results


class Area(NamedTuple):
    """An AUROC with its 95 % interval."""

    value: float
    low: float
    high: float


def auroc_between(scores: ArrayLike, labels: ArrayLike, groups: ArrayLike, *, resamples: int = 1000, seed: int = 0) -> Area:
    """`auroc` with the interval of `bootstrap_auroc`; all NaN without positives or without negatives.

    >>> auroc_between([0.1, 0.8], [0, 1], [0, 0])
    Area(value=1.0, low=1.0, high=1.0)
    """
    if len(np.unique(np.asarray(labels).astype(bool))) < 2:
        return Area(float("nan"), float("nan"), float("nan"))
    drawn = bootstrap_auroc(scores, labels, groups, resamples=resamples, seed=seed)
    return Area(auroc(scores, labels), *interval(drawn))


def bootstrap_indices(count: int, *, resamples: int = 1000, seed: int = 0) -> NDArray[np.int64]:
    """Rows to draw, with replacement: [resamples, count], each in 0 … count - 1.

    The same count and seed give the same rows, so two models resampled with them are compared item by item (paired).

    >>> scores = np.array([0.0, 1.0, 1.0, 0.0])
    >>> means = scores[bootstrap_indices(4, resamples=500)].mean(axis=1)
    >>> interval(means)
    Interval(low=0.0, high=1.0)
    """
    if not count:
        return np.empty((resamples, 0), dtype=np.int64)
    return np.random.default_rng(seed).integers(0, count, size=(resamples, count))


def interval(values: ArrayLike, level: float = 0.95) -> Interval:
    """Percentile interval of bootstrap values; NaNs are left out, and the ends are NaN if nothing is left.

    >>> interval(np.arange(101), level=0.5)
    Interval(low=25.0, high=75.0)
    """
    numbers = np.asarray(values, dtype=np.float64)
    numbers = numbers[~np.isnan(numbers)]
    if not len(numbers):
        return Interval(float("nan"), float("nan"))
    low, high = np.quantile(numbers, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(low), float(high))


def mean_interval(values: ArrayLike) -> Interval:
    """95 % interval (Student's t) of the mean of few independent numbers, such as training seeds; NaN for fewer than two.

    >>> low, high = mean_interval([1.0, 2.0, 3.0])
    >>> round(low, 2), round(high, 2)
    (-0.48, 4.48)
    """
    numbers = np.asarray(values, dtype=np.float64)
    if len(numbers) < 2:
        return Interval(float("nan"), float("nan"))
    freedom = len(numbers) - 1
    quantile = STUDENT[freedom - 1] if freedom <= len(STUDENT) else 1.96 + 2.4 / freedom
    half = quantile * float(numbers.std(ddof=1)) / len(numbers) ** 0.5
    return Interval(float(numbers.mean()) - half, float(numbers.mean()) + half)


class _Ranked:
    """Scores ranked once, so that many weightings of the same items cost one pass each."""

    def __init__(self, scores: ArrayLike, labels: ArrayLike) -> None:
        values = np.asarray(scores, dtype=np.float64)
        is_positive = np.asarray(labels).astype(bool)
        negatives = np.flatnonzero(~is_positive)
        self.positives = np.flatnonzero(is_positive)
        self.negatives = negatives[np.argsort(values[negatives], kind="stable")]
        ladder = values[self.negatives]
        self.below = np.searchsorted(ladder, values[self.positives], side="left")  # negatives that score lower
        self.up_to = np.searchsorted(ladder, values[self.positives], side="right")  # … lower or equal

    def auroc(self, weights: NDArray[np.float64]) -> NDArray[np.float64]:
        """AUROC under each row of weights: [rows, items] -> [rows]."""
        positives, negatives = weights[:, self.positives], weights[:, self.negatives]
        lower = np.zeros((len(weights), len(self.negatives) + 1))
        np.cumsum(negatives, axis=1, out=lower[:, 1:])  # lower[row, k] = weight of the k lowest negatives
        wins = (positives * 0.5 * (lower[:, self.below] + lower[:, self.up_to])).sum(axis=1)
        couples = positives.sum(axis=1) * lower[:, -1]
        return np.divide(wins, couples, out=np.full(len(weights), np.nan), where=couples > 0)
