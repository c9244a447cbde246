"""Intervals: AUROC against counting every couple, resamples that repeat, percentile ends."""

import math

import numpy as np
import pytest

from catpo.core.intervals import auroc, bootstrap_auroc, bootstrap_indices, interval, mean_interval


def auroc_by_counting(scores, labels):
    """The definition, couple by couple."""
    positives = [s for s, is_positive in zip(scores, labels, strict=True) if is_positive]
    negatives = [s for s, is_positive in zip(scores, labels, strict=True) if not is_positive]
    if not positives or not negatives:
        return math.nan
    wins = sum(1.0 if p > n else 0.5 if p == n else 0.0 for p in positives for n in negatives)
    return wins / (len(positives) * len(negatives))


@pytest.mark.parametrize("seed", range(30))
def test_auroc_equals_counting_every_couple(seed):
    rng = np.random.default_rng(seed)
    count = int(rng.integers(1, 40))
    scores = rng.integers(0, 6, count) / 5 if seed % 2 else rng.normal(size=count)  # odd seeds: many ties
    labels = rng.integers(0, 2, count)
    assert auroc(scores, labels) == pytest.approx(auroc_by_counting(scores, labels), nan_ok=True)


@pytest.mark.parametrize(("scores", "labels"), [([0.1, 0.2], [1, 1]), ([0.1, 0.2], [0, 0]), ([], [])])
def test_auroc_of_one_class_is_not_a_number(scores, labels):
    assert math.isnan(auroc(scores, labels))


def test_bootstrap_auroc_equals_auroc_of_the_items_drawn():
    rng = np.random.default_rng(1)
    scores, labels = rng.integers(0, 9, 60).astype(float), rng.integers(0, 2, 60)
    groups = np.sort(rng.integers(100, 112, 60))
    names = np.unique(groups)
    fast = bootstrap_auroc(scores, labels, groups, resamples=150, seed=3)
    for value, drawn in zip(fast, bootstrap_indices(len(names), resamples=150, seed=3), strict=True):
        items = np.concatenate([np.flatnonzero(groups == names[index]) for index in drawn])
        assert value == pytest.approx(auroc_by_counting(scores[items], labels[items]), nan_ok=True)


def test_bootstrap_auroc_of_nothing_is_not_a_number():
    assert np.isnan(bootstrap_auroc([], [], [], resamples=5)).all()


def test_bootstrap_indices_repeat_for_a_seed_and_differ_between_seeds():
    first = bootstrap_indices(20, resamples=10, seed=1)
    assert first.shape == (10, 20)
    assert set(np.unique(first)) <= set(range(20))
    assert (first == bootstrap_indices(20, resamples=10, seed=1)).all()
    assert (first != bootstrap_indices(20, resamples=10, seed=2)).any()
    assert bootstrap_indices(0, resamples=10).shape == (10, 0)


def test_interval_of_a_mean_covers_what_normal_theory_says():
    values = np.random.default_rng(0).normal(size=400)
    low, high = interval(values[bootstrap_indices(400, resamples=2000)].mean(axis=1))
    half_width = 1.96 * values.std() / 20
    assert low == pytest.approx(values.mean() - half_width, abs=0.02)
    assert high == pytest.approx(values.mean() + half_width, abs=0.02)


def test_interval_leaves_out_what_is_not_a_number():
    assert interval([math.nan, 1.0, 1.0]) == (1.0, 1.0)
    assert all(math.isnan(end) for end in interval([math.nan]))


@pytest.mark.parametrize(("count", "half"), [(2, 8.985), (3, 2.484), (10, 0.7154), (40, 0.3198)])
def test_the_interval_of_a_mean_is_students(count, half):
    """Half-widths of a sample of deviation 1 from a printed table of Student's t."""
    values = np.linspace(-1, 1, count)
    low, high = mean_interval(5 + values / values.std(ddof=1))
    assert (high - low) / 2 == pytest.approx(half, rel=2e-3)
    assert (high + low) / 2 == pytest.approx(5)


def test_one_number_has_no_interval():
    assert all(map(math.isnan, mean_interval([3.0])))
